"""WSLD, weighted soft labels: soft targets that count less where the student already beats the teacher."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import numerics
from kdjax.losses._labels import cross_entropy, of_labelled, prepare
from kdjax.meshes import on_any_mesh


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
    """WSLD: soft labels' cross-entropy, less where the student already beats the teacher, per example.

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
    logits, classes, temperature = prepare('weighted_soft_labels', student, teacher, labels, temperature, axis, where)
    of_label = [-jnp.sum(numerics.log_softmax(x, where=classes.kept), axis=-1, where=classes.target) for x in logits]
    weight = jax.lax.stop_gradient(-jnp.expm1(-of_label[0] / (of_label[1] + 1e-7)))
    log_s, log_t = (numerics.log_softmax(x, temperature, classes.kept, classes.zero) for x in logits)
    return of_labelled(jnp.square(temperature) * weight * cross_entropy(log_t, log_s, classes.kept), classes)
