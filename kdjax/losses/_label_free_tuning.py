"""MFT, minifinetuning: soft targets that are moved toward the label just as far as it takes."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import numerics
from kdjax.losses._labels import of_labelled, prepare
from kdjax.meshes import on_any_mesh


@on_any_mesh
def label_free_tuning(
    student: ArrayLike,
    teacher: ArrayLike,
    labels: ArrayLike,
    *,
    threshold: ArrayLike = 0.2,
    temperature: ArrayLike = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """MFT, minifinetuning: divergence from the teacher's distribution, corrected toward the label by a threshold, per example.

    T² · KL(q || p_s) with q = (1 - m)·p_t + m·e_y. The label y shall lead by τ: with the gap g = p_t(y) - max_{c≠y} p_t(c), the
    share m = max(0, (τ - g) / (1 - g)) is the least that gives q a gap of τ. A model that tunes itself on new data, with what
    it was as its teacher, so forgets little, and needs no data of old. Where the teacher's likeliest class is wrong, this is
    the public code; where it is right by less than τ, that code raises p(y) by τ, and so the gap by more than the paper's τ.
    m is part of the teacher's side, and gradients go through it; an objective stops them.

    Args:
      student: logits [..., classes], floating point of any precision; arithmetic is in float32.
      teacher: logits of the same shape.
      labels: integer classes y, [...]; negative for examples that have none.
      threshold: τ in [0, 1], by how much the label leads.
      temperature: T > 0 of both softmaxes, a number or a traced scalar.
      axis: the class axis.
      where: boolean, broadcastable to the logits: classes to keep.

    Returns:
      float32 of shape [...], in nats, never negative; 0 where there is no label.

    Raises:
      ValueError: shapes or dtypes do not fit, there is a single class, a label is beyond the classes, or a hyperparameter does
        not fit.

    >>> import jax.numpy as jnp
    >>> even, label = jnp.array([[0., 0.]]), jnp.array([0])
    >>> print(label_free_tuning(even, even, label), label_free_tuning(even, even, label, threshold=0.0))
    [0.02] [0.]

    Reference:
      Belcak, Heinrich, Kautz, Molchanov. Minifinetuning: Low-Data Generation Domain Adaptation through Corrective
      Self-Distillation. 2025. https://arxiv.org/abs/2506.15702
    """
    numerics.check_share('label_free_tuning', threshold=threshold)
    logits, classes, temperature = prepare('label_free_tuning', student, teacher, labels, temperature, axis, where)
    log_s, log_t = (numerics.log_softmax(x, temperature, classes.kept, classes.zero) for x in logits)
    p_t, threshold = jnp.exp(log_t), jnp.asarray(threshold, jnp.float32)
    of_label = jnp.sum(p_t, axis=-1, where=classes.target)
    gap = of_label - jnp.max(p_t, axis=-1, where=classes.others, initial=0.0)
    # There is something to correct where a label that is kept does not lead by as much.
    corrected = (gap < threshold) & jnp.any(classes.target, axis=-1)
    room = jnp.where(corrected, 1 - gap, 1.0)
    share, rest = (threshold - gap) / room, (1 - threshold) / room
    log_share, log_rest = (_log(jnp.where(corrected, x, 1.0), classes.zero)[..., None] for x in (share, rest))
    moved = log_t + log_rest
    moved = jnp.where(classes.target, jnp.logaddexp(moved, log_share), moved)
    log_q = jnp.where(corrected[..., None], moved, log_t)
    return of_labelled(jnp.square(temperature) * numerics.divergence(log_q, log_s, classes.kept), classes)


def _log(x: jax.Array, zero: float) -> jax.Array:
    """Log x, with what stands for log 0."""
    return jnp.where(x == 0, zero, jnp.log(numerics.nonzero(x)))
