"""MLLD, multi-level logit distillation: predictions by example, and their relations by batch and by class."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import numerics
from kdjax.meshes import on_any_mesh


@on_any_mesh
def multi_level_logits(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    temperatures: Sequence[ArrayLike] = (2.0, 3.0, 4.0, 5.0, 6.0),
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """MLLD, multi-level logit distillation: predictions, their products between examples and between classes, a scalar.

    Σ_T (T² · mean_b KL(p_t || p_s) + ‖P_t P_tᵀ - P_s P_sᵀ‖² / B + ‖P_tᵀ P_t - P_sᵀ P_s‖² / C), with the predictions
    p = softmax(z / T) of B examples over C classes as the rows of P. The authors' code takes T² in the first term alone, and
    adds the temperatures up, as here. It also sees every image in two views, of the weaker of which it multiplies these terms
    by the share of examples, or of classes, of which the teacher is less sure than of the median: about one half.

    Args:
      student: logits [..., classes], floating point of any precision; arithmetic is in float32. All axes but that of the
        classes count as examples; memory is that of examples x examples and of classes x classes numbers.
      teacher: logits of the same shape.
      temperatures: T > 0, one or more numbers or traced scalars.
      axis: the class axis.
      where: boolean, broadcastable to the logits: what to keep; examples, classes or both, as if the others had been sliced
        away. B and C are those of which anything is kept.

    Returns:
      float32 scalar, never negative; 0 where nothing is kept.

    Raises:
      ValueError: the shapes differ, a dtype is not floating point, there is a single class, there is no temperature, or one
        does not fit.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[2., 0.], [0., 2.]]), jnp.array([[4., 0.], [0., 4.]])
    >>> print(multi_level_logits(student, teacher, temperatures=[1.0]), multi_level_logits(student, student))
    0.1948326 0.0

    Reference:
      Jin, Wang, Lin. Multi-Level Logit Distillation. 2023.
      https://openaccess.thecvf.com/content/CVPR2023/html/Jin_Multi-Level_Logit_Distillation_CVPR_2023_paper.html
    """
    name = 'multi_level_logits'
    if not isinstance(temperatures, (list, tuple)) or not temperatures:
        raise ValueError(f'{name}: temperatures must be a list or a tuple of one or more, got {temperatures}')
    for temperature in temperatures:
        numerics.check_positive(name, temperature=temperature)
    where = numerics.mask(name, where, jnp.shape(student), axis)
    zero = numerics.log_zero(student, teacher)
    student, teacher = numerics.pair(name, student, teacher, axis)
    numerics.check_classes(name, student.shape)
    kept = jnp.ones(student.shape, jnp.bool_) if where is None else where
    examples, classes = (jnp.any(kept.reshape(-1, kept.shape[-1]), axis=i) for i in (1, 0))
    total = jnp.float32(0)
    for temperature in temperatures:
        log_s, log_t = (numerics.log_softmax(x, temperature, where, zero) for x in (student, teacher))
        apart = numerics.divergence(log_t, log_s, kept).reshape(-1)
        # Where nothing of an example is kept, its softmax is uniform.
        p_s, p_t = (jnp.where(kept, jnp.exp(x), 0.0).reshape(-1, x.shape[-1]) for x in (log_s, log_t))
        of_examples, of_classes = (_apart(x, y) for x, y in ((p_s, p_t), (p_s.T, p_t.T)))
        square = jnp.square(jnp.asarray(temperature, jnp.float32))
        total += square * numerics.masked_mean(apart, 0, examples)
        total += of_examples / _at_least_one(examples) + of_classes / _at_least_one(classes)
    return total


def _at_least_one(kept: jax.Array) -> jax.Array:
    return jnp.maximum(jnp.sum(kept, dtype=jnp.float32), 1.0)


def _apart(x: jax.Array, y: jax.Array) -> jax.Array:
    """‖x xᵀ - y yᵀ‖², as the product of difference and sum, of which near x = y no digits are lost."""
    difference, mean = x - y, (x + y) / 2
    half = jnp.matmul(difference, mean.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(jnp.square(half + half.T))
