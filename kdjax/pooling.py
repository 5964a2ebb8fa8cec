"""Average pooling of maps to any size, as adaptive pooling does it."""

import jax
import jax.numpy as jnp
import numpy as np


def average_pool(maps: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Average-pools [batch, height, width] or [batch, height, width, channels] to `size`, whatever the ratio.

    Output i averages the inputs from floor(i·n/m) up to ceil((i+1)·n/m), the windows of adaptive pooling; one product with
    a small constant matrix per axis, and nothing where the size is right already.
    """
    for axis, target in zip((1, 2), size, strict=True):
        length = maps.shape[axis]
        if length == target:
            continue
        window = jnp.asarray(windows(length, target))
        pooled = jnp.tensordot(maps, window, axes=((axis,), (0,)), precision=jax.lax.Precision.HIGHEST)
        maps = jnp.moveaxis(pooled, -1, axis)
    return maps


def windows(length: int, target: int) -> np.ndarray:
    """The matrix [length, target] of which each column averages a window."""
    matrix = np.zeros((length, target), np.float32)
    for i in range(target):
        start, stop = i * length // target, -(-(i + 1) * length // target)
        matrix[start:stop, i] = 1.0 / (stop - start)
    return matrix
