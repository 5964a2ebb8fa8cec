"""Data: image data sets of one's own and by name, few labels, and augmentation on the device."""

from kdjax.data import augment
from kdjax.data._dataset import Dataset, from_arrays, hide_labels, load, repeat_labelled, take
from kdjax.data._packing import pack
from kdjax.data._shards import dirichlet_shards, stack_shards
from kdjax.data.augment import channel_statistics, normalize

__all__ = [
    'Dataset',
    'augment',
    'channel_statistics',
    'dirichlet_shards',
    'from_arrays',
    'hide_labels',
    'load',
    'normalize',
    'pack',
    'repeat_labelled',
    'stack_shards',
    'take',
]
