"""Integer arithmetic of arrays: values on a grid of 2^bits levels, one scale per tensor or per channel.

A real number x is stood for by an integer q with x ≈ (q - zero_point) · scale. Weights are symmetric (no zero point) on the
narrow range [-127, 127]; with a zero point the range is the full one, [-128, 127], and zero is exact in both. Rounding is
to the nearest, half to even. Nothing here makes a network faster on XLA; it makes the file smaller.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import paths
from kdjax.paths import Leaves, kernels, select


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    """An array as integers and the scales that turn them back into numbers.

    Attributes:
      values: int8, of the array's shape.
      scale: float32, broadcastable to `values`.
    """

    values: jax.Array
    scale: jax.Array

    def dequantize(self) -> jax.Array:
        """The numbers that the integers stand for, in float32."""
        return dequantize(self.values, self.scale)


def integer_range(bits: int, *, narrow: bool) -> tuple[int, int]:
    """The smallest and the largest integer of a signed type; the narrow range leaves out the one without a counterpart.

    >>> integer_range(8, narrow=True), integer_range(8, narrow=False)
    ((-127, 127), (-128, 127))
    """
    if not 2 <= bits <= 8:
        raise ValueError(f'bits must be between 2 and 8, got {bits}')
    largest = 2 ** (bits - 1) - 1
    return -largest - (not narrow), largest


def symmetric_scale(x: ArrayLike, *, channel_axis: int | None = None, bits: int = 8) -> jax.Array:
    """The scale at which the largest magnitude falls on the last level: max |x| / (2^(bits-1) - 1).

    Args:
      x: any shape, floating point.
      channel_axis: the axis along which every index gets a scale of its own; None for one scale for all.
      bits: 2 to 8.

    Returns:
      float32, with the rank of x and length 1 on every axis but `channel_axis`. Where all values are zero the scale is 1.

    >>> import jax.numpy as jnp
    >>> print(symmetric_scale(jnp.array([[1.27, 0.0], [-0.5, 0.0]]), channel_axis=1))
    [[0.01 1.  ]]
    """
    x = _as_float32('symmetric_scale', x)
    kept = None if channel_axis is None else channel_axis % x.ndim
    axes = tuple(axis for axis in range(x.ndim) if axis != kept)
    scale = jnp.max(jnp.abs(x), axis=axes, keepdims=True, initial=0.0) / integer_range(bits, narrow=True)[1]
    return jnp.where(scale == 0, 1.0, scale)


def quantize(x: ArrayLike, scale: ArrayLike, zero_point: ArrayLike | None = None, *, bits: int = 8) -> jax.Array:
    """round(x / scale) + zero_point, clipped to the range of the type.

    Args:
      x: any shape, floating point.
      scale: positive, broadcastable to x.
      zero_point: integer that stands for 0, broadcastable to x; None for symmetric quantization on the narrow range.
      bits: 2 to 8.

    Returns:
      int8 of x's shape; for fewer bits, int8 that holds small numbers.

    Raises:
      ValueError: x is not floating point, or bits are out of range.

    >>> import jax.numpy as jnp
    >>> print(quantize(jnp.array([-300., -1., 0., 0.5, 1.5]), 1.0))
    [-127   -1    0    0    2]
    """
    low, high = integer_range(bits, narrow=zero_point is None)
    levels = jnp.round(_as_float32('quantize', x) / jnp.asarray(scale, jnp.float32))
    if zero_point is not None:
        levels = levels + jnp.asarray(zero_point).astype(jnp.float32)
    return jnp.clip(levels, low, high).astype(jnp.int8)


def dequantize(values: ArrayLike, scale: ArrayLike, zero_point: ArrayLike | None = None) -> jax.Array:
    """(values - zero_point) · scale, in float32.

    >>> import jax.numpy as jnp
    >>> print(dequantize(jnp.array([-127, 0, 2], jnp.int8), 0.5))
    [-63.5   0.    1. ]
    """
    levels = jnp.asarray(values).astype(jnp.float32)
    if zero_point is not None:
        levels = levels - jnp.asarray(zero_point).astype(jnp.float32)
    return levels * jnp.asarray(scale, jnp.float32)


def fake_quantize(x: ArrayLike, scale: ArrayLike, zero_point: ArrayLike | None = None, *, bits: int = 8) -> jax.Array:
    """Rounds x to the grid of `quantize` and stays in floating point, with a gradient that training can use.

    The value is `dequantize(quantize(x))`, in x's dtype. The gradient passes unchanged where x lies within the range and is
    zero where x was clipped; scale and zero point get none. (`x + stop_gradient(q - x)` would leave values off the grid by
    rounding.)

    Args:
      x: any shape, floating point.
      scale: positive, broadcastable to x.
      zero_point: as in `quantize`.
      bits: 2 to 8.

    Returns:
      An array of x's shape and dtype.

    Raises:
      ValueError: x is not floating point, or bits are out of range.

    >>> import jax, jax.numpy as jnp
    >>> x = jnp.array([0.4, 0.6, 200.])
    >>> print(fake_quantize(x, 1.0), jax.grad(lambda x: fake_quantize(x, 1.0).sum())(x))
    [  0.   1. 127.] [1. 1. 0.]

    Reference:
      Bengio, Léonard, Courville. Estimating or Propagating Gradients Through Stochastic Neurons for Conditional
      Computation. 2013. https://arxiv.org/abs/1308.3432
    """
    x = jnp.asarray(x)
    _as_float32('fake_quantize', x)
    zero_point = None if zero_point is None else jnp.asarray(zero_point).astype(jnp.float32)
    return _fake_quantize(x, jnp.asarray(scale, jnp.float32), zero_point, bits)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _fake_quantize(x: jax.Array, scale: jax.Array, zero_point: jax.Array | None, bits: int) -> jax.Array:
    on_grid = dequantize(quantize(x, scale, zero_point, bits=bits), scale, zero_point).astype(x.dtype)
    return jnp.where(jnp.isnan(x), x, on_grid)


def _forward(x: jax.Array, scale: jax.Array, zero_point: jax.Array | None, bits: int) -> tuple[jax.Array, Any]:
    low, high = integer_range(bits, narrow=zero_point is None)
    levels = jnp.round(x.astype(jnp.float32) / scale) + (0.0 if zero_point is None else zero_point)
    return _fake_quantize(x, scale, zero_point, bits), ((levels >= low) & (levels <= high), scale, zero_point)


def _backward(bits: int, residuals: Any, gradient: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    del bits
    inside, scale, zero_point = residuals
    through = jnp.where(inside, gradient, jnp.zeros_like(gradient))
    return through, jnp.zeros_like(scale), None if zero_point is None else jnp.zeros_like(zero_point)


_fake_quantize.defvjp(_forward, _backward)


def quantize_weights(params: Any, *, leaves: Leaves = kernels) -> Any:
    """Replaces the weights of a tree by `QuantizedArray`s: symmetric int8, one scale per output channel (the last axis).

    Args:
      params: a tree of arrays.
      leaves: which arrays; biases and norms stay as they are unless they are named.

    Raises:
      ValueError: `leaves` picks nothing.

    >>> import jax.numpy as jnp
    >>> tree = quantize_weights({'kernel': jnp.array([[1.27, 2.0]]), 'bias': jnp.zeros(2)})
    >>> print(tree['kernel'].values, tree['kernel'].scale)
    [[127 127]] [[0.01       0.01574803]]
    """
    chosen = select(leaves, params)

    def convert(path: str, leaf: jax.Array) -> Any:
        if path not in chosen:
            return leaf
        scale = symmetric_scale(leaf, channel_axis=-1)
        return QuantizedArray(quantize(leaf, scale), scale)

    return paths.map_with_paths(convert, params)


def dequantize_weights(params: Any) -> Any:
    """Replaces the `QuantizedArray`s of a tree by float32 arrays, which any network can use.

    >>> import jax.numpy as jnp
    >>> print(dequantize_weights({'kernel': QuantizedArray(jnp.array([2], jnp.int8), jnp.array([0.5]))}))
    {'kernel': Array([1.], dtype=float32)}
    """
    is_quantized = lambda leaf: isinstance(leaf, QuantizedArray)  # noqa: E731
    return jax.tree.map(lambda leaf: leaf.dequantize() if is_quantized(leaf) else leaf, params, is_leaf=is_quantized)


def _as_float32(name: str, x: ArrayLike) -> jax.Array:
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f'{name}: x must be floating point, got {x.dtype}')
    return x.astype(jnp.float32)
