"""CC, correlation congruence: the difference of two kernel matrices over a batch."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import numerics
from kdjax.losses._embeddings import count, embeddings
from kdjax.meshes import on_any_mesh


@on_any_mesh
def correlation_congruence(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    gamma: ArrayLike = 0.4,
    order: int = 2,
    variant: Literal['kernel', 'adjacent'] = 'kernel',
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """CC, correlation congruence: squared difference of both networks' kernel matrices over the batch, a scalar.

    Σ_ij (k_t - k_s)² / B², with k(x, y) = e^(-2γ) Σ_p (2γ)^p / p! ⟨x, y⟩^p for p = 0 ... order, after each embedding has been
    divided by its L2 norm. Only then are these the first terms of the kernel exp(-γ ||x - y||²); some code leaves that out.

    `variant='adjacent'`, another loss under the same name in much published code: the mean over i of Σ_d δ_i δ_{i+1}, with
    δ = |f_s - f_t| for embeddings of the same width as they come, i = 1 ... B - 1. It depends on the order of the examples.

    Args:
      student: embeddings [batch, ..., channels], floating point of any precision; arithmetic is in float32.
      teacher: embeddings with the same batch size; the other sizes may differ for `'kernel'`.
      gamma: γ > 0, a number or a traced scalar, for `'kernel'`.
      order: the highest power of the inner product, at least 1, for `'kernel'`.
      variant: `'kernel'` or `'adjacent'`.
      axis: the channel axis.
      where: boolean [batch] or [batch, positions]: what to keep. Examples of which nothing is kept are as if sliced away.

    Returns:
      float32 scalar, without unit for `'kernel'` and in squared units of the embedding for `'adjacent'`; 0 where no example,
      or no two adjacent ones, are kept.

    Raises:
      ValueError: shapes or dtypes do not fit, or a hyperparameter is out of range.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[1., 0.], [0., 1.]]), jnp.array([[1., 0.], [1., 0.]])
    >>> print(correlation_congruence(student, teacher), correlation_congruence(student, teacher, variant='adjacent'))
    0.127 0.0

    Reference:
      Peng, Jin, Liu, Zhou, Wu, Liu, Zhou, Zhang. Correlation Congruence for Knowledge Distillation. 2019.
      https://arxiv.org/abs/1904.01802
    """
    numerics.check_positive('correlation_congruence', gamma=gamma, order=order)
    if variant not in ('kernel', 'adjacent'):
        raise ValueError(f"correlation_congruence: variant must be 'kernel' or 'adjacent', got {variant!r}")
    shapes = jnp.shape(student), jnp.shape(teacher)
    student, teacher, where = embeddings('correlation_congruence', student, teacher, axis, where)
    if variant == 'adjacent':
        if student.shape != teacher.shape:
            raise ValueError(
                f'correlation_congruence: student {shapes[0]} and teacher {shapes[1]} must have the same width for '
                "variant='adjacent'"
            )
        return _adjacent_products(jnp.abs(student - teacher), where)
    scale = 2 * jnp.asarray(gamma, jnp.float32)

    def kernel(x: jax.Array) -> jax.Array:
        x = numerics.l2_normalize(x, axis=1)
        products = scale * jnp.matmul(x, x.T, precision=jax.lax.Precision.HIGHEST)
        series = jnp.ones_like(products)
        for power in range(order, 0, -1):
            series = 1 + products * series / power
        return jnp.exp(-scale) * series

    return jnp.sum(jnp.square(kernel(teacher) - kernel(student))) / count(student, where) ** 2


def _adjacent_products(differences: jax.Array, where: jax.Array | None) -> jax.Array:
    """The mean over neighbouring examples, among those kept, of the inner products of their differences."""
    if where is None:
        where = jnp.ones(differences.shape[0], jnp.bool_)
    # Brings those that are kept to the front, in their order.
    order = jnp.argsort(~where, stable=True)
    differences, where = differences[order], where[order]
    return numerics.masked_mean(jnp.sum(differences[:-1] * differences[1:], axis=1), 0, where[1:])
