"""Augmentation: pure functions of a key and one image, which run on the device, inside jit, under vmap.

Each maker returns `augment(key, image) -> image` for an image [height, width, channels]; dtype and shape are kept. What moves
pixels takes any dtype. What changes their values takes uint8, from 0 to 255, or floating point, from 0 to 1; results are
rounded and clipped to that range. With a strength of 0 nothing changes. Training calls it with a key made of the run's key,
the epoch and the example's index, so that what an example looks like in an epoch does not depend on the batch it is in, and
can be computed again.

`mixup` alone is a function of a key and a batch, since it needs two examples: see `training.transform_batches`.
"""

from kdjax.data.augment._composition import Augment, chain
from kdjax.data.augment._geometry import (
    random_crop,
    random_cutout,
    random_flip,
    random_rotation,
    random_scale,
    random_shift,
    random_vertical_flip,
)
from kdjax.data.augment._mixing import mixup
from kdjax.data.augment._normalization import channel_statistics, normalize
from kdjax.data.augment._pixels import random_blur, random_brightness, random_contrast, random_noise, random_saturation

__all__ = [
    'Augment',
    'chain',
    'channel_statistics',
    'mixup',
    'normalize',
    'random_blur',
    'random_brightness',
    'random_contrast',
    'random_crop',
    'random_cutout',
    'random_flip',
    'random_noise',
    'random_rotation',
    'random_saturation',
    'random_scale',
    'random_shift',
    'random_vertical_flip',
]
