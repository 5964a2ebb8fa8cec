"""Several devices and hosts: meshes, how arrays are laid out on them, and how processes find each other."""

from kdjax.parallel.hosts import initialize_distributed as initialize_distributed
from kdjax.parallel.sharding import SMALLEST_SPLIT as SMALLEST_SPLIT
from kdjax.parallel.sharding import batch_from_hosts as batch_from_hosts
from kdjax.parallel.sharding import batch_sharding as batch_sharding
from kdjax.parallel.sharding import data_parallel as data_parallel
from kdjax.parallel.sharding import distribute as distribute
from kdjax.parallel.sharding import replicate as replicate
from kdjax.parallel.sharding import shard as shard
from kdjax.parallel.sharding import shard_batch as shard_batch
from kdjax.parallel.sharding import shardings as shardings
