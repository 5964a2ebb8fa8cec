"""Losses on relations between the examples of a batch: which inputs the teacher finds alike, whatever its coordinates.

All return one scalar for the batch, and see the whole batch: under `jit` with sharded arrays that is the global one.
Embeddings are [batch, ...]; all axes but the first are flattened, and the two networks may have different widths.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax.losses import numerics


def similarity_preserving(
    student: ArrayLike, teacher: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None
) -> jax.Array:
    """Squared difference of the two networks' similarity matrices over the batch, a scalar.

    Σ_ij (G_t - G_s)²_ij / B², with G = F Fᵀ for the flattened activations F [B, D], each row of G divided by its L2 norm
    (the L2 norm, where some implementations take L1).

    Args:
      student: activations [batch, ..., channels], floating point of any precision; arithmetic is in float32.
      teacher: activations with the same batch size; the other sizes may differ.
      axis: the channel axis.
      where: boolean [batch]: examples to keep, as if the others had been sliced away.

    Returns:
      float32 scalar, without unit, at most 4 / B; 0 where no example is kept. An example whose activation is zero has a row
      of zeros.

    Raises:
      ValueError: shapes or dtypes do not fit.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[1., 0.], [0., 1.]]), jnp.array([[1., 0., 0.], [1., 0., 0.]])
    >>> print(similarity_preserving(student, teacher))
    0.293

    Reference:
      Tung, Mori. Similarity-Preserving Knowledge Distillation. 2019. https://arxiv.org/abs/1907.09682
    """
    student, teacher, where = embeddings('similarity_preserving', student, teacher, axis, where)

    def similarities(x: jax.Array) -> jax.Array:
        x = numerics.unit_scale(x, axis=(0, 1))
        return numerics.l2_normalize(jnp.matmul(x, x.T, precision=jax.lax.Precision.HIGHEST), axis=1)

    kept = jnp.float32(student.shape[0]) if where is None else jnp.sum(where, dtype=jnp.float32)
    total = jnp.sum(jnp.square(similarities(teacher) - similarities(student)))
    return total / jnp.square(jnp.maximum(kept, 1.0))


def embeddings(
    loss: str, student: ArrayLike, teacher: ArrayLike, axis: int, where: ArrayLike | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Flattens student and teacher to [batch, features] in float32 and sets the examples outside `where` [batch] to zero."""
    sides = [numerics.as_float32(f'{loss}: student', student), numerics.as_float32(f'{loss}: teacher', teacher)]
    shapes = tuple(x.shape for x in sides)
    if min(x.ndim for x in sides) < 2:
        raise ValueError(f'{loss}: student {shapes[0]} and teacher {shapes[1]} must be [batch, ...]')
    for shape in shapes:
        numerics.check_axis(loss, axis, shape)
    moved = [jnp.moveaxis(x, axis, -1) for x in sides]
    batch = moved[0].shape[0]
    if moved[1].shape[0] != batch:
        raise ValueError(f'{loss}: student {shapes[0]} and teacher {shapes[1]} must have the same number of examples')
    flat = [x.reshape(batch, -1) for x in moved]
    if where is None:
        return flat[0], flat[1], None
    where = numerics.mask(loss, where, (batch,), 0)
    return jnp.where(where[:, None], flat[0], 0.0), jnp.where(where[:, None], flat[1], 0.0), where
