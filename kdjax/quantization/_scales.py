"""Scales of integer grids: from the numbers themselves or from a range, for a tensor, a channel, a group or several tensors.

The numbers that share a scale are said by `channel_axis` and `group_size`. Of an array of shape [..., in, out]:

| channel_axis | group_size | shape of the scale          | what shares a scale                              |
|--------------|------------|-----------------------------|--------------------------------------------------|
| None         | None       | [..., 1, 1]                 | the tensor                                       |
| -1           | None       | [..., 1, out]               | an output channel                                |
| -1           | 32         | [..., in / 32, out]         | 32 neighbouring inputs of an output channel      |

Groups lie along `group_axis`, by default the last axis but one, over which a dense kernel is contracted. Numbers below 2^-126,
which hardware may take for zero, count as zero.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax.numerics import floating
from kdjax.quantization._arrays import SMALLEST_NORMAL, integer_range


def symmetric_scale(
    x: ArrayLike,
    *,
    channel_axis: int | Sequence[int] | None = None,
    group_size: int | None = None,
    group_axis: int = -2,
    bits: int = 8,
    narrow: bool = True,
) -> jax.Array:
    """The scale at which the largest magnitude falls on the end of the range.

    It is 2 · max |x| / (high - low) with the integer range [low, high]: max |x| / 127 for eight bits on the narrow range,
    max |x| / 127.5 on the full one, where both ends are off by half a step.

    Args:
      x: any shape, floating point.
      channel_axis: the axis or axes along which every index gets a scale of its own; None for one scale for all.
      group_size: how many neighbours along `group_axis` share a scale; None for all.
      group_axis: the axis that groups divide.
      bits: 2 to 8.
      narrow: whether the range leaves out the smallest integer.

    Returns:
      float32, with the rank of x and length 1 on every axis but those of channels and groups. Where all values are zero the
      scale is 1.

    Raises:
      ValueError: x is not floating point, bits are out of range, an axis does not exist or is named twice, or groups do not
        divide it.

    >>> import jax.numpy as jnp
    >>> x = jnp.array([[1.27, 0.0], [-0.5, 0.0]])
    >>> print(symmetric_scale(x, channel_axis=1), symmetric_scale(x, narrow=False))
    [[0.01 1.  ]] [[0.00996078]]
    >>> print(symmetric_scale(x, group_size=1, bits=4))
    [[0.18142857]
     [0.07142857]]
    """
    magnitudes = jnp.abs(floating('symmetric_scale: x', x))
    largest = lambda x, axes: jnp.max(x, axis=axes, initial=0.0)  # noqa: E731
    grouping: dict[str, Any] = {'channel_axis': channel_axis, 'group_size': group_size, 'group_axis': group_axis}
    return _scale_of_magnitude(reduce_groups('symmetric_scale', largest, magnitudes, **grouping), bits, narrow)


def symmetric_scale_of_range(low: ArrayLike, high: ArrayLike, *, bits: int = 8, narrow: bool = True) -> jax.Array:
    """The symmetric scale whose grid covers a range: 2 · max(|low|, |high|) / (width of the integer range).

    Args:
      low: the lower ends, any shape, floating point.
      high: the upper ends, of the same shape.
      bits: 2 to 8.
      narrow: whether the range leaves out the smallest integer.

    Returns:
      float32 of the ends' shape. Where both ends are zero the scale is 1.

    Raises:
      ValueError: an end is not floating point, or bits are out of range.

    >>> print(symmetric_scale_of_range(-0.5, 1.27))
    0.01
    """
    low, high = (floating('symmetric_scale_of_range: x', end) for end in (low, high))
    return _scale_of_magnitude(jnp.maximum(jnp.abs(low), jnp.abs(high)), bits, narrow)


def affine_scale(low: ArrayLike, high: ArrayLike, *, bits: int = 8) -> tuple[jax.Array, jax.Array]:
    """Scale and zero point of the grid that covers a range, with zero on the grid.

    The range is first widened to hold zero. Then scale = (high - low) / (2^bits - 1), and the zero point is the integer
    -2^(bits-1) - low / scale, rounded. The ends may be off by half a step, zero is exact.

    Args:
      low: the lower ends, any shape, floating point.
      high: the upper ends, of the same shape.
      bits: 2 to 8.

    Returns:
      The scale, float32, and the zero point, int8, both of the ends' shape. Where both ends are zero the scale is 1.

    Raises:
      ValueError: an end is not floating point, or bits are out of range.

    >>> scale, zero_point = affine_scale(0.0, 2.55)
    >>> print(scale, zero_point)
    0.01 -128

    Reference:
      Jacob et al. Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference. 2018.
      https://arxiv.org/abs/1712.05877
    """
    low, high = (floating('affine_scale: x', end) for end in (low, high))
    low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    smallest, largest = integer_range(bits, narrow=False)
    # Divided first, for the width of a range of very large numbers may be no float.
    scale = high / (largest - smallest) - low / (largest - smallest)
    scale = jnp.where(jnp.maximum(-low, high) < SMALLEST_NORMAL, 1.0, jnp.maximum(scale, SMALLEST_NORMAL))
    zero_point = jnp.clip(smallest - jnp.round(low / scale), smallest, largest)
    return scale, zero_point.astype(jnp.int8)


def shared_scale(arrays: Sequence[ArrayLike], *, bits: int = 8, narrow: bool = True) -> jax.Array:
    """One symmetric scale for several tensors: that of the largest magnitude among all of them.

    Tensors that share a scale can be added, or joined along an axis, as integers.

    Args:
      arrays: at least one, of any shapes, floating point.
      bits: 2 to 8.
      narrow: whether the range leaves out the smallest integer.

    Returns:
      float32, a scalar. Where all values are zero the scale is 1.

    Raises:
      ValueError: there is no array, one is not floating point, or bits are out of range.

    >>> import jax.numpy as jnp
    >>> print(shared_scale([jnp.array([0.5, -1.27]), jnp.array([[0.1]])]))
    0.01
    """
    if not arrays:
        raise ValueError('shared_scale: there are no arrays; give at least one')
    magnitudes = [jnp.max(jnp.abs(floating('shared_scale: x', x)), initial=0.0) for x in arrays]
    return _scale_of_magnitude(jnp.max(jnp.stack(magnitudes)), bits, narrow)


def reduce_groups(
    name: str,
    reduction: Callable[[jax.Array, tuple[int, ...]], jax.Array],
    x: jax.Array,
    *,
    channel_axis: int | Sequence[int] | None,
    group_size: int | None,
    group_axis: int,
) -> jax.Array:
    """Reduces the numbers that share a scale to one, with `reduction(x, axes)`; `name` is the caller's, for errors.

    Returns:
      An array with the rank of x, of the shape of the scale.
    """
    named = () if channel_axis is None else (channel_axis,) if isinstance(channel_axis, int) else tuple(channel_axis)
    channels = [_axis(name, 'channel_axis', axis, x.ndim) for axis in named]
    shape = [length if axis in channels else 1 for axis, length in enumerate(x.shape)]
    reduced = [axis for axis in range(x.ndim) if axis not in channels]
    if group_size is not None:
        groups = _axis(name, 'group_axis', group_axis, x.ndim)
        length = x.shape[groups]
        if groups in channels:
            raise ValueError(f'{name}: axis {groups} is an axis of channels, which has no groups; choose another group_axis')
        if group_size < 1 or length % group_size:
            raise ValueError(f'{name}: groups of {group_size} do not divide axis {groups}, of length {length}; use a divisor')
        shape[groups] = length // group_size
        x = x.reshape(*x.shape[:groups], length // group_size, group_size, *x.shape[groups + 1 :])
        reduced = [axis + (axis >= groups) for axis in reduced]
    return reduction(x, tuple(reduced)).reshape(shape)


def _axis(name: str, argument: str, axis: int, rank: int) -> int:
    if not -rank <= axis < rank:
        raise ValueError(f'{name}: {argument} {axis} is out of range for an array of rank {rank}')
    return axis % rank


def _scale_of_magnitude(largest: jax.Array, bits: int, narrow: bool) -> jax.Array:
    low, high = integer_range(bits, narrow=narrow)
    scale = largest / ((high - low) / 2)
    return jnp.where(largest < SMALLEST_NORMAL, 1.0, jnp.maximum(scale, SMALLEST_NORMAL))
