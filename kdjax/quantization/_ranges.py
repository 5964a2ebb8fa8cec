"""Ranges from data: which real numbers an integer grid should cover.

A range is the pair of its ends and always holds zero, which every grid must stand for exactly. `affine_scale` and
`symmetric_scale_of_range` turn one into a scale. What a wide range loses in resolution a short one loses by clipping:
`minmax_range` clips nothing, `percentile_range` clips outliers, and `mse_range` finds the balance of the two. Krishnamoorthi
(2018) recommends the first for weights, per channel, and a moving average of it for activations; Nagel et al. (2021) recommend
the mean squared error for both.

Ranges of several batches are joined by `union_range` (after `minmax_range` and `absmax_range`, of which it is exactly the range
of all batches together) or by `average_range` (after the other two). All functions are pure, and go through jit and vmap. NaN
in the data makes NaN of the range.

References:
  Krishnamoorthi. Quantizing deep convolutional networks for efficient inference: A whitepaper. 2018.
  https://arxiv.org/abs/1806.08342
  Nagel et al. A White Paper on Neural Network Quantization. 2021. https://arxiv.org/abs/2106.08295
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax.numerics import floating
from kdjax.quantization._arrays import fake_quantize
from kdjax.quantization._scales import affine_scale, reduce_groups, symmetric_scale_of_range


class Range(NamedTuple):
    """The ends of one range, or of one for every channel or group; low ≤ 0 ≤ high.

    Attributes:
      low: float32, shaped like the scale.
      high: float32, of the same shape.
    """

    low: jax.Array
    high: jax.Array


def minmax_range(
    x: ArrayLike, *, channel_axis: int | Sequence[int] | None = None, group_size: int | None = None, group_axis: int = -2
) -> Range:
    """From the smallest number to the largest: min(x, 0) to max(x, 0).

    Args:
      x: any shape, floating point.
      channel_axis: the axis or axes along which every index gets a range of its own; None for one range for all.
      group_size: how many neighbours along `group_axis` share a range; None for all.
      group_axis: the axis that groups divide.

    Returns:
      The range, shaped like `symmetric_scale` of the same arguments.

    Raises:
      ValueError: x is not floating point, an axis does not exist or is named twice, or groups do not divide it.

    >>> import jax.numpy as jnp
    >>> low, high = minmax_range(jnp.array([[-1., 2.], [3., 4.]]), channel_axis=1)
    >>> print(low, high)
    [[-1.  0.]] [[3. 4.]]
    """
    x = floating('minmax_range: x', x)
    grouping: dict[str, Any] = {'channel_axis': channel_axis, 'group_size': group_size, 'group_axis': group_axis}
    low = reduce_groups('minmax_range', lambda x, axes: jnp.min(x, axis=axes, initial=0.0), x, **grouping)
    return Range(low, reduce_groups('minmax_range', lambda x, axes: jnp.max(x, axis=axes, initial=0.0), x, **grouping))


def absmax_range(
    x: ArrayLike, *, channel_axis: int | Sequence[int] | None = None, group_size: int | None = None, group_axis: int = -2
) -> Range:
    """From -max |x| to max |x|.

    Args:
      x: any shape, floating point.
      channel_axis: as in `minmax_range`.
      group_size: as in `minmax_range`.
      group_axis: as in `minmax_range`.

    Returns:
      The range, shaped like `symmetric_scale` of the same arguments.

    Raises:
      ValueError: as in `minmax_range`.

    >>> import jax.numpy as jnp
    >>> low, high = absmax_range(jnp.array([-3., 2.]))
    >>> print(low, high)
    [-3.] [3.]
    """
    magnitudes = jnp.abs(floating('absmax_range: x', x))
    largest = lambda x, axes: jnp.max(x, axis=axes, initial=0.0)  # noqa: E731
    grouping: dict[str, Any] = {'channel_axis': channel_axis, 'group_size': group_size, 'group_axis': group_axis}
    high = reduce_groups('absmax_range', largest, magnitudes, **grouping)
    return Range(-high, high)


def percentile_range(
    x: ArrayLike,
    percentile: float = 99.9,
    *,
    channel_axis: int | Sequence[int] | None = None,
    group_size: int | None = None,
    group_axis: int = -2,
) -> Range:
    """From the (100 - percentile)-th to the percentile-th percentile: as many numbers are clipped at either end.

    Percentiles between two numbers are interpolated linearly. A range that does not hold zero is widened to it.

    Args:
      x: any shape, floating point, not empty.
      percentile: of the numbers, in percent, 50 to 100; 100 clips nothing.
      channel_axis: as in `minmax_range`.
      group_size: as in `minmax_range`.
      group_axis: as in `minmax_range`.

    Returns:
      The range, shaped like `symmetric_scale` of the same arguments.

    Raises:
      ValueError: the percentile lies outside [50, 100], x is empty, or as in `minmax_range`.

    >>> import jax.numpy as jnp
    >>> low, high = percentile_range(jnp.arange(-10., 91.), 99)
    >>> print(low, high)
    [-9.] [89.]
    """
    if not 50 <= percentile <= 100:
        raise ValueError(f'percentile_range: percentile must be between 50 and 100, got {percentile}')
    x = floating('percentile_range: x', x)
    if x.size == 0:
        raise ValueError(f'percentile_range: an array of shape {x.shape} has no percentiles; give at least one number')
    grouping: dict[str, Any] = {'channel_axis': channel_axis, 'group_size': group_size, 'group_axis': group_axis}
    low = reduce_groups('percentile_range', lambda x, axes: jnp.percentile(x, 100.0 - percentile, axes), x, **grouping)
    high = reduce_groups('percentile_range', lambda x, axes: jnp.percentile(x, float(percentile), axes), x, **grouping)
    return Range(jnp.minimum(low, 0.0), jnp.maximum(high, 0.0))


def mse_range(
    x: ArrayLike,
    *,
    bits: int = 8,
    symmetric: bool = True,
    channel_axis: int | Sequence[int] | None = None,
    group_size: int | None = None,
    group_axis: int = -2,
    candidates: int = 100,
) -> Range:
    """The shrunk range whose grid is nearest to the numbers: it minimises Σ (x - arrays.fake_quantize(x))².

    The candidates are i/n · (low, high) for i = 1 … n, where (low, high) is the range that clips nothing; of equally good ones
    the widest is taken. They are tried one after another, in the memory of one.

    Args:
      x: any shape, floating point.
      bits: 2 to 8.
      symmetric: whether the grid is symmetric, on the narrow range of integers, or has a zero point.
      channel_axis: as in `minmax_range`.
      group_size: as in `minmax_range`.
      group_axis: as in `minmax_range`.
      candidates: n, how many shrunk ranges are tried.

    Returns:
      The range, shaped like `symmetric_scale` of the same arguments.

    Raises:
      ValueError: there are no candidates, bits are out of range, or as in `minmax_range`.

    >>> import jax.numpy as jnp
    >>> low, high = mse_range(jnp.array([4.0] + 1000 * [1.0]), bits=2)
    >>> print(low, high)
    [-1.] [1.]

    Reference:
      Nagel et al. A White Paper on Neural Network Quantization. 2021. https://arxiv.org/abs/2106.08295
    """
    if candidates < 1:
        raise ValueError(f'mse_range: candidates must be at least 1, got {candidates}')
    x = floating('mse_range: x', x)
    grouping: dict[str, Any] = {'channel_axis': channel_axis, 'group_size': group_size, 'group_axis': group_axis}
    low, high = absmax_range(x, **grouping) if symmetric else minmax_range(x, **grouping)

    def error(shrunk: jax.Array) -> jax.Array:
        if symmetric:
            scale, zero_point = symmetric_scale_of_range(shrunk * low, shrunk * high, bits=bits), None
        else:
            scale, zero_point = affine_scale(shrunk * low, shrunk * high, bits=bits)
        difference = x - fake_quantize(x, scale, zero_point, bits=bits)
        return reduce_groups('mse_range', lambda x, axes: jnp.sum(x**2, axis=axes), difference, **grouping)

    shrunk = jnp.arange(candidates, 0, -1, dtype=jnp.float32) / candidates
    best = shrunk[jnp.argmin(jax.lax.map(error, shrunk), axis=0)]
    return Range(best * low, best * high)


def moving_average_range(
    average: Range, x: ArrayLike, *, decay: float = 0.99, channel_axis: int | Sequence[int] | None = None
) -> Range:
    """The running range: decay · average + (1 - decay) · minmax_range(x), for activations during training.

    It has no correction for a start from zero: start from the `minmax_range` of a first batch.

    Args:
      average: the range so far.
      x: the activations of a batch, any shape, floating point.
      decay: how much of the average stays, 0 to 1.
      channel_axis: as in `minmax_range`.

    Returns:
      The new average.

    Raises:
      ValueError: decay lies outside [0, 1], the average is not shaped like the range of x, or as in `minmax_range`.

    >>> import jax.numpy as jnp
    >>> first = minmax_range(jnp.array([-1., 1.]))
    >>> low, high = moving_average_range(first, jnp.array([0., 3.]), decay=0.5)
    >>> print(low, high)
    [-0.5] [2.]

    Reference:
      Jacob et al. Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference. 2018.
      https://arxiv.org/abs/1712.05877
    """
    if isinstance(decay, (int, float)) and not 0 <= decay <= 1:
        raise ValueError(f'moving_average_range: decay must be between 0 and 1, got {decay}')
    batch = minmax_range(floating('moving_average_range: x', x), channel_axis=channel_axis)
    for end, new_end in zip(average, batch, strict=True):
        if jnp.shape(end) != new_end.shape:
            raise ValueError(
                f'moving_average_range: the average has shape {jnp.shape(end)}, the range of the batch {new_end.shape}; '
                'start from minmax_range with the same channel_axis'
            )
    return Range(*(decay * end + (1 - decay) * new_end for end, new_end in zip(average, batch, strict=True)))


def union_range(ranges: Sequence[Range]) -> Range:
    """The smallest range that holds all: the least of the lower ends to the greatest of the upper ones.

    Args:
      ranges: at least one, of one shape.

    Raises:
      ValueError: there is no range, or their shapes differ.

    >>> import jax.numpy as jnp
    >>> low, high = union_range([minmax_range(jnp.array([-1., 1.])), minmax_range(jnp.array([3.]))])
    >>> print(low, high)
    [-1.] [3.]
    """
    low, high = _stack('union_range', ranges)
    return Range(jnp.min(low, axis=0), jnp.max(high, axis=0))


def average_range(ranges: Sequence[Range]) -> Range:
    """The mean of the lower ends to the mean of the upper ones.

    Args:
      ranges: at least one, of one shape.

    Raises:
      ValueError: there is no range, or their shapes differ.

    >>> import jax.numpy as jnp
    >>> low, high = average_range([minmax_range(jnp.array([-1., 1.])), minmax_range(jnp.array([3.]))])
    >>> print(low, high)
    [-0.5] [2.]
    """
    low, high = _stack('average_range', ranges)
    return Range(jnp.mean(low, axis=0), jnp.mean(high, axis=0))


def _stack(name: str, ranges: Sequence[Range]) -> Range:
    shapes = {jnp.shape(end) for ends in ranges for end in ends}
    if len(shapes) != 1:
        raise ValueError(f'{name}: the ends must be of one shape, got {sorted(shapes) or "no ranges"}')
    return Range(*(jnp.stack([jnp.asarray(end) for end in ends]) for ends in zip(*ranges, strict=True)))
