"""Losses on the activations between input and logits: the student is shown what the teacher sees on the way.

All return one value per example. Features are images [batch, height, width, channels] or, for `hint`, arrays of any rank; other
layouts through `axis`, the channel axis. After that axis has been moved to the end, the first axis runs over the examples.
An example of which anything that is kept is NaN or infinite costs NaN.
Where the two networks have different widths, `kdjax.objectives` adds the connector that the paper trains.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import numerics, pooling
from kdjax.meshes import on_any_mesh


@on_any_mesh
def hint(student: ArrayLike, teacher: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None) -> jax.Array:
    """Mean squared difference of two activations of the same shape, per example.

    mean over all but the first axis of (f_s - f_t)². The regressor that brings the student's activation to the teacher's
    shape is `objectives.hint`'s. The paper writes ½ of the sum; the mean, as in most implementations, does not grow with
    the size.

    Args:
      student: activations [batch, ..., channels], floating point of any precision; arithmetic is in float32.
      teacher: activations of the same shape.
      axis: the channel axis.
      where: boolean, broadcastable to the activations: elements to keep.

    Returns:
      float32 [batch], in squared units of the activation; 0 where nothing is kept.

    Raises:
      ValueError: the shapes differ, there is no axis of examples, or a dtype is not floating point.

    >>> import jax.numpy as jnp
    >>> print(hint(jnp.array([[1., 2.], [0., 0.]]), jnp.array([[1., 4.], [0., 0.]])))
    [2. 0.]

    Reference:
      Romero, Ballas, Kahou, Chassang, Gatta, Bengio. FitNets: Hints for Thin Deep Nets. 2015. https://arxiv.org/abs/1412.6550
    """
    student, teacher, where = activations('hint', student, teacher, axis, where)
    return numerics.masked_mean(jnp.square(student - teacher), tuple(range(1, student.ndim)), where)


@on_any_mesh
def masked_generation(student: ArrayLike, teacher: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None) -> jax.Array:
    """Mean squared difference of what was generated from a masked activation and the teacher's activation, per example.

    mean over all but the first axis of (g - f_t)². The random mask of positions and the generator of convolutions that
    makes g from the student's masked activation are `objectives.masked_generation`'s. Published code takes the sum over
    an example, [2e-5] for detection and [7e-5] for classification; for this mean, multiply these weights by
    height · width · channels.

    Args:
      student: the generated activations [batch, ..., channels], floating point of any precision; arithmetic is in float32.
      teacher: activations of the same shape.
      axis: the channel axis.
      where: boolean, broadcastable to the activations: elements to keep. The paper keeps all, masked before or not.

    Returns:
      float32 [batch], in squared units of the activation; 0 where nothing is kept.

    Raises:
      ValueError: the shapes differ, there is no axis of examples, or a dtype is not floating point.

    >>> import jax.numpy as jnp
    >>> print(masked_generation(jnp.array([[1., 2.], [0., 0.]]), jnp.array([[1., 4.], [0., 1.]])))
    [2.  0.5]

    Reference:
      Yang, Li, Shao, Shi, Yuan, Yuan. Masked Generative Distillation. 2022. https://arxiv.org/abs/2205.01529
    """
    student, teacher, where = activations('masked_generation', student, teacher, axis, where)
    return numerics.masked_mean(jnp.square(student - teacher), tuple(range(1, student.ndim)), where)


@on_any_mesh
def attention_transfer(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    power: float = 2,
    variant: Literal['mean_square', 'norm'] = 'mean_square',
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Difference of the maps that say where each network is active, per example.

    Q = vec(mean_c |f_c|^p) / ||vec(mean_c |f_c|^p)||. `variant='mean_square'`, behind published tables with weight 1000:
    the mean over positions of (Q_s - Q_t)². `variant='norm'`, the paper's: ||Q_s - Q_t||. Channel counts may differ. Where
    sizes differ, the map of the larger is average-pooled to the smaller before it is normalised.

    Args:
      student: activations [batch, height, width, channels], floating point of any precision; arithmetic is in float32.
      teacher: activations of the same rank and batch size.
      power: p > 0.
      variant: `'mean_square'` or `'norm'`.
      axis: the channel axis.
      where: boolean, broadcastable to the smaller activation with a channel axis of length 1: positions to keep.

    Returns:
      float32 [batch], without unit: at most 4 / positions for `'mean_square'`, at most 2 for `'norm'`. An activation that
      is zero everywhere has a map of zeros.

    Raises:
      ValueError: shapes or dtypes do not fit, the power is not a positive scalar, or the variant is unknown.

    >>> import jax.numpy as jnp
    >>> student = jnp.array([1., 0., 0., 0.]).reshape(1, 2, 2, 1)
    >>> teacher = jnp.array([0., 0., 0., 5.]).reshape(1, 2, 2, 1)
    >>> print(attention_transfer(student, teacher), attention_transfer(student, teacher, variant='norm'))
    [0.5] [1.414]

    Reference:
      Zagoruyko, Komodakis. Paying More Attention to Attention: Improving the Performance of Convolutional Neural Networks via
      Attention Transfer. 2017. https://arxiv.org/abs/1612.03928
    """
    numerics.check_positive('attention_transfer', power=power)
    if variant not in ('mean_square', 'norm'):
        raise ValueError(f"attention_transfer: variant must be 'mean_square' or 'norm', got {variant!r}")
    student, teacher, size, where = images('attention_transfer', student, teacher, axis, where)

    def attention(features: jax.Array) -> jax.Array:
        magnitude = jnp.abs(numerics.unit_scale(features, axis=(1, 2, 3)))
        # |f|^p has an infinite or undefined derivative at 0 for p < 2, where the convention is 0.
        powered = jnp.where(magnitude == 0, 0.0, numerics.nonzero(magnitude) ** jnp.asarray(power, jnp.float32))
        pooled = pooling.average_pool(jnp.mean(powered, axis=-1), size)
        return numerics.l2_normalize(pooled if where is None else jnp.where(where, pooled, 0.0), axis=(1, 2))

    squares = jnp.square(attention(student) - attention(teacher))
    if variant == 'mean_square':
        return numerics.masked_mean(squares, (1, 2), where)
    return numerics.root(jnp.sum(squares, axis=(1, 2)))


