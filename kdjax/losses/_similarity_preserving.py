"""SP, similarity-preserving distillation: which examples of a batch each network finds alike."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import numerics
from kdjax.losses._embeddings import count, embeddings
from kdjax.meshes import on_any_mesh


@on_any_mesh
def similarity_preserving(
    student: ArrayLike, teacher: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None
) -> jax.Array:
    """SP: squared difference of the two networks' similarity matrices over the batch, a scalar.

    Σ_ij (G_t - G_s)²_ij / B², with G = F Fᵀ for the flattened activations F [B, D], each row of G divided by its L2 norm
    (the L2 norm, where some implementations take L1).

    Args:
      student: activations [batch, ..., channels], floating point of any precision; arithmetic is in float32.
      teacher: activations with the same batch size; the other sizes may differ.
      axis: the channel axis.
      where: boolean [batch] or [batch, positions]: what to keep. Examples of which nothing is kept are as if sliced away.

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

    return jnp.sum(jnp.square(similarities(teacher) - similarities(student))) / count(student, where) ** 2
