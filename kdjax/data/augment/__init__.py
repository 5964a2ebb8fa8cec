"""Augmentation: pure functions of a key and one image, which run on the device, inside jit, under vmap.

Each maker returns `augment(key, image) -> image` for an image [height, width, channels]; dtype and shape are kept. What moves
pixels takes any dtype. What changes their values takes uint8, from 0 to 255, or floating point, from 0 to 1; results are
rounded and clipped to that range. With a strength of 0 nothing changes. Training calls it with a key made of the run's key,
the epoch and the example's index, so that what an example looks like in an epoch does not depend on the batch it is in, and
can be computed again.

`mixup` alone is a function of a key and a batch, since it needs two examples: see `training.transform_batches`.
"""

from kdjax.data.augment.composition import Augment as Augment
from kdjax.data.augment.composition import chain as chain
from kdjax.data.augment.geometry import random_crop as random_crop
from kdjax.data.augment.geometry import random_cutout as random_cutout
from kdjax.data.augment.geometry import random_flip as random_flip
from kdjax.data.augment.geometry import random_rotation as random_rotation
from kdjax.data.augment.geometry import random_scale as random_scale
from kdjax.data.augment.geometry import random_shift as random_shift
from kdjax.data.augment.geometry import random_vertical_flip as random_vertical_flip
from kdjax.data.augment.mixing import mixup as mixup
from kdjax.data.augment.normalization import channel_statistics as channel_statistics
from kdjax.data.augment.normalization import normalize as normalize
from kdjax.data.augment.pixels import random_blur as random_blur
from kdjax.data.augment.pixels import random_brightness as random_brightness
from kdjax.data.augment.pixels import random_contrast as random_contrast
from kdjax.data.augment.pixels import random_noise as random_noise
from kdjax.data.augment.pixels import random_saturation as random_saturation
