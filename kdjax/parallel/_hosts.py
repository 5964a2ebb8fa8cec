"""Several hosts: one process on each runs the same program, and jax joins them into one machine of all their devices."""

import importlib.util
import os
from collections.abc import Callable

import jax
from jax.experimental import multihost_utils

_ADDRESS, _PROCESSES, _PROCESS = _VARIABLES = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')


def initialize_distributed() -> None:
    """Joins this process with those that were started beside it; does nothing where it is alone.

    `jax.devices()` then lists the devices of all. Who they are is found, in this order, in

    - `JAX_COORDINATOR_ADDRESS` (host and port of process 0), `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`, set by the user;
    - what `srun` (one process a GPU, unless `JAX_LOCAL_DEVICE_IDS` says which are its own), `mpirun`, GKE or a Cloud TPU
      set up, by `jax.distributed.initialize`.

    Call it before anything else asks jax for a device. A second call does nothing.

    Raises:
      ValueError: some of the three variables are missing or are not numbers, or jax cannot tell who the others are.
      RuntimeError: a device is in use already, or the other processes cannot be reached.

    >>> initialize_distributed()
    >>> jax.process_count()
    1
    """
    if jax.distributed.is_initialized():
        return
    if _PROCESSES in os.environ or _PROCESS in os.environ:
        missing = [name for name in _VARIABLES if name not in os.environ]
        if missing:
            raise ValueError(f'to join hosts, set {", ".join(_VARIABLES)}: {", ".join(missing)} is missing')
        try:
            processes, process = int(os.environ[_PROCESSES]), int(os.environ[_PROCESS])
        except ValueError:
            raise ValueError(
                f'{_PROCESSES} and {_PROCESS} must be numbers, got {os.environ[_PROCESSES]!r} and {os.environ[_PROCESS]!r}'
            ) from None
        if processes > 1:
            # What surrounds the process, such as a Kubernetes cluster, has been described by hand.
            jax.distributed.initialize(os.environ[_ADDRESS], processes, process, cluster_detection_method='deactivate')
    elif _started_with_others():
        try:
            jax.distributed.initialize()
        except ValueError as error:
            raise ValueError(f'jax cannot tell the other hosts ({error}): set {", ".join(_VARIABLES)}') from error


def wait_for_hosts(name: str) -> None:
    """Waits until every process has come to the point of this name."""
    multihost_utils.sync_global_devices(name)


def on_first_host(write: Callable[[], object], name: str) -> None:
    """Lets process 0 write what all of them share, while the others wait for it."""
    if jax.process_index() == 0:
        write()
    wait_for_hosts(name)


def _started_with_others() -> bool:
    # The shell of an allocation has the variables of a job, but only a step has its number of tasks.
    launched = max(int(os.environ.get(name, '1')) for name in ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE'))
    several = int(os.environ.get('MEGASCALE_NUM_SLICES') or '1') > 1 or ',' in os.environ.get('TPU_WORKER_HOSTNAMES', '')
    # On a Cloud TPU only its metadata server knows; jax sets the variable where it finds no TPU.
    tpu = importlib.util.find_spec('libtpu') is not None and 'TPU_SKIP_MDS_QUERY' not in os.environ
    return launched > 1 or several or tpu
