"""Losses on activations that do more than square the difference, behind the connectors that their papers train.

All return one value per example. Activations are [batch, ..., channels] of any rank (`factor_transfer`: images), other
layouts through `axis`, the channel axis. `vid` and `factor_transfer` are means over an example; `activation_boundary` and
`overhaul` are sums, since published weights are those of sums.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kdjax import numerics, pooling
from kdjax.losses import _features
from kdjax.meshes import on_any_mesh


@on_any_mesh
def vid(
    mean: ArrayLike, variance: ArrayLike, teacher: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None
) -> jax.Array:
    """Negative log likelihood of the teacher's activation under a normal distribution that the student predicts, per example.

    mean over all but the first axis of ½ ((μ - f_t)² / σ² + log σ²), without the constant ½ log 2π. It may be negative, and is
    lowest in σ² where σ² is the mean of (μ - f_t)². The regressor for μ and the trained σ² of each channel are
    `objectives.vid`'s. Published weight [1].

    Args:
      mean: μ, the student's prediction [batch, ..., channels], floating point of any precision; arithmetic is in float32.
      variance: σ² > 0, a number, one for each channel [channels], or the shape of the activations.
      teacher: activations of the shape of `mean`.
      axis: the channel axis.
      where: boolean, broadcastable to the activations: elements to keep.

    Returns:
      float32 [batch], in nats per element; 0 where nothing is kept.

    Raises:
      ValueError: shapes or dtypes do not fit, or a variance is not positive.

    >>> import jax.numpy as jnp
    >>> print(vid(jnp.array([[0., 2.]]), 2.0, jnp.array([[0., 0.]])))
    [0.847]

    Reference:
      Ahn, Hu, Damianou, Lawrence, Dai. Variational Information Distillation for Knowledge Transfer. 2019.
      https://arxiv.org/abs/1904.05835
    """
    numbers = numerics.known(variance)
    if numbers is not None:
        numerics.check_positive('vid', variance=np.min(numbers, initial=np.inf))
    shape = jnp.shape(mean)
    mean, teacher, where = _features.activations('vid', mean, teacher, axis, where)
    variance = _per_channel('vid', 'variance', variance, shape, axis, where)
    terms = 0.5 * (jnp.square(mean - teacher) / variance + jnp.log(variance))
    return numerics.masked_mean(terms, tuple(range(1, terms.ndim)), where)


@on_any_mesh
def factor_transfer(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    variant: Literal['paper', 'attention'] = 'paper',
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Mean absolute difference of two normalised factors, per example.

    mean |F_s / ||F_s|| - F_t / ||F_t|||, with L2 norms. `variant='paper'`: the mean is over all entries of the factors, where
    the paper writes the L1 norm, their sum; published code takes this mean, and its weight [200] is that of a mean.
    `variant='attention'`, behind published tables: of maps, F = mean_c f_c², so that channels may differ. Where sizes differ,
    the larger factor is average-pooled to the smaller. The paraphraser and the translator that make the factors are
    `objectives.factor_transfer`'s.

    Args:
      student: the student's factor [batch, height, width, channels], floating point of any precision; arithmetic is in float32.
      teacher: the teacher's factor, of the same batch size and, for `'paper'`, with as many channels.
      variant: `'paper'` or `'attention'`.
      axis: the channel axis.
      where: boolean, broadcastable to the smaller factor with a channel axis of length 1: positions to keep.

    Returns:
      float32 [batch], without unit, at most 2 / √entries; a factor that is zero stays zero; 0 where no position is kept.

    Raises:
      ValueError: shapes or dtypes do not fit, or the variant is unknown.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([3., 4.]).reshape(1, 1, 2, 1), jnp.array([0., 2.]).reshape(1, 1, 2, 1)
    >>> print(factor_transfer(student, teacher))
    [0.4]

    Reference:
      Kim, Park, Kwak. Paraphrasing Complex Network: Network Compression via Factor Transfer. 2018.
      https://arxiv.org/abs/1802.04977
    """
    if variant not in ('paper', 'attention'):
        raise ValueError(f"factor_transfer: variant must be 'paper' or 'attention', got {variant!r}")
    student, teacher, size, where = _features.images('factor_transfer', student, teacher, axis, where)
    if variant == 'paper' and student.shape[3] != teacher.shape[3]:
        raise ValueError(
            "factor_transfer: variant 'paper' needs factors with the same channels, "
            f'got {student.shape} and {teacher.shape} (channels last)'
        )
    where = None if where is None else where[..., None]

    def normalized(factor: jax.Array) -> jax.Array:
        pooled = pooling.average_pool(factor, size)
        kept = pooled if where is None else jnp.where(where, pooled, 0.0)
        if variant == 'attention':
            kept = jnp.mean(jnp.square(numerics.unit_scale(kept, axis=(1, 2, 3))), axis=3, keepdims=True)
        return numerics.l2_normalize(kept, axis=(1, 2, 3))

    return numerics.masked_mean(jnp.abs(normalized(student) - normalized(teacher)), (1, 2, 3), where)


@on_any_mesh
def activation_boundary(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    margin: ArrayLike = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Squared hinge that asks of every neuron of the student to be on where the teacher's is, and off elsewhere, per example.

    Σ max(0, m - s)² where t > 0, Σ max(0, m + s)² where t <= 0, over all neurons of an example. The activations are those
    before the ReLU. The teacher counts by its sign alone, so that its gradient is zero. Published code adds up layers with
    weights [0.003], half of that for the layer before, and so on.

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
    student, teacher, where = _features.activations('activation_boundary', student, teacher, axis, where)
    towards_teacher = jnp.where(jnp.isnan(teacher), jnp.nan, jnp.where(teacher > 0, student, -student))
    hinge = jnp.maximum(jnp.asarray(margin, jnp.float32) - towards_teacher, 0.0)
    return jnp.sum(jnp.square(hinge), axis=tuple(range(1, hinge.ndim)), where=where)


@on_any_mesh
def overhaul(
    student: ArrayLike, teacher: ArrayLike, margin: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None
) -> jax.Array:
    """Squared difference from the teacher's activation before its ReLU, cut off below a margin, per example.

    Σ (s - t')² with t' = max(t, m), over the elements of an example, leaving out those where s <= t' <= 0: the ReLU turns
    both into 0 anyway. Published weight [1e-3] of the mean over the batch of this sum, half of that for the layer before,
    and so on.

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
    student, teacher, where = _features.activations('overhaul', student, teacher, axis, where)
    target = jnp.maximum(teacher, _per_channel('overhaul', 'margin', margin, shape, axis, where))
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


def _per_channel(
    loss: str, name: str, value: ArrayLike, shape: tuple[int, ...], axis: int, where: jax.Array | None
) -> jax.Array:
    """A number, [channels] or `shape`, in float32, broadcast to `shape` with `axis` moved to the end; 1 outside `where`."""
    value = jnp.asarray(value, jnp.float32)
    if value.shape == shape:
        value = jnp.moveaxis(value, axis, -1)
    elif value.shape in ((), (shape[axis],)):
        value = jnp.broadcast_to(value, [size for i, size in enumerate(shape) if i != axis % len(shape)] + [shape[axis]])
    else:
        raise ValueError(f'{loss}: {name} {value.shape} must be a number, {(shape[axis],)} or {shape}')
    return value if where is None else jnp.where(where, value, 1.0)
