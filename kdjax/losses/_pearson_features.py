"""PKD, distillation by Pearson correlation: maps compared once each channel has mean 0 and variance 1 over the batch."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import numerics
from kdjax.losses._activations import activations
from kdjax.meshes import on_any_mesh

# A channel whose largest deviation is this share of its largest magnitude is constant but for rounding.
_CONSTANT = 2.0**-20


@on_any_mesh
def pearson_features(student: ArrayLike, teacher: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None) -> jax.Array:
    """PKD: half the mean squared difference of activations that are standardized by channel, per example.

    ½ mean over all but the first axis of (ŝ - t̂)², with x̂ = (x - mean) / std of each channel over all examples and
    positions. The mean over the examples is the mean over channels of 1 - r, with r the Pearson correlation of the two
    networks' channel. The values of the examples depend on the whole batch, by way of its means and deviations.

    Published code (mmrazor, mmdetection) divides by the deviation with Bessel's correction and adds 1e-6 to it: its value is
    (n - 1) / n of ours, n the number of examples times positions. Here it is the correlation exactly, as in the paper. The
    published weight, 6, is that of each level of a detector's feature pyramid.

    Args:
      student: activations [batch, ..., channels], floating point of any precision; arithmetic is in float32.
      teacher: activations of the same shape.
      axis: the channel axis.
      where: boolean, broadcastable to the activations: elements to keep, in the means and deviations too.

    Returns:
      float32 [batch], without unit, of a mean of at most 2; 0 where nothing is kept. A channel that is constant is zero
      everywhere, with a gradient of zero.

    Raises:
      ValueError: the shapes differ, there is no axis of examples, or a dtype is not floating point.

    >>> import jax.numpy as jnp
    >>> print(pearson_features(jnp.array([[1.], [3.]]), jnp.array([[10.], [-20.]])))
    [2. 2.]

    Reference:
      Cao, Zhang, Gao, Cheng, Cheng, Zhang. PKD: General Distillation Framework for Object Detectors via Pearson Correlation
      Coefficient. 2022. https://arxiv.org/abs/2207.02039
    """
    student, teacher, where = activations('pearson_features', student, teacher, axis, where)
    difference = _standardize(student, where) - _standardize(teacher, where)
    return numerics.masked_mean(jnp.square(difference), tuple(range(1, student.ndim)), where) / 2


def _standardize(x: jax.Array, where: jax.Array | None) -> jax.Array:
    """Each channel of [..., channels] with mean 0 and variance 1 over what is kept, and zero elsewhere."""
    axes = tuple(range(x.ndim - 1))
    x = numerics.unit_scale(x, axis=axes)
    deviation = x - jnp.expand_dims(numerics.masked_mean(x, axes, where), axes)
    if where is not None:
        deviation = jnp.where(where, deviation, 0.0)
    largest = jnp.max(jnp.abs(deviation), axis=axes, keepdims=True, initial=0.0)
    deviation = jnp.where(largest <= _CONSTANT, 0.0, deviation)
    squares = jnp.square(deviation)
    variance = jnp.expand_dims(numerics.masked_mean(squares, axes, where), axes)
    return jnp.where(variance == 0, 0.0, deviation * jax.lax.rsqrt(numerics.nonzero(variance)))