@on_any_mesh
def hierarchical_context(
    student: ArrayLike, teacher: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None
) -> jax.Array:
    """Mean squared differences of two activations at several resolutions, per example.

    Σ_l w_l · mean (pool_l(f_s) - pool_l(f_t))² / Σ_l w_l. Full size has weight 1. Average pools to 4x4, 2x2 and 1x1 follow,
    but only those smaller than the height, and each has half the weight of the one before: ½, ¼, ⅛ from height 5 on, and
    ½, ¼ for the pools of a 4x4 map. The fusion of the student's layers is `objectives.hierarchical_context`'s.

    Args:
      student: activations [batch, height, width, channels], floating point of any precision; arithmetic is in float32.
      teacher: activations of the same shape.
      axis: the channel axis.
      where: boolean, broadcastable to the activations: elements to keep. A pooled value is the mean of what is kept in its
        window; where that is nothing, it does not count.

    Returns:
      float32 [batch], in squared units of the activation; 0 where nothing is kept.

    Raises:
      ValueError: the shapes differ, are not images, or a dtype is not floating point.

    >>> import jax.numpy as jnp
    >>> student = jnp.array([2., 0., 0., 0.]).reshape(1, 2, 2, 1)
    >>> print(hierarchical_context(student, jnp.zeros((1, 2, 2, 1))))
    [0.75]

    Reference:
      Chen, Liu, Zhao, Jia. Distilling Knowledge via Knowledge Review. 2021. https://arxiv.org/abs/2104.09044
    """
    student, teacher, where = activations('hierarchical_context', student, teacher, axis, where, rank=4)
    # Pooling is linear: the difference of two pooled maps is the pooled difference.
    difference = student - teacher
    total = numerics.masked_mean(jnp.square(difference), (1, 2, 3), where)
    weight = weights = 1.0
    for side in (4, 2, 1):
        if side >= student.shape[1]:
            continue
        weight /= 2
        weights += weight
        pooled, kept = pooling.average_pool(difference, (side, side)), where
        if where is not None:
            share = pooling.average_pool(where.astype(jnp.float32), (side, side))
            kept = share > 0
            pooled = pooled / jnp.where(kept, share, 1.0)
        total += weight * numerics.masked_mean(jnp.square(pooled), (1, 2, 3), kept)
    return total / weights


