"""Pixels in the scale that networks like."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


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
    counts = [np.zeros(256, np.int64) for _ in range(images.shape[-1])]
    # Piece by piece, as images on disk need not fit in memory.
    for start in range(0, len(images), 1024):
        piece = np.asarray(images[start : start + 1024])
        for channel, count in enumerate(counts):
            count += np.bincount(piece[..., channel].ravel(), minlength=256)
    means = [float(count @ values / count.sum()) for count in counts]
    variances = [float(count @ (values - mean) ** 2 / count.sum()) for count, mean in zip(counts, means, strict=True)]
    # A channel that never changes is left as it is.
    return tuple(means), tuple(variance**0.5 or 1.0 for variance in variances)
