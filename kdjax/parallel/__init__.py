"""Several devices and hosts: meshes, how arrays are laid out on them, and how processes find each other."""

from kdjax.parallel._hosts import initialize_distributed
from kdjax.parallel._sharding import (
    SMALLEST_SPLIT,
    batch_from_hosts,
    batch_sharding,
    data_parallel,
    distribute,
    replicate,
    shard,
    shard_batch,
    shardings,
)

__all__ = [
    'SMALLEST_SPLIT',
    'batch_from_hosts',
    'batch_sharding',
    'data_parallel',
    'distribute',
    'initialize_distributed',
    'replicate',
    'shard',
    'shard_batch',
    'shardings',
]
