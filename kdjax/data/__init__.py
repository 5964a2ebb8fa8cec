"""Data: image data sets in memory, few labels, and augmentation on the device."""

from kdjax.data import augment
from kdjax.data._dataset import Dataset, hide_labels, load, repeat_labelled, take
from kdjax.data._shards import dirichlet_shards, stack_shards
from kdjax.data.augment import channel_statistics, normalize

__all__ = [
    'Dataset',
    'augment',
    'channel_statistics',
    'dirichlet_shards',
    'hide_labels',
    'load',
    'normalize',
    'repeat_labelled',
    'stack_shards',
    'take',
]
