"""Losses on logits that need labels: what the teacher says of the labelled class, and what of the others.

All return one value per example and take logits `[..., classes]` and integer labels `[...]`. An example with a negative label
has none: it costs exactly 0 and teaches nothing, whatever its logits. A label beyond the classes is an error where it is known,
and NaN where it is traced.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import numerics
from kdjax.meshes import on_any_mesh


@on_any_mesh
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
      labels: integer classes y, [...]; negative for examples that have none.
      alpha: weight of TCKD.
      beta: weight of NCKD. The authors warm the whole loss up with min(epoch / 20, 1).
      temperature: T > 0, a number or a traced scalar.
      axis: the class axis.
      where: boolean, broadcastable to the logits: classes to keep.

    Returns:
      float32 of shape [...], in nats, never negative for non-negative weights; 0 where there is no label.

    Raises:
      ValueError: shapes or dtypes do not fit, there is a single class, a label is beyond the classes, or a hyperparameter does
        not fit.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[2., 1., 0.]]), jnp.array([[3., 0., 1.]])
    >>> print(decoupled_kd(student, teacher, jnp.array([0]), temperature=1.0))
    [3.778]

    Reference:
      Zhao, Cui, Song, Qiu, Liang. Decoupled Knowledge Distillation. 2022. https://arxiv.org/abs/2203.08679
    """
    numerics.check_scalars('decoupled_kd', alpha=alpha, beta=beta)
    logits, classes, temperature = _prepare('decoupled_kd', student, teacher, labels, temperature, axis, where)

    def target_and_rest(logits: jax.Array) -> jax.Array:
        log_p = numerics.log_softmax(logits, temperature, classes.kept, classes.zero)
        parts = jnp.where(jnp.stack([classes.target, classes.others]), log_p[None], numerics.LOG_ZERO)
        return jnp.moveaxis(jax.nn.logsumexp(parts, axis=-1), 0, -1)

    log_s, log_t = (numerics.log_softmax(x, temperature, classes.others, classes.zero) for x in logits)
    target_class = numerics.divergence(*(target_and_rest(x) for x in logits[::-1]))
    non_target_class = numerics.divergence(log_t, log_s, classes.others)
    alpha, beta = (jnp.asarray(x, jnp.float32) for x in (alpha, beta))
    return _of_labelled(jnp.square(temperature) * (alpha * target_class + beta * non_target_class), classes)


