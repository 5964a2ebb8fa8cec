"""InfoNCE: telling an example's other embedding from those of the rest of the batch."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import numerics
from kdjax.losses._embeddings import count, unit_embeddings
from kdjax.meshes import on_any_mesh


@on_any_mesh
def info_nce(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    temperature: ArrayLike = 0.07,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """InfoNCE: cross-entropy of finding each example's other embedding among those of the batch, a scalar.

    The mean over examples and both directions: -½ Σ_i (log softmax_j(⟨s_i, t_j⟩ / T)_i + log softmax_j(⟨t_i, s_j⟩ / T)_i) / B,
    with s and t of L2 norm 1. Some code has the first direction only. Not zero where both networks agree, unless T goes to 0.

    Args:
      student: embeddings [batch, ..., channels], floating point of any precision; arithmetic is in float32.
      teacher: embeddings of the same width.
      temperature: T > 0, a number or a traced scalar, which may be trained.
      axis: the channel axis.
      where: boolean [batch] or [batch, positions]: what to keep; positions outside, the first axes of embeddings with channels
        last, are zero, and examples of which nothing is kept are as if sliced away.

    Returns:
      float32 scalar, in nats, never negative; 0 for one example, or where none is kept.

    Raises:
      ValueError: shapes or dtypes do not fit, or the temperature is not a positive scalar.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[1., 0.], [0., 1.]]), jnp.array([[3., 0.], [0., 4.]])
    >>> print(info_nce(student, teacher, temperature=1.0), info_nce(student, teacher[::-1], temperature=1.0))
    0.313 1.313

    Reference:
      Oord, Li, Vinyals. Representation Learning with Contrastive Predictive Coding. 2018. https://arxiv.org/abs/1807.03748
    """
    numerics.check_positive('info_nce', temperature=temperature)
    student, teacher, where = unit_embeddings('info_nce', student, teacher, axis, where)
    similarities = jnp.matmul(student, teacher.T, precision=jax.lax.Precision.HIGHEST)

    def own(logits: jax.Array) -> jax.Array:
        return jnp.diagonal(numerics.log_softmax(logits, temperature, None if where is None else where[None]))

    return -jnp.sum((own(similarities) + own(similarities.T)) / 2, where=where) / count(student, where)
