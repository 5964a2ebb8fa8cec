"""NKD, normalized distillation: cross-entropy at the labelled class, and over the others once they are renormalised."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import numerics
from kdjax.losses._labels import cross_entropy, of_labelled, prepare
from kdjax.meshes import on_any_mesh


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
    """NKD: cross-entropy at the labelled class, and that of the others once they are renormalised, per example.

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
    logits, classes, temperature = prepare('normalized_kd', student, teacher, labels, temperature, axis, where)
    log_s, log_t = (numerics.log_softmax(x, where=classes.kept, zero=classes.zero) for x in logits)
    target_class = cross_entropy(log_t, log_s, classes.target)
    log_s, log_t = (numerics.log_softmax(x, temperature, classes.others, classes.zero) for x in logits)
    other_classes = cross_entropy(log_t, log_s, classes.others)
    values = target_class + jnp.asarray(gamma, jnp.float32) * jnp.square(temperature) * other_classes
    return of_labelled(values, classes)
