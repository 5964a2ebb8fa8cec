"""Losses on logits: what the teacher believes about every class, compared with what the student believes.

They take logits `[..., classes]` (other layouts through `axis`), and need no more of the two networks than that they agree on
the classes. They return one value per example. Classes at -inf are ruled out: where both
networks rule out a class it does not count; a class that the student alone rules out costs 1e30 times the teacher's
probability, which is finite on purpose; 1000 times where either is float16, so that gradients are finite in that dtype too.
NaN and +inf give NaN.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import numerics
from kdjax.meshes import on_any_mesh


@on_any_mesh
def soft_targets(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    temperature: ArrayLike = 4.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """KD: Kullback-Leibler divergence of the student's softened distribution from the teacher's, per example.

    T² · Σ_c p_t(c) (log p_t(c) - log p_s(c)), with p = softmax(z / T). T² keeps the size of the gradient when T changes. The
    weighted sum with hard labels is left to the caller. Some implementations drop T² (T² times smaller) or take the mean over
    classes too (as many times smaller as there are classes); this is the sum over classes, times T².

    Args:
      student: logits [..., classes], floating point of any precision; arithmetic is in float32.
      teacher: logits of the same shape.
      temperature: T > 0, a number or a traced scalar.
      axis: the class axis.
      where: boolean, broadcastable to the logits: classes to keep, as if the others had been sliced away.

    Returns:
      float32 of shape [...], in nats, never negative; 0 where no class is kept.

    Raises:
      ValueError: the shapes differ, a dtype is not floating point, there is a single class, or a hyperparameter does not fit.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[2., 0.], [1., 1.]]), jnp.array([[0., 2.], [1., 1.]])
    >>> print(soft_targets(student, teacher, temperature=1.0))
    [1.523 0.   ]

    Reference:
      Hinton, Vinyals, Dean. Distilling the Knowledge in a Neural Network. 2015. https://arxiv.org/abs/1503.02531
    """
    log_s, log_t, where = numerics.log_probabilities('soft_targets', student, teacher, temperature, axis, where)
    return jnp.square(jnp.asarray(temperature, jnp.float32)) * numerics.divergence(log_t, log_s, where)


@on_any_mesh
def logit_mse(student: ArrayLike, teacher: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None) -> jax.Array:
    """Mean squared difference of the logits, per example.

    mean_c (z_s(c) - z_t(c))². The mean over classes, not the sum: Ba and Caruana write ½ of the sum. A class at -inf on either
    side has no logit to regress to and is left out, as if it were outside `where`.

    Args:
      student: logits [..., classes], floating point of any precision; arithmetic is in float32.
      teacher: logits of the same shape.
      axis: the class axis.
      where: boolean, broadcastable to the logits: classes to keep.

    Returns:
      float32 of shape [...], in squared units of the logits; 0 where no class is kept.

    Raises:
      ValueError: the shapes differ or a dtype is not floating point.

    >>> import jax.numpy as jnp
    >>> print(logit_mse(jnp.array([[1., 2.]]), jnp.array([[3., 2.]])))
    [2.]

    Reference:
      Ba, Caruana. Do Deep Nets Really Need to be Deep? 2014. https://arxiv.org/abs/1312.6184
    """
    where = numerics.mask('logit_mse', where, jnp.shape(student), axis)
    student, teacher = numerics.pair('logit_mse', student, teacher, axis)
    keep = ~(jnp.isneginf(student) | jnp.isneginf(teacher))
    keep = keep if where is None else keep & where
    difference = jnp.where(keep, student, 0.0) - jnp.where(keep, teacher, 0.0)
    return numerics.masked_mean(jnp.square(difference), -1, keep)


@on_any_mesh
def hard_targets(student: ArrayLike, teacher: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None) -> jax.Array:
    """DeiT's hard distillation: cross-entropy with the class that the teacher would choose, per example.

    -log p_s(argmax z_t), with p = softmax(z), at temperature 1. Of equal logits the first is chosen. The choice has no
    gradient, so the teacher's side gets zeros. Not 0 at s = t.

    Args:
      student: logits [..., classes], floating point of any precision; arithmetic is in float32.
      teacher: logits of the same shape.
      axis: the class axis.
      where: boolean, broadcastable to the logits: classes to keep, for the choice too.

    Returns:
      float32 of shape [...], in nats, never negative; 0 where no class is kept.

    Raises:
      ValueError: the shapes differ, a dtype is not floating point, or there is a single class.

    >>> import jax.numpy as jnp
    >>> print(hard_targets(jnp.array([[2., 0.], [0., 0.]]), jnp.array([[1., 3.], [1., 1.]])))
    [2.127 0.693]

    Reference:
      Touvron, Cord, Douze, Massa, Sablayrolles, Jégou. Training Data-Efficient Image Transformers & Distillation through
      Attention. 2021. https://arxiv.org/abs/2012.12877
    """
    where = numerics.mask('hard_targets', where, jnp.shape(student), axis)
    student, teacher = numerics.pair('hard_targets', student, teacher, axis)
    numerics.check_classes('hard_targets', student.shape)
    log_p = numerics.log_softmax(student, where=where)
    if where is not None:
        # Below every logit that is kept, -inf too.
        teacher = jnp.where(where, jnp.where(jnp.isneginf(teacher), numerics.LOG_ZERO, teacher), -jnp.inf)
    chosen = jnp.argmax(teacher, axis=-1, keepdims=True)
    values = -jnp.take_along_axis(log_p, chosen, axis=-1)[..., 0]
    values = jnp.where(jnp.any(jnp.isnan(teacher), axis=-1), jnp.nan, values)  # of which it would choose one
    return values if where is None else jnp.where(jnp.any(where, axis=-1), values, 0.0)


@on_any_mesh
def standardize_logits(
    logits: ArrayLike, *, epsilon: float = 1e-7, axis: int = -1, where: ArrayLike | None = None
) -> jax.Array:
    """Logits with mean 0 and standard deviation 1 over the classes of each example; not a loss.

    (z - mean z) / (ε + std z), with the standard deviation of C - 1 degrees of freedom. Apply it to both networks before
    `soft_targets`: the student then learns the order and the proportions of the logits, not their size. Published with T = 2,
    a weight of 9 and 0.1 of the cross-entropy. Equal logits become zeros, with zero gradient.

    Args:
      logits: [..., classes], floating point of any precision; arithmetic is in float32.
      epsilon: ε > 0.
      axis: the class axis.
      where: boolean, broadcastable to the logits: classes to keep; the others become 0.

    Returns:
      float32 of the shape of the logits. Classes at -inf do not count and stay at -inf.

    Raises:
      ValueError: the dtype is not floating point, there is a single class, or ε is not positive.

    >>> import jax.numpy as jnp
    >>> print(jnp.round(standardize_logits(jnp.array([[1., 2., 3.], [5., 5., 5.]])), 3))
    [[-1.  0.  1.]
     [ 0.  0.  0.]]

    Reference:
      Sun, Ren, Li, Wang, Cao. Logit Standardization in Knowledge Distillation. 2024. https://arxiv.org/abs/2403.01427
    """
    numerics.check_positive('standardize_logits', epsilon=epsilon)
    where = numerics.mask('standardize_logits', where, jnp.shape(logits), axis)
    logits = numerics.as_float32('standardize_logits: logits', logits)
    numerics.check_axis('standardize_logits', axis, logits.shape)
    logits = jnp.moveaxis(logits, axis, -1)
    numerics.check_classes('standardize_logits', logits.shape)
    ruled_out = jnp.isneginf(logits) if where is None else jnp.isneginf(logits) & where
    counted = ~ruled_out if where is None else ~ruled_out & where
    centred = numerics.centred(logits, -1, counted)
    freedom = jnp.sum(counted, axis=-1, keepdims=True, dtype=jnp.float32) - 1
    deviation = numerics.root(jnp.sum(jnp.square(centred), axis=-1, keepdims=True) / jnp.maximum(freedom, 1.0))
    standardized = jnp.where(deviation == 0, 0.0, centred / (jnp.asarray(epsilon, jnp.float32) + deviation))
    return jnp.moveaxis(jnp.where(ruled_out, -jnp.inf, standardized), -1, axis)
