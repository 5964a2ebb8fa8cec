"""The mesh of devices that batches and parameters are split over."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh


def data_parallel(devices: Sequence[Any] | None = None, *, fsdp: int = 1) -> Mesh:
    """A mesh of devices with axes `'data'` and `'fsdp'`; batches are split over both, large parameters over the second.

    Args:
      devices: the devices; all of them by default, those of other hosts included.
      fsdp: how many neighbouring devices share one copy of the parameters. With 1 each device holds all of them (plain data
        parallelism), with as many as there are each holds its share alone (FSDP); between, groups hold a copy each (hybrid),
        such as the devices of a host, between which links are fast.

    Raises:
      ValueError: `fsdp` does not divide the number of devices.

    >>> dict(data_parallel(jax.devices()[:8], fsdp=4).shape)
    {'data': 2, 'fsdp': 4}

    Reference:
      Zhao et al. PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel. 2023. https://arxiv.org/abs/2304.11277
    """
    devices = jax.devices() if devices is None else list(devices)
    if fsdp < 1 or len(devices) % fsdp:
        raise ValueError(f'fsdp must divide the {len(devices)} devices, got {fsdp}')
    return jax.make_mesh((len(devices) // fsdp, fsdp), ('data', 'fsdp'), axis_types=(AxisType.Auto,) * 2, devices=devices)