@on_any_mesh
def normalized_kd(
    student: ArrayLike,
    teacher: ArrayLike,
    labels: ArrayLike,
    *,
    gamma: ArrayLike = 1.5,
    temperature: ArrayLike = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Cross-entropy at the labelled class, and that of the others once they are renormalised, per example.

    -p_t(y) log p_s(y) at temperature 1, plus γ·T² times -Σ_{c≠y} q_t(c) log q_s(c), where q is the softmax of z / T over the
    classes other than y. Both are cross-entropies: at s = t the value is not zero, and neither is the gradient, since the
    first term asks for p_s(y) = 1. As in the published code, the sum over the others is not divided by their number.

    Args:
      student: logits [..., classes], floating point of any precision; arithmetic is in float32.
      teacher: logits of the same shape.
      labels: integer classes y, [...]; negative for examples that have none.
      gamma: weight of the other classes.
      temperature: T > 0 for the other classes, a number or a traced scalar.
      axis: the class axis.
      where: boolean, broadcastable to the logits: classes to keep.

    Returns:
      float32 of shape [...], in nats, never negative for γ >= 0; 0 where no class is kept or there is no label.

    Raises:
      ValueError: shapes or dtypes do not fit, there is a single class, a label is beyond the classes, or a hyperparameter does
        not fit.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[2., 1., 0.]]), jnp.array([[3., 0., 1.]])
    >>> print(normalized_kd(student, teacher, jnp.array([0])))
    [1.910]

    Reference:
      Yang, Zeng, Li, Zhang, Yuan, Li. From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with
      Normalized Loss and Customized Soft Labels. 2023. https://arxiv.org/abs/2303.13005
    """
    numerics.check_scalars('normalized_kd', gamma=gamma)
    logits, classes, temperature = _prepare('normalized_kd', student, teacher, labels, temperature, axis, where)
    log_s, log_t = (numerics.log_softmax(x, where=classes.kept, zero=classes.zero) for x in logits)
    target_class = _cross_entropy(log_t, log_s, classes.target)
    log_s, log_t = (numerics.log_softmax(x, temperature, classes.others, classes.zero) for x in logits)
    other_classes = _cross_entropy(log_t, log_s, classes.others)
    values = target_class + jnp.asarray(gamma, jnp.float32) * jnp.square(temperature) * other_classes
    return _of_labelled(values, classes)


@on_any_mesh
def weighted_soft_labels(
    student: ArrayLike,
    teacher: ArrayLike,
    labels: ArrayLike,
    *,
    temperature: ArrayLike = 2.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Cross-entropy with the teacher's soft labels, less where the student already beats the teacher, per example.

    T² · w · (-Σ_c p_t(c) log p_s(c)), with p = softmax(z / T) and w = 1 - exp(-CE_s / (CE_t + 1e-7)), where CE is the
    cross-entropy of each network with the label at temperature 1. The weight is a constant for gradients. A cross-entropy: at
    s = t the value is not zero, but the gradient of the student is.

    Args:
      student: logits [..., classes], floating point of any precision; arithmetic is in float32.
      teacher: logits of the same shape.
      labels: integer classes y, [...]; negative for examples that have none.
      temperature: T > 0 of the soft labels, a number or a traced scalar.
      axis: the class axis.
      where: boolean, broadcastable to the logits: classes to keep.

    Returns:
      float32 of shape [...], in nats, never negative; 0 where no class is kept or there is no label.

    Raises:
      ValueError: shapes or dtypes do not fit, there is a single class, a label is beyond the classes, or a hyperparameter does
        not fit.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[2., 1., 0.]]), jnp.array([[3., 0., 1.]])
    >>> print(weighted_soft_labels(student, teacher, jnp.array([0])))
    [3.570]

    Reference:
      Zhou, Song, Chen, Zhou, Wang, Yuan, Zhang. Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff
      Perspective. 2021. https://arxiv.org/abs/2102.00650
    """
    logits, classes, temperature = _prepare('weighted_soft_labels', student, teacher, labels, temperature, axis, where)
    of_label = [-jnp.sum(numerics.log_softmax(x, where=classes.kept), axis=-1, where=classes.target) for x in logits]
    weight = jax.lax.stop_gradient(-jnp.expm1(-of_label[0] / (of_label[1] + 1e-7)))
    log_s, log_t = (numerics.log_softmax(x, temperature, classes.kept, classes.zero) for x in logits)
    return _of_labelled(jnp.square(temperature) * weight * _cross_entropy(log_t, log_s, classes.kept), classes)


class _Classes(NamedTuple):
    """Masks of the shape of the logits: the labelled class, those other than it, and all, of those that are kept.

    With the labels, and the log probability of classes at -inf.
    """

    target: jax.Array
    others: jax.Array
    kept: jax.Array
    labels: jax.Array
    zero: float


def _prepare(
    loss: str,
    student: ArrayLike,
    teacher: ArrayLike,
    labels: ArrayLike,
    temperature: ArrayLike,
    axis: int,
    where: ArrayLike | None,
) -> tuple[tuple[jax.Array, ...], _Classes, jax.Array]:
    """Checks the arguments; returns both logits, what there is to know of the classes, and the temperature in float32."""
    numerics.check_positive(loss, temperature=temperature)
    where = numerics.mask(loss, where, jnp.shape(student), axis)
    zero = numerics.log_zero(student, teacher)
    student, teacher = numerics.pair(loss, student, teacher, axis)
    numerics.check_classes(loss, student.shape)
    labels = numerics.check_labels(loss, labels, student.shape[:-1], student.shape[-1])
    logits = tuple(jnp.where(labels[..., None] < 0, 0.0, x) for x in (student, teacher))
    target = jax.nn.one_hot(labels, student.shape[-1], dtype=jnp.bool_)
    kept = jnp.ones(student.shape, jnp.bool_) if where is None else where
    return logits, _Classes(target & kept, ~target & kept, kept, labels, zero), jnp.asarray(temperature, jnp.float32)


def _of_labelled(values: jax.Array, classes: _Classes) -> jax.Array:
    return numerics.of_labelled(values, classes.labels, classes.kept.shape[-1])


def _cross_entropy(log_p: jax.Array, log_q: jax.Array, where: jax.Array) -> jax.Array:
    """-Σ p log q over the classes that are kept."""
    return -jnp.sum(jnp.exp(log_p) * log_q, axis=-1, where=where)
