"""Learned step sizes: the scale of the grid is a parameter that is trained with the weights."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax.numerics import floating
from kdjax.quantization._arrays import on_grid, quantized_range, scale_for
from kdjax.quantization._scales import reduce_groups


def learned_step(
    x: ArrayLike,
    scale: ArrayLike,
    zero_point: ArrayLike | None = None,
    *,
    bits: int = 8,
    narrow: bool | None = None,
    count: int | None = None,
) -> jax.Array:
    """Rounds x to the grid, like `arrays.fake_quantize`, and gives the scale a gradient too (LSQ).

    With v = x / scale, on the levels from -N to P (N = P = 127 for symmetric quantization with 8 bits), the derivatives are

      ∂y/∂scale = g · (round(v) - v)  where -N < v < P,  -g · N  where v ≤ -N,  g · P  where v ≥ P,   g = 1 / √(count · P)
      ∂y/∂x     = 1                   where -N < v < P,  0 elsewhere.

    Args:
      x: any shape, floating point.
      scale: positive, broadcastable to x, or one entry for every group of x; train it with the weights, from `initial_step`.
      zero_point: integer that stands for 0, as in `quantize`; it gets no gradient. -2^(bits-1) leaves no level below zero, as
        suits activations after a ReLU.
      bits: 2 to 8.
      narrow: as in `quantize`.
      count: how many numbers share a scale, for g; None for x.size / scale.size. For activations the paper counts the features
        of one example.

    Returns:
      An array of x's shape and dtype: the value of `arrays.fake_quantize`.

    Raises:
      ValueError: x is not floating point, bits are out of range, or the scale does not fit x.

    >>> import jax, jax.numpy as jnp
    >>> step = lambda x, scale: learned_step(x, scale, count=1).sum() * 127 ** 0.5  # without g
    >>> print(jax.grad(step, argnums=1)(jnp.array([0.75, 1e9]), 1.0))
    127.25

    Reference:
      Esser, McKinstry, Bablani, Appuswamy, Modha. Learned Step Size Quantization. 2020. https://arxiv.org/abs/1902.08153
    """
    low, high = quantized_range(bits, zero_point, narrow)
    x = jnp.asarray(x)
    if count is None:
        count = x.size // max(jnp.size(scale), 1)
    scale, zero_point = scale_for('learned_step', floating('learned_step: x', x), scale, zero_point)
    # Here and not in the rule below, so that JAX sums the gradients of those that share a scale.
    scale = jnp.broadcast_to(scale, x.shape)
    return _learned_step(x, scale, zero_point, low, high, max(count, 1))


def initial_step(
    x: ArrayLike,
    zero_point: ArrayLike | None = None,
    *,
    channel_axis: int | Sequence[int] | None = None,
    group_size: int | None = None,
    group_axis: int = -2,
    bits: int = 8,
    narrow: bool | None = None,
) -> jax.Array:
    """The scale from which `learned_step` starts: 2 · mean |x| / √P, where P is the number of levels above zero.

    Args:
      x: the weights, or the activations of a first batch; any shape, floating point.
      zero_point: as in `learned_step`; one number for all.
      channel_axis: the axis or axes along which every index gets a scale of its own; None for one scale for all.
      group_size: how many neighbours along `group_axis` share a scale; None for all.
      group_axis: the axis that groups divide.
      bits: 2 to 8.
      narrow: as in `quantize`.

    Returns:
      float32, shaped like `symmetric_scale` of the same arguments. Where all values are zero the scale is 1.

    Raises:
      ValueError: x is not floating point, bits are out of range, an axis does not exist or is named twice, or groups do not
        divide it.

    >>> import jax.numpy as jnp
    >>> print(initial_step(jnp.array([1., -2.]), bits=2))
    [3.]

    Reference:
      Esser, McKinstry, Bablani, Appuswamy, Modha. Learned Step Size Quantization. 2020. https://arxiv.org/abs/1902.08153
    """
    _, high = quantized_range(bits, zero_point, narrow)
    magnitudes = jnp.abs(floating('initial_step: x', x))
    grouping: dict[str, Any] = {'channel_axis': channel_axis, 'group_size': group_size, 'group_axis': group_axis}
    total = reduce_groups('initial_step', lambda x, axes: jnp.sum(x, axis=axes), magnitudes, **grouping)
    mean = total / (max(magnitudes.size, 1) / max(total.size, 1))
    return jnp.where(mean == 0, 1.0, 2 * mean / jnp.sqrt(_levels_above_zero(zero_point, high)))


def _levels_above_zero(zero_point: ArrayLike | None, high: int) -> jax.Array:
    zero_point = 0.0 if zero_point is None else jnp.asarray(zero_point).astype(jnp.float32)
    return jnp.maximum(high - jnp.asarray(zero_point), 1.0)  # a grid that ends at zero has none


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _learned_step(x: jax.Array, scale: jax.Array, zero_point: jax.Array | None, low: int, high: int, count: int) -> jax.Array:
    del count
    return on_grid(x, scale, zero_point, low, high)


def _forward(
    x: jax.Array, scale: jax.Array, zero_point: jax.Array | None, low: int, high: int, count: int
) -> tuple[jax.Array, Any]:
    return _learned_step(x, scale, zero_point, low, high, count), (x, scale, zero_point)


def _backward(
    low: int, high: int, count: int, residuals: Any, gradient: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    x, scale, zero_point = residuals
    levels = x.astype(jnp.float32) / scale
    offset = 0.0 if zero_point is None else zero_point
    inside = (levels > low - offset) & (levels < high - offset)
    slope = jnp.where(inside, jnp.round(levels) - levels, jnp.clip(levels, low - offset, high - offset))
    slope = slope / (math.sqrt(count) * jnp.sqrt(_levels_above_zero(zero_point, high)))
    through = jnp.where(inside, gradient, jnp.zeros_like(gradient))
    return through, gradient.astype(jnp.float32) * slope, None if zero_point is None else jnp.zeros_like(zero_point)


_learned_step.defvjp(_forward, _backward)
