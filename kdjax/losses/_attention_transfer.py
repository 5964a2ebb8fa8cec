"""AT, attention transfer: the difference of the maps that say where each network is active."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import numerics, pooling
from kdjax.losses._activations import images
from kdjax.meshes import on_any_mesh


@on_any_mesh
def attention_transfer(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    power: float = 2,
    variant: Literal['mean_square', 'norm'] = 'mean_square',
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """AT, attention transfer: difference of the maps that say where each network is active, per example.

    Q = vec(mean_c |f_c|^p) / ||vec(mean_c |f_c|^p)||. `variant='mean_square'`, behind published tables:
    the mean over positions of (Q_s - Q_t)². `variant='norm'`, the paper's: ||Q_s - Q_t||. Channel counts may differ. Where
    sizes differ, the larger activation is average-pooled to the smaller before its power is taken, as in published code; to
    pool its map instead would give other numbers.

    Args:
      student: activations [batch, height, width, channels], floating point of any precision; arithmetic is in float32.
      teacher: activations of the same rank and batch size.
      power: p > 0.
      variant: `'mean_square'` or `'norm'`.
      axis: the channel axis.
      where: boolean, broadcastable to the smaller activation with a channel axis of length 1: positions to keep.

    Returns:
      float32 [batch], without unit: at most 4 / positions for `'mean_square'`, at most 2 for `'norm'`. An activation that
      is zero everywhere has a map of zeros.

    Raises:
      ValueError: shapes or dtypes do not fit, the power is not a positive scalar, or the variant is unknown.

    >>> import jax.numpy as jnp
    >>> student = jnp.array([1., 0., 0., 0.]).reshape(1, 2, 2, 1)
    >>> teacher = jnp.array([0., 0., 0., 5.]).reshape(1, 2, 2, 1)
    >>> print(attention_transfer(student, teacher), attention_transfer(student, teacher, variant='norm'))
    [0.5] [1.414]

    Reference:
      Zagoruyko, Komodakis. Paying More Attention to Attention: Improving the Performance of Convolutional Neural Networks via
      Attention Transfer. 2017. https://arxiv.org/abs/1612.03928
    """
    numerics.check_positive('attention_transfer', power=power)
    if variant not in ('mean_square', 'norm'):
        raise ValueError(f"attention_transfer: variant must be 'mean_square' or 'norm', got {variant!r}")
    student, teacher, size, where = images('attention_transfer', student, teacher, axis, where)

    def attention(features: jax.Array) -> jax.Array:
        pooled = pooling.average_pool(numerics.unit_scale(features, axis=(1, 2, 3)), size)
        magnitude = jnp.abs(pooled)
        # |f|^p has an infinite or undefined derivative at 0 for p < 2, where the convention is 0.
        powered = jnp.where(magnitude == 0, 0.0, numerics.nonzero(magnitude) ** jnp.asarray(power, jnp.float32))
        mean = jnp.mean(powered, axis=-1)
        return numerics.l2_normalize(mean if where is None else jnp.where(where, mean, 0.0), axis=(1, 2))

    squares = jnp.square(attention(student) - attention(teacher))
    if variant == 'mean_square':
        return numerics.masked_mean(squares, (1, 2), where)
    return numerics.root(jnp.sum(squares, axis=(1, 2)))
