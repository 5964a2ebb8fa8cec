"""FBKD's attention: distances weighted by where and in which channels either network is active, and of the attention itself."""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import numerics
from kdjax.losses._activations import activations, position_mask
from kdjax.meshes import on_any_mesh


@on_any_mesh
def fbkd(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    guided: ArrayLike = 7e-5,
    attention: ArrayLike = 4e-3,
    temperature: ArrayLike = 0.1,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """FBKD, attention-guided distillation: distances of activations and of their attention, per example.

    guided · ||√(m_i m_c) (t - s)|| + attention · (||p_s - p_t|| + ||q_s - q_t||), all over positions i and channels c, with the
    attention p_i = mean_c |f|, of positions, and q_c = mean_i |f|, of channels, and the masks
    m_i = P softmax_i((p_s + p_t) / T), m_c = C softmax_c((q_s + q_t) / T), for P positions and C channels. No gradient flows
    through the masks, which would be lowered where the networks differ. What the paper adds to it, the distance of non-local
    relations, is trained: `objectives.fbkd`.

    This follows the paper; the code of the authors, as mmrazor and others have it, takes the mean of two softmaxes for that of
    the sum, leaves out the mask of channels, which some copies have again, compares the means of f, not |f|, behind a
    convolution and a dense layer of their own, and takes each norm over the whole batch. The weights are published for every
    level of a detector's feature pyramid; copies for detectors of one stage have them six times as large, and temperatures of
    0.1 and 0.5.

    Args:
      student: activations [batch, height, width, channels], floating point of any precision; arithmetic is in float32.
      teacher: activations of the same shape.
      guided: weight of the distance of activations.
      attention: weight of the distances of attention.
      temperature: T > 0 of the masks.
      axis: the channel axis.
      where: boolean, broadcastable to the activations with a channel axis of length 1: positions to keep.

    Returns:
      float32 [batch], in units of the activation, never negative; 0 where no position is kept, and where the two are equal,
      with a gradient of zero.

    Raises:
      ValueError: the shapes differ, are not images, a dtype is not floating point, a weight is not a scalar, or the temperature
        is not a positive scalar.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([1., 0.]).reshape(1, 1, 2, 1), jnp.array([1., 2.]).reshape(1, 1, 2, 1)
    >>> print(fbkd(student, teacher, guided=1.0, attention=0.0), fbkd(student, teacher, guided=0.0, attention=1.0))
    [2.] [3.]

    Reference:
      Zhang, Ma. Improve Object Detection with Feature-based Knowledge Distillation: Towards Accurate and Efficient Detectors.
      2021. https://openreview.net/forum?id=uKhGRvM8QNH
    """
    numerics.check_scalars('fbkd', guided=guided, attention=attention)
    numerics.check_positive('fbkd', temperature=temperature)
    student, teacher, _ = activations('fbkd', student, teacher, axis, None, rank=4)
    where = position_mask('fbkd', where, student.shape[:3], axis)
    batch, height, width, channels = student.shape
    keep = None if where is None else where.reshape(batch, height * width)
    sides = [x.reshape(batch, height * width, channels) for x in (student, teacher)]
    if keep is not None:
        sides = [jnp.where(keep[:, :, None], x, 0.0) for x in sides]
    student, teacher = sides
    positions = [jnp.mean(jnp.abs(x), axis=2) for x in sides]
    kept = None if keep is None else keep[:, :, None]
    of_channels = [numerics.masked_mean(jnp.abs(x), 1, kept) for x in sides]
    count = jnp.float32(height * width) if keep is None else jnp.sum(keep, axis=1, keepdims=True, dtype=jnp.float32)
    over_positions = count * jnp.exp(numerics.log_softmax(positions[0] + positions[1], temperature, keep))
    over_channels = channels * jnp.exp(numerics.log_softmax(of_channels[0] + of_channels[1], temperature))
    mask = jax.lax.stop_gradient(over_positions[:, :, None] * over_channels[:, None, :])
    distance = _norm(jnp.sqrt(mask) * (teacher - student))
    attended = _norm(positions[0] - positions[1]) + _norm(of_channels[0] - of_channels[1])
    return jnp.asarray(guided, jnp.float32) * distance + jnp.asarray(attention, jnp.float32) * attended


def _norm(x: jax.Array) -> jax.Array:
    """||x|| over all but the first axis, with a gradient of zero at zero."""
    x = x.reshape(x.shape[0], math.prod(x.shape[1:]))
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=1, keepdims=True, initial=0.0))
    scaled = x / numerics.nonzero(largest)
    return largest[:, 0] * numerics.root(jnp.sum(jnp.square(scaled), axis=1))
