"""Which positions of a feature or of logits count, and zeros in place of what stands in the others.

What does not count may be anything, NaN too. A zero in the result is too late for that, since the gradient would be NaN times
0: terms set their inputs to zero before any arithmetic.
"""

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.batches import Batch, counts
from kdjax.numerics import masked_mean
from kdjax.pooling import average_pool


def zero_outside(where: jax.Array | None, x: jax.Array) -> jax.Array:
    """`x` where it counts, zero elsewhere; `where` has as many axes."""
    return x if where is None else jnp.where(where, x, jnp.zeros((), x.dtype))


def feature_counts(batch: Batch, shape: tuple[int, ...]) -> jax.Array | None:
    """Which positions of a feature [batch, positions, channels] count: [batch, positions, 1], or None where all do.

    The channels are no position, however many there are: of a feature [batch, channels] an example counts where any of its
    positions does. Where the batch has a whole number of times more positions along each axis, as pixels over a feature map do,
    a position of the feature counts where any of those that it stands for does.

    Raises:
      ValueError: mask or weights do not fit.
    """
    given = max((np.shape(batch[name]) for name in ('mask', 'weights') if name in batch), key=len, default=None)
    if given is None:
        return None
    own = shape[: max(1, len(shape) - 1)]
    if len(own) == 1 or len(given) == 1 or given == own[: len(given)]:
        where = counts(batch, own)
    elif len(given) == len(own) and all(n > 0 and m % n == 0 for m, n in zip(given, own, strict=True)) and given[0] == own[0]:
        blocks = [size for m, n in zip(given, own, strict=True) for size in (n, m // n)]
        where = counts(batch, given)
        if where is not None:
            where = jnp.any(jnp.broadcast_to(where, given).reshape(blocks), axis=tuple(range(1, len(blocks), 2)))
    else:
        raise ValueError(
            f'a mask or weights {given} do not fit a feature {shape}: give one per example, its positions {own}, or a whole '
            'number of times more of them along each axis'
        )
    return None if where is None else where.reshape(*where.shape, *(1,) * (len(shape) - where.ndim))


def counted_features(batch: Batch, *features: jax.Array) -> tuple[jax.Array, ...]:
    """Features, with zeros where they do not count."""
    return tuple(zero_outside(feature_counts(batch, x.shape), x) for x in features)


def position_counts(batch: Batch, shape: tuple[int, ...]) -> jax.Array | None:
    """`feature_counts` of a feature [batch, positions, channels], as booleans [batch, positions]."""
    where = feature_counts(batch, shape)
    return None if where is None else jnp.broadcast_to(where[..., 0], shape[:-1])


def counted_logits(batch: Batch, logits: jax.Array) -> jax.Array:
    """Logits [batch, positions, classes], with zeros where they do not count."""
    return zero_outside(logit_counts(batch, logits.shape), logits)


def logit_counts(batch: Batch, shape: tuple[int, ...]) -> jax.Array | None:
    """Which logits [batch, positions, classes] count: [batch, positions, 1], or None where all do.

    Raises:
      ValueError: mask or weights do not fit; logits have no other resolution than their mask.
    """
    where = counts(batch, shape[:-1])
    return None if where is None else where[..., None]


def positions_average(batch: Batch, x: jax.Array) -> jax.Array:
    """The mean of a feature [batch, positions, channels] over the positions that count, float32 [batch, channels]."""
    where = feature_counts(batch, x.shape)
    return masked_mean(zero_outside(where, x.astype(jnp.float32)), tuple(range(1, x.ndim - 1)), where)


def pool_positions(batch: Batch, x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """`pooling.average_pool` of an image in float32, over what counts in each window; 0 where nothing does."""
    where, x = feature_counts(batch, x.shape), x.astype(jnp.float32)
    if where is None or x.shape[1:3] == size:
        return average_pool(zero_outside(where, x), size)
    share = average_pool(jnp.broadcast_to(where, (*x.shape[:3], 1)).astype(jnp.float32), size)
    return average_pool(zero_outside(where, x), size) / jnp.where(share > 0, share, 1.0)


def pool_to_one_size(batch: Batch, source: jax.Array, target: jax.Array) -> tuple[jax.Array, ...]:
    """Both in float32 with zeros where they do not count, the larger of two images pooled to the smaller."""
    if source.ndim == target.ndim == 4:
        size = min(source.shape[1], target.shape[1]), min(source.shape[2], target.shape[2])
        return tuple(pool_positions(batch, x, size) for x in (source, target))
    return tuple(x.astype(jnp.float32) for x in counted_features(batch, source, target))
