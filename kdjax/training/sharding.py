"""Where arrays live: one entry point to data parallelism over all devices.

    mesh = data_parallel()
    state, teacher_variables = replicate(mesh, (state, teacher_variables))
    state, metrics = distillation.step(state, teacher_variables, shard_batch(mesh, batch))

This replaces `jax.pmap`. There, every array had a leading axis of devices, the function saw one device's share, and means
over the batch had to be written as `psum`. Here arrays keep their shapes, the function sees the whole batch, and `jit`
splits the work: batch statistics and losses that relate examples to each other come out as on one device.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kdjax.batches import Batch


def data_parallel(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh whose axis `'data'` runs over the devices, all of them by default.

    >>> data_parallel(jax.devices()[:1]).shape['data']
    1
    """
    devices = jax.devices() if devices is None else list(devices)
    return Mesh(np.asarray(devices), ('data',), axis_types=(AxisType.Auto,))


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Copies a tree to every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def shard_batch(mesh: Mesh, batch: Batch) -> Batch:
    """Splits a batch over the devices along its first axis.

    Raises:
      ValueError: the number of examples does not divide by that of devices.
    """
    check_divisible(mesh, next(iter(jax.tree.leaves(batch))).shape[0])
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec('data')))


def check_divisible(mesh: Mesh, batch_size: int) -> None:
    """Raises if a batch cannot be split evenly over the devices of the mesh."""
    devices = mesh.shape['data']
    if batch_size % devices:
        below = batch_size // devices * devices
        choice = f'{below} or {below + devices}' if below else str(devices)
        raise ValueError(f'a batch of {batch_size} does not divide over {devices} devices: use {choice}')
