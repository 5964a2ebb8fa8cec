"""Augmentation that moves pixels, or hides some."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates

from kdjax.data.augment._composition import Augment
from kdjax.data.augment._library import dm_pix


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
    return dm_pix().random_flip_left_right


def random_vertical_flip() -> Augment:
    """Mirrors up and down, one time in two."""
    return dm_pix().random_flip_up_down


def random_rotation(*, degrees: float) -> Augment:
    """Turns the image about its centre by up to so many degrees, either way.

    Pixels are interpolated linearly; what comes into view repeats the edge.

    Raises:
      ValueError: the angle is negative.

    >>> import jax, jax.numpy as jnp
    >>> random_rotation(degrees=15)(jax.random.key(0), jnp.ones((28, 28, 1), jnp.uint8)).dtype
    dtype('uint8')
    """
    if degrees < 0:
        raise ValueError(f'random_rotation: degrees must not be negative, got {degrees}')

    def augment(key: jax.Array, image: jax.Array) -> jax.Array:
        angle = jnp.deg2rad(jax.random.uniform(key, minval=-degrees, maxval=degrees))
        cosine, sine = jnp.cos(angle), jnp.sin(angle)
        return _resampled(image, ((cosine, sine), (-sine, cosine)))

    return augment


def random_scale(*, change: float) -> Augment:
    """Enlarges or shrinks the image about its centre, by a factor from 1 - change to 1 + change; the size stays.

    Pixels are interpolated linearly; what comes into view repeats the edge.

    Raises:
      ValueError: the change is not from 0 to below 1.

    >>> import jax, jax.numpy as jnp
    >>> random_scale(change=0.2)(jax.random.key(0), jnp.ones((28, 28, 1))).shape
    (28, 28, 1)
    """
    if not 0 <= change < 1:
        raise ValueError(f'random_scale: change must be from 0 to below 1, got {change}')

    def augment(key: jax.Array, image: jax.Array) -> jax.Array:
        step = 1 / jax.random.uniform(key, minval=1 - change, maxval=1 + change)
        return _resampled(image, ((step, 0.0), (0.0, step)))

    return augment


def random_cutout(*, pixels: int) -> Augment:
    """Sets a square of so many pixels a side to zero; its centre is any pixel, so part of it may lie outside.

    Raises:
      ValueError: the side is negative.

    >>> import jax, jax.numpy as jnp
    >>> image = random_cutout(pixels=1)(jax.random.key(0), jnp.ones((4, 4, 1)))
    >>> float(image.sum())
    15.0

    Reference:
      DeVries, Taylor. Improved Regularization of Convolutional Neural Networks with Cutout. 2017.
      https://arxiv.org/abs/1708.04552
    """
    _check_pixels(pixels)

    def augment(key: jax.Array, image: jax.Array) -> jax.Array:
        hidden = jnp.bool_(True)
        for axis, axis_key in enumerate(jax.random.split(key)):
            shape = [1] * image.ndim
            shape[axis] = image.shape[axis]
            start = jax.random.randint(axis_key, (), 0, image.shape[axis]) - pixels // 2
            position = jnp.arange(image.shape[axis]).reshape(shape)
            hidden = hidden & (position >= start) & (position < start + pixels)
        return jnp.where(hidden, jnp.zeros_like(image), image)

    return augment


def _shifted(pixels: int, mode: str) -> Augment:
    _check_pixels(pixels)
    crop = dm_pix().random_crop

    def augment(key: jax.Array, image: jax.Array) -> Any:
        padded = jnp.pad(image, ((pixels, pixels), (pixels, pixels), (0, 0)), mode=mode)
        return crop(key, padded, image.shape)

    return augment


def _check_pixels(pixels: int) -> None:
    if pixels < 0:
        raise ValueError(f'the number of pixels must not be negative, got {pixels}')


def _resampled(image: jax.Array, matrix: tuple[tuple[jax.Array | float, ...], ...]) -> jax.Array:
    """The image whose pixel at p is that of the given one at matrix · (p - centre) + centre."""
    centre = [(side - 1) / 2 for side in image.shape[:2]]
    axes = (jnp.arange(side, dtype=jnp.float32) - middle for side, middle in zip(image.shape, centre, strict=False))
    rows, columns = jnp.meshgrid(*axes, indexing='ij')
    coordinates = [down * rows + right * columns + middle for (down, right), middle in zip(matrix, centre, strict=True)]

    def sample(channel: jax.Array) -> jax.Array:
        # dm_pix interpolates along the channels too, which takes a hundred times as long.
        return map_coordinates(channel, coordinates, order=1, mode='nearest')

    # jax.scipy promotes dtypes implicitly, which would fail for users who forbid that in their own code.
    with jax.numpy_dtype_promotion('standard'):
        sampled = jax.vmap(sample, in_axes=-1, out_axes=-1)(image.astype(jnp.float32))
    return (sampled if jnp.issubdtype(image.dtype, jnp.floating) else jnp.round(sampled)).astype(image.dtype)
