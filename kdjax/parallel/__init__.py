"""Several devices and hosts: meshes, how arrays are laid out on them, and how processes find each other."""

from kdjax.parallel._hosts import initialize_distributed, on_first_host, wait_for_hosts
from kdjax.parallel._mesh import data_parallel
from kdjax.parallel._sharding import (
    SMALLEST_SPLIT,
    batch_from_hosts,
    batch_sharding,
    check_divisible,
    distribute,
    mesh_of,
    replicate,
    shard,
    shard_batch,
    shardings,
)

__all__ = [
    'SMALLEST_SPLIT',
    'batch_from_hosts',
    'batch_sharding',
    'check_divisible',
    'data_parallel',
    'distribute',
    'initialize_distributed',
    'mesh_of',
    'on_first_host',
    'replicate',
    'shard',
    'shard_batch',
    'shardings',
    'wait_for_hosts',
]