@on_any_mesh
def channel_wise(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    temperature: ArrayLike = 4.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Divergence of the maps that say where each channel is active, per example.

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


def activations(
    loss: str, student: ArrayLike, teacher: ArrayLike, axis: int, where: ArrayLike | None, *, rank: int | None = None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Two activations of one shape in float32 with channels last, zero outside `where`, and `where` broadcast to them."""
    where = numerics.mask(loss, where, jnp.shape(student), axis)
    student, teacher = numerics.pair(loss, student, teacher, axis)
    if rank is None and student.ndim < 2:
        raise ValueError(f'{loss}: activations must be [batch, ..., channels], got {student.shape}')
    if rank is not None and student.ndim != rank:
        raise ValueError(f'{loss}: activations must be [batch, height, width, channels], got {student.shape}')
    student, teacher = (numerics.finite_or_nan(x) for x in (student, teacher))
    if where is None:
        return student, teacher, None
    return jnp.where(where, student, 0.0), jnp.where(where, teacher, 0.0), where


def images(
    loss: str, student: ArrayLike, teacher: ArrayLike, axis: int, where: ArrayLike | None
) -> tuple[jax.Array, jax.Array, tuple[int, int], jax.Array | None]:
    """Two activations in float32 with channels last, the smaller of their sizes, and `where` over the positions of that.

    What reaches no kept position by way of `average_pool` is zero.
    """
    student, teacher = numerics.pair(loss, student, teacher, axis, same_shape=False)
    if student.ndim != 4 or student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f'{loss}: student and teacher must be [batch, height, width, channels] with the same batch, '
            f'got {student.shape} and {teacher.shape} (channels last)'
        )
    size = smaller_size(student, teacher)
    where = position_mask(loss, where, (student.shape[0], *size), axis)
    return masked_images(student, where), masked_images(teacher, where), size, where


def masked_images(images: jax.Array, where: jax.Array | None) -> jax.Array:
    """[batch, height, width, channels] without infinities, zero where `average_pool` to the size of `where` drops it."""
    images = numerics.finite_or_nan(images)
    if where is None:
        return images
    reached = where.astype(jnp.float32)
    for axis in (1, 2):
        if images.shape[axis] != where.shape[axis]:
            windows = jnp.asarray(pooling.windows(images.shape[axis], where.shape[axis]))
            reached = jnp.moveaxis(jnp.tensordot(reached, windows, axes=((axis,), (1,))), -1, axis)
    return jnp.where(reached[..., None] > 0, images, 0.0)


def position_mask(loss: str, where: ArrayLike | None, shape: tuple[int, ...], axis: int) -> jax.Array | None:
    """`where` broadcast to [batch, height, width], from a layout that has a channel axis of length 1 at `axis`."""
    if where is None:
        return None
    with_channels = list(shape)
    with_channels.insert(axis % 4, 1)
    return numerics.mask(loss, where, tuple(with_channels), axis)[..., 0]


def smaller_size(first: jax.Array, second: jax.Array) -> tuple[int, int]:
    """The smaller height and the smaller width of two [batch, height, width, channels]."""
    return min(first.shape[1], second.shape[1]), min(first.shape[2], second.shape[2])
