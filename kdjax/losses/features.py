"""Losses on the activations between input and logits: the student is shown what the teacher sees on the way.

All return one value per example. Features are images [batch, height, width, channels] or, for `hint`, arrays of any rank; other
layouts through `axis`, the channel axis. After that axis has been moved to the end, the first axis runs over the examples.
Where the two networks have different widths, `kdjax.objectives` adds the connector that the paper trains.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kdjax.losses import numerics


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
    where = numerics.mask('hint', where, jnp.shape(student), axis)
    student, teacher = numerics.pair('hint', student, teacher, axis)
    if student.ndim < 2:
        raise ValueError(f'hint: activations must be [batch, ..., channels], got {student.shape}')
    return numerics.masked_mean(jnp.square(student - teacher), tuple(range(1, student.ndim)), where)


def attention_transfer(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    power: float = 2,
    variant: str = 'mean_square',
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
      ValueError: shapes or dtypes do not fit, the power is not positive, or the variant is unknown.

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
    student, teacher = numerics.pair('attention_transfer', student, teacher, axis, same_shape=False)
    if student.ndim != 4 or student.shape[0] != teacher.shape[0]:
        raise ValueError(
            'attention_transfer: student and teacher must be [batch, height, width, channels] with the same batch, '
            f'got {student.shape} and {teacher.shape} (channels last)'
        )
    height, width = (min(sizes) for sizes in zip(student.shape[1:3], teacher.shape[1:3], strict=True))
    if where is not None:
        shape = [student.shape[0], height, width]
        shape.insert(axis % 4, 1)
        where = numerics.mask('attention_transfer', where, tuple(shape), axis)[..., 0]

    def attention(features: jax.Array) -> jax.Array:
        magnitude = jnp.abs(numerics.unit_scale(features, axis=(1, 2, 3)))
        # |f|^p has an infinite or undefined derivative at 0 for p < 2, where the convention is 0.
        active = magnitude > 0
        powered = jnp.where(active, jnp.where(active, magnitude, 1.0) ** jnp.asarray(power, jnp.float32), 0.0)
        pooled = average_pool(jnp.mean(powered, axis=-1), (height, width))
        return numerics.l2_normalize(pooled if where is None else jnp.where(where, pooled, 0.0), axis=(1, 2))

    squares = jnp.square(attention(student) - attention(teacher))
    if variant == 'mean_square':
        return numerics.masked_mean(squares, (1, 2), where)
    total = jnp.sum(squares, axis=(1, 2))
    # sqrt has an infinite derivative at 0, which equal maps would turn into NaN.
    return jnp.where(total > 0, jnp.sqrt(jnp.where(total > 0, total, 1.0)), 0.0)


def average_pool(maps: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Average-pools [batch, height, width] or [batch, height, width, channels] to `size`, whatever the ratio.

    Output i averages the inputs from floor(i·n/m) up to ceil((i+1)·n/m), the windows of adaptive pooling; one product with
    a small constant matrix per axis, and nothing where the size is right already.
    """
    for axis, target in zip((1, 2), size, strict=True):
        length = maps.shape[axis]
        if length == target:
            continue
        window = np.zeros((length, target), np.float32)
        for i in range(target):
            start, stop = i * length // target, -(-(i + 1) * length // target)
            window[start:stop, i] = 1.0 / (stop - start)
        pooled = jnp.tensordot(maps, jnp.asarray(window), axes=((axis,), (0,)), precision=jax.lax.Precision.HIGHEST)
        maps = jnp.moveaxis(pooled, -1, axis)
    return maps
