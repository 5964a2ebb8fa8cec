"""DKD, decoupled distillation: the labelled class and the others, each with a weight of its own."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import numerics
from kdjax.losses._labels import of_labelled, prepare
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
    """DKD, decoupled distillation: the labelled class against the rest, and the rest among themselves, per example.

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
    logits, classes, temperature = prepare('decoupled_kd', student, teacher, labels, temperature, axis, where)

    def target_and_rest(logits: jax.Array) -> jax.Array:
        log_p = numerics.log_softmax(logits, temperature, classes.kept, classes.zero)
        parts = jnp.where(jnp.stack([classes.target, classes.others]), log_p[None], numerics.LOG_ZERO)
        return jnp.moveaxis(jax.nn.logsumexp(parts, axis=-1), 0, -1)

    log_s, log_t = (numerics.log_softmax(x, temperature, classes.others, classes.zero) for x in logits)
    target_class = numerics.divergence(*(target_and_rest(x) for x in logits[::-1]))
    non_target_class = numerics.divergence(log_t, log_s, classes.others)
    alpha, beta = (jnp.asarray(x, jnp.float32) for x in (alpha, beta))
    return of_labelled(jnp.square(temperature) * (alpha * target_class + beta * non_target_class), classes)
