"""Losses on logits: what the teacher believes about every class, compared with what the student believes.

All return one value per example, take logits `[..., classes]` (other layouts through `axis`), and need no more of the two
networks than that they agree on the classes. Classes at -inf are ruled out: where both networks rule out a class it does not
count; a class that the student alone rules out costs 1e30 times the teacher's probability, which is finite on purpose.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax.losses import numerics


def soft_targets(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    temperature: ArrayLike = 4.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Kullback-Leibler divergence of the student's softened distribution from the teacher's, per example.

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
      ValueError: the shapes differ, a dtype is not floating point, or the temperature is not positive.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[2., 0.], [1., 1.]]), jnp.array([[0., 2.], [1., 1.]])
    >>> print(soft_targets(student, teacher, temperature=1.0))
    [1.523 0.   ]

    Reference:
      Hinton, Vinyals, Dean. Distilling the Knowledge in a Neural Network. 2015. https://arxiv.org/abs/1503.02531
    """
    numerics.check_positive('soft_targets', temperature=temperature)
    where = numerics.mask('soft_targets', where, jnp.shape(student), axis)
    student, teacher = numerics.pair('soft_targets', student, teacher, axis)
    divergence = numerics.divergence(
        numerics.log_softmax(teacher, temperature, where), numerics.log_softmax(student, temperature, where), where
    )
    return jnp.square(jnp.asarray(temperature, jnp.float32)) * divergence


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
    difference = jnp.where(keep, student, 0.0) - jnp.where(keep, teacher, 0.0)
    return numerics.masked_mean(jnp.square(difference), -1, keep if where is None else keep & where)


def decoupled_kd(
    student: ArrayLike,
    teacher: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: ArrayLike = 1.0,
    beta: ArrayLike = 8.0,
    temperature: ArrayLike = 4.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Decoupled distillation: the labelled class against the rest, and the rest among themselves, per example.

    T² (α·TCKD + β·NCKD). TCKD is the divergence of the pairs [p(y), 1 - p(y)]; NCKD that of the distributions over the classes
    other than y, renormalised. `soft_targets` is TCKD + (1 - p_t(y))·NCKD: DKD frees the second term of the teacher's
    confidence. Both parts are computed in log space, where published code takes logs of differences and subtracts 1000 from
    a logit.

    Args:
      student: logits [..., classes], floating point of any precision; arithmetic is in float32.
      teacher: logits of the same shape.
      labels: integer classes y, [...]. Outside [0, classes), the value is finite but means nothing.
      alpha: weight of TCKD.
      beta: weight of NCKD. The authors warm the whole loss up with min(epoch / 20, 1).
      temperature: T > 0, a number or a traced scalar.
      axis: the class axis.
      where: boolean, broadcastable to the logits: classes to keep.

    Returns:
      float32 of shape [...], in nats, never negative for non-negative weights.

    Raises:
      ValueError: shapes or dtypes do not fit, or the temperature is not positive.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[2., 1., 0.]]), jnp.array([[3., 0., 1.]])
    >>> print(decoupled_kd(student, teacher, jnp.array([0]), temperature=1.0))
    [3.778]

    Reference:
      Zhao, Cui, Song, Qiu, Liang. Decoupled Knowledge Distillation. 2022. https://arxiv.org/abs/2203.08679
    """
    numerics.check_positive('decoupled_kd', temperature=temperature)
    where = numerics.mask('decoupled_kd', where, jnp.shape(student), axis)
    student, teacher = numerics.pair('decoupled_kd', student, teacher, axis)
    labels = numerics.check_labels('decoupled_kd', labels, student.shape[:-1])

    target = jax.nn.one_hot(labels, student.shape[-1], dtype=jnp.bool_)
    others = ~target if where is None else ~target & where

    def target_and_rest(logits: jax.Array) -> jax.Array:
        log_p = numerics.log_softmax(logits, temperature, where)
        parts = jnp.where(jnp.stack([target, others]), log_p[None], numerics.LOG_ZERO)
        return jnp.moveaxis(jax.nn.logsumexp(parts, axis=-1), 0, -1)

    def among_others(logits: jax.Array) -> jax.Array:
        return numerics.log_softmax(logits, temperature, others)

    target_class = numerics.divergence(target_and_rest(teacher), target_and_rest(student))
    non_target_class = numerics.divergence(among_others(teacher), among_others(student), others)
    alpha, beta, temperature = (jnp.asarray(x, jnp.float32) for x in (alpha, beta, temperature))
    return jnp.square(temperature) * (alpha * target_class + beta * non_target_class)
