"""FT, factor transfer: the difference of normalised factors of two activations."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import numerics, pooling
from kdjax.losses._activations import images
from kdjax.meshes import on_any_mesh


@on_any_mesh
def factor_transfer(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    variant: Literal['paper', 'attention'] = 'paper',
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """FT, factor transfer: mean absolute difference of two normalised factors, per example.

    mean |F_s / ||F_s|| - F_t / ||F_t|||, with L2 norms. `variant='paper'`: the mean is over all entries of the factors, where
    the paper writes the L1 norm, their sum; published code takes this mean, and its weight is that of a mean.
    `variant='attention'`, behind published tables: of maps, F = mean_c f_c², so that channels may differ. Where sizes differ,
    the larger factor is average-pooled to the smaller. The paraphraser and the translator that make the factors are
    `objectives.factor_transfer`'s.

    Args:
      student: the student's factor [batch, height, width, channels], floating point of any precision; arithmetic is in float32.
      teacher: the teacher's factor, of the same batch size and, for `'paper'`, with as many channels.
      variant: `'paper'` or `'attention'`.
      axis: the channel axis.
      where: boolean, broadcastable to the smaller factor with a channel axis of length 1: positions to keep.

    Returns:
      float32 [batch], without unit, at most 2 / √entries; a factor that is zero stays zero; 0 where no position is kept.

    Raises:
      ValueError: shapes or dtypes do not fit, or the variant is unknown.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([3., 4.]).reshape(1, 1, 2, 1), jnp.array([0., 2.]).reshape(1, 1, 2, 1)
    >>> print(factor_transfer(student, teacher))
    [0.4]

    Reference:
      Kim, Park, Kwak. Paraphrasing Complex Network: Network Compression via Factor Transfer. 2018.
      https://arxiv.org/abs/1802.04977
    """
    if variant not in ('paper', 'attention'):
        raise ValueError(f"factor_transfer: variant must be 'paper' or 'attention', got {variant!r}")
    student, teacher, size, where = images('factor_transfer', student, teacher, axis, where)
    if variant == 'paper' and student.shape[3] != teacher.shape[3]:
        raise ValueError(
            "factor_transfer: variant 'paper' needs factors with the same channels, "
            f'got {student.shape} and {teacher.shape} (channels last)'
        )
    where = None if where is None else where[..., None]

    def normalized(factor: jax.Array) -> jax.Array:
        pooled = pooling.average_pool(factor, size)
        kept = pooled if where is None else jnp.where(where, pooled, 0.0)
        if variant == 'attention':
            kept = jnp.mean(jnp.square(numerics.unit_scale(kept, axis=(1, 2, 3))), axis=3, keepdims=True)
        return numerics.l2_normalize(kept, axis=(1, 2, 3))

    return numerics.masked_mean(jnp.abs(normalized(student) - normalized(teacher)), (1, 2, 3), where)
