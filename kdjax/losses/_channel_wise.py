"""CWD, channel-wise distillation: the divergence of the maps that say where each channel is active."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import numerics
from kdjax.losses._activations import activations, position_mask
from kdjax.meshes import on_any_mesh


@on_any_mesh
def channel_wise(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    temperature: ArrayLike = 4.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """CWD, channel-wise distillation: divergence of the maps that say where each channel is active, per example.

    T² / C · Σ_c Σ_i p_t(c, i) (log p_t(c, i) - log p_s(c, i)), with p = softmax over the positions i of f / T. The sum over
    positions and the mean over channels, as in published code.

    Args:
      student: activations [batch, height, width, channels], floating point of any precision; arithmetic is in float32.
      teacher: activations of the same shape.
      temperature: T > 0, a number or a traced scalar.
      axis: the channel axis.
      where: boolean, broadcastable to the activations with a channel axis of length 1: positions to keep.

    Returns:
      float32 [batch], in nats, never negative; 0 where no position is kept.

    Raises:
      ValueError: the shapes differ, are not images, a dtype is not floating point, or the temperature is not a positive scalar.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([2., 0.]).reshape(1, 1, 2, 1), jnp.array([0., 2.]).reshape(1, 1, 2, 1)
    >>> print(channel_wise(student, teacher, temperature=1.0))
    [1.523]

    Reference:
      Shu, Liu, Gao, Yan, Shen. Channel-wise Knowledge Distillation for Dense Prediction. 2021.
      https://arxiv.org/abs/2011.13256
    """
    numerics.check_positive('channel_wise', temperature=temperature)
    student, teacher, _ = activations('channel_wise', student, teacher, axis, None, rank=4)
    where = position_mask('channel_wise', where, student.shape[:3], axis)
    batch, height, width, channels = student.shape
    keep = None if where is None else where.reshape(batch, 1, height * width)

    def log_probabilities(features: jax.Array) -> jax.Array:
        maps = jnp.moveaxis(features, -1, 1).reshape(batch, channels, height * width)
        return numerics.log_softmax(maps, temperature, keep)

    divergences = numerics.divergence(log_probabilities(teacher), log_probabilities(student), keep)
    return jnp.square(jnp.asarray(temperature, jnp.float32)) * jnp.mean(divergences, axis=-1)
