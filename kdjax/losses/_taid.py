"""TAID, temporally adaptive interpolated distillation: a target that moves from the student to the teacher."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import numerics
from kdjax.meshes import on_any_mesh


@on_any_mesh
def taid(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    interpolation: ArrayLike,
    temperature: ArrayLike = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """TAID: divergence of the student from a target between the student itself and the teacher, per example.

    KL(softmax(m) || softmax(z_s)) with m = (1 - λ)·z_s + λ·z_t, where gradients take the student's part of m as numbers. With
    λ = 1 it is the forward divergence, with λ = 0 it is 0, and so is its gradient. `objectives.taid` moves λ during training.

    Args:
      student: logits z_s [..., classes], floating point of any precision; arithmetic is in float32.
      teacher: logits of the same shape.
      interpolation: λ in [0, 1], a number or a traced scalar.
      temperature: T > 0 of both softmaxes, a number or a traced scalar.
      axis: the class axis.
      where: boolean, broadcastable to the logits: classes to keep.

    Returns:
      float32 of shape [...], in nats, never negative; 0 where no class is kept.

    Raises:
      ValueError: the shapes differ, a dtype is not floating point, there is a single class, or a hyperparameter does not fit.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[0., 0.]]), jnp.array([[4., 0.]])
    >>> print(taid(student, teacher, interpolation=0.5), taid(student, teacher, interpolation=1.0))
    [0.328] [0.603]

    Reference:
      Shing, Misaki, Bao, Yokoi, Akiba. TAID: Temporally Adaptive Interpolated Distillation for Efficient Knowledge Transfer in
      Language Models. 2025. https://arxiv.org/abs/2501.16937
    """
    numerics.check_positive('taid', temperature=temperature)
    numerics.check_share('taid', interpolation=interpolation)
    where = numerics.mask('taid', where, jnp.shape(student), axis)
    zero = numerics.log_zero(student, teacher)
    student, teacher = numerics.pair('taid', student, teacher, axis)
    numerics.check_classes('taid', student.shape)
    share = jnp.asarray(interpolation, jnp.float32)
    # A class that one of them rules out is ruled out between them, but not where that one has no share.
    parts = [(1 - share, jax.lax.stop_gradient(student)), (share, teacher)]
    mixed = jnp.zeros(student.shape)
    for weight, z in parts:
        mixed = jnp.where(
            jnp.isneginf(z), jnp.where(weight > 0, -jnp.inf, mixed), mixed + weight * jnp.where(jnp.isneginf(z), 0.0, z)
        )
    log_m, log_s = (numerics.log_softmax(z, temperature, where, zero) for z in (mixed, student))
    return numerics.divergence(log_m, log_s, where)
