"""Augmentation: pure functions of a key and one image, which run on the device, inside jit, under vmap.

Each maker returns `augment(key, image) -> image` for an image [height, width, channels] of any dtype. `training.epoch`
calls it with a key made of the run's key, the epoch and the example's index, so that what an example looks like in an epoch
does not depend on the batch it is in, and can be computed again.
"""

from collections.abc import Callable

import dm_pix
import jax
import jax.numpy as jnp
import numpy as np

Augment = Callable[[jax.Array, jax.Array], jax.Array]


def random_crop(*, padding: int) -> Augment:
    """Pads with zeros on all sides and cuts the original size out at random: the standard for CIFAR, with 4.

    >>> import jax, jax.numpy as jnp
    >>> random_crop(padding=4)(jax.random.key(0), jnp.ones((32, 32, 3))).shape
    (32, 32, 3)
    """
    return _shifted(padding, 'constant')


def random_shift(*, pixels: int) -> Augment:
    """Moves the image by up to so many pixels along both axes; what comes into view repeats the edge.

    >>> import jax, jax.numpy as jnp
    >>> print(random_shift(pixels=2)(jax.random.key(0), jnp.ones((2, 2, 1))).ravel())
    [1. 1. 1. 1.]
    """
    return _shifted(pixels, 'edge')


def random_flip() -> Augment:
    """Mirrors left and right, one time in two."""
    return dm_pix.random_flip_left_right


def chain(*augments: Augment) -> Augment:
    """Applies several in turn, each with a key of its own.

    >>> import jax, jax.numpy as jnp
    >>> chain(random_crop(padding=1), random_flip())(jax.random.key(0), jnp.ones((4, 4, 1))).shape
    (4, 4, 1)
    """

    def augment(key: jax.Array, image: jax.Array) -> jax.Array:
        for i, function in enumerate(augments):
            image = function(jax.random.fold_in(key, i), image)
        return image

    return augment


def normalize(mean: tuple[float, ...] | float, deviation: tuple[float, ...] | float) -> Callable[[jax.Array], jax.Array]:
    """(x / 255 - mean) / deviation in float32, for `networks.preprocess` in front of a network that takes uint8 images.

    Args:
      mean: of the pixels scaled to [0, 1], one number or one per channel.
      deviation: likewise.

    >>> import jax.numpy as jnp
    >>> print(normalize(0.5, 0.25)(jnp.array([[[0], [255]]], jnp.uint8)).ravel())
    [-2.  2.]
    """

    def function(images: jax.Array) -> jax.Array:
        shape = (1,) * (images.ndim - 1) + (-1,)
        shift, scale = (jnp.asarray(x, jnp.float32).reshape(shape) for x in (mean, deviation))
        return (images.astype(jnp.float32) / 255 - shift) / scale

    return function


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of uint8 images, scaled to [0, 1], for `normalize`.

    Args:
      images: uint8 [examples, height, width, channels].

    >>> channel_statistics(np.array([0, 255], np.uint8).reshape(1, 2, 1, 1))
    ((0.5,), (0.5,))
    """
    # Counting values is exact, where a sum over millions of float32 pixels is not.
    values = np.arange(256) / 255
    counts = [np.bincount(images[..., channel].ravel(), minlength=256) for channel in range(images.shape[-1])]
    means = [float(count @ values / count.sum()) for count in counts]
    variances = [float(count @ (values - mean) ** 2 / count.sum()) for count, mean in zip(counts, means, strict=True)]
    # A channel that never changes is left as it is.
    return tuple(means), tuple(variance**0.5 or 1.0 for variance in variances)


def _shifted(pixels: int, mode: str) -> Augment:
    if pixels < 0:
        raise ValueError(f'the number of pixels must not be negative, got {pixels}')

    def augment(key: jax.Array, image: jax.Array) -> jax.Array:
        padded = jnp.pad(image, ((pixels, pixels), (pixels, pixels), (0, 0)), mode=mode)
        return dm_pix.random_crop(key, padded, image.shape)

    return augment
