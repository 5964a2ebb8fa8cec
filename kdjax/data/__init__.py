"""Data: image data sets in memory, few labels, and augmentation on the device."""

from kdjax.data import augment as augment
from kdjax.data.augment import channel_statistics as channel_statistics
from kdjax.data.augment import normalize as normalize
from kdjax.data.dataset import Dataset as Dataset
from kdjax.data.dataset import hide_labels as hide_labels
from kdjax.data.dataset import load as load
from kdjax.data.dataset import repeat_labelled as repeat_labelled
from kdjax.data.dataset import take as take
from kdjax.data.shards import dirichlet_shards as dirichlet_shards
from kdjax.data.shards import stack_shards as stack_shards
