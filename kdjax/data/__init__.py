"""Data: image data sets of one's own and by name, few labels, augmentation on the device, packed and aligned tokens."""

from kdjax.data import augment
from kdjax.data._align_tokens import align_tokens
from kdjax.data._dataset import Dataset, from_arrays, hide_labels, load, repeat_labelled, take
from kdjax.data._packing import pack
from kdjax.data._shards import dirichlet_shards, stack_shards
from kdjax.data.augment import channel_statistics, normalize

__all__ = [
    'Dataset',
    'align_tokens',
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
