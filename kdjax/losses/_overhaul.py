"""Losses on activations before the ReLU: AB, activation boundaries, and OFD, the overhaul of feature distillation.

Both are sums over an example, since published weights are those of sums.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kdjax import numerics
from kdjax.losses._activations import activations, per_channel
from kdjax.meshes import on_any_mesh


@on_any_mesh
def activation_boundary(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    margin: ArrayLike = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """AB: squared hinge that asks each of the student's neurons to be on where the teacher's is, off elsewhere, per example.

    Σ max(0, m - s)² where t > 0, Σ max(0, m + s)² where t <= 0, over all neurons of an example. The activations are those
    before the ReLU. The teacher counts by its sign alone, so that its gradient is zero. Published code adds up layers, each
    with half the weight of the one after it.

    Args:
      student: pre-activations [batch, ..., channels], floating point of any precision; arithmetic is in float32.
      teacher: pre-activations of the same shape.
      margin: m > 0, a number or a traced scalar.
      axis: the channel axis.
      where: boolean, broadcastable to the activations: neurons to keep.

    Returns:
      float32 [batch], in squared units of the activation; 0 where nothing is kept.

    Raises:
      ValueError: the shapes differ, there is no axis of examples, a dtype is not floating point, or the margin is not a
        positive scalar.

    >>> import jax.numpy as jnp
    >>> print(activation_boundary(jnp.array([[2., -1.], [2., -1.]]), jnp.array([[5., -5.], [-5., 5.]])))
    [ 0. 13.]

    Reference:
      Heo, Lee, Yun, Choi. Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons. 2019.
      https://arxiv.org/abs/1811.03233
    """
    numerics.check_positive('activation_boundary', margin=margin)
    student, teacher, where = activations('activation_boundary', student, teacher, axis, where)
    towards_teacher = jnp.where(jnp.isnan(teacher), jnp.nan, jnp.where(teacher > 0, student, -student))
    hinge = jnp.maximum(jnp.asarray(margin, jnp.float32) - towards_teacher, 0.0)
    return jnp.sum(jnp.square(hinge), axis=tuple(range(1, hinge.ndim)), where=where)


@on_any_mesh
def overhaul(
    student: ArrayLike, teacher: ArrayLike, margin: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None
) -> jax.Array:
    """OFD: squared difference from the teacher's activation before its ReLU, cut off below a margin, per example.

    Σ (s - t')² with t' = max(t, m), over the elements of an example, leaving out those where s <= t' <= 0: the ReLU turns
    both into 0 anyway. Published code takes the mean over the batch of this sum, and adds up layers, each with
    half the weight of the one after it.

    Args:
      student: activations before the ReLU [batch, ..., channels], after the connector, floating point of any precision;
        arithmetic is in float32.
      teacher: activations of the same shape.
      margin: m < 0, as from `overhaul_margin`: one for each channel [channels], a number, or the shape of the activations.
      axis: the channel axis.
      where: boolean, broadcastable to the activations: elements to keep.

    Returns:
      float32 [batch], in squared units of the activation; 0 where nothing is kept.

    Raises:
      ValueError: shapes or dtypes do not fit.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[3., 1., -1., -4.]]), jnp.array([[1., -5., -5., -5.]])
    >>> print(overhaul(student, teacher, jnp.full(4, -2.)))
    [14.]

    Reference:
      Heo, Kim, Yun, Park, Kwak, Choi. A Comprehensive Overhaul of Feature Distillation. 2019. https://arxiv.org/abs/1904.01866
    """
    shape = jnp.shape(student)
    student, teacher, where = activations('overhaul', student, teacher, axis, where)
    target = jnp.maximum(teacher, per_channel('overhaul', 'margin', margin, shape, axis, where))
    difference = jnp.where((student <= target) & (target <= 0), 0.0, student - target)
    return jnp.sum(jnp.square(difference), axis=tuple(range(1, difference.ndim)), where=where)


def overhaul_margin(mean: ArrayLike, standard_deviation: ArrayLike) -> jax.Array:
    """Margins for `overhaul`: the mean of what is negative in a normal distribution, for each channel.

    E[x | x < 0] = μ - σ φ(μ/σ) / Φ(-μ/σ) for x ~ N(μ, σ²). The batch normalisation before the ReLU gives μ, its bias, and σ,
    the magnitude of its scale. Where P(x < 0) is 0.001 or less it is -3σ, as in published code: the value jumps there. Where
    σ = 0 it is min(μ, 0).

    Args:
      mean: μ, of any shape, such as [channels].
      standard_deviation: σ, of the same shape; its sign does not count.

    Returns:
      float32 of that shape, never positive.

    Raises:
      ValueError: the shapes differ or a dtype is not floating point.

    >>> import jax.numpy as jnp
    >>> print(overhaul_margin(jnp.array([0., -2., 9.]), jnp.array([1., 0.1, 2.])))
    [-0.798 -2.    -6.   ]

    Reference:
      Heo, Kim, Yun, Park, Kwak, Choi. A Comprehensive Overhaul of Feature Distillation. 2019. https://arxiv.org/abs/1904.01866
    """
    mean = numerics.as_float32('overhaul_margin: mean', mean)
    deviation = jnp.abs(numerics.as_float32('overhaul_margin: standard_deviation', standard_deviation))
    if mean.shape != deviation.shape:
        raise ValueError(
            f'overhaul_margin: mean {mean.shape} and standard_deviation {deviation.shape} must have the same shape'
        )
    # Below -40 the density is 0 in float32, and above 3.09 the margin is -3σ: nothing has to be exact out there.
    ratio = jnp.clip(mean / numerics.nonzero(deviation), -40.0, 4.0)
    log_negative = jax.scipy.special.log_ndtr(-ratio)
    hazard = jnp.exp(jax.scipy.stats.norm.logpdf(ratio) - log_negative)
    margin = jnp.where(log_negative <= np.float32(np.log(1e-3)), -3 * deviation, mean - deviation * hazard)
    return jnp.where(deviation == 0, jnp.minimum(mean, 0.0), margin)
