"""Integer arithmetic of arrays: real numbers as small integers with a scale, and the same rounding inside training.

A real number x is stood for by an integer q with x ≈ (q - zero_point) · scale. Without a zero point the grid is symmetric and
its range is the narrow one, [-127, 127] for 8 bits; with a zero point it is the full one, [-128, 127]. Zero is exact in both.
Rounding is to the nearest, half to even. Nothing here makes a network faster on XLA; it makes the file smaller.

A scale (and a zero point with it) is broadcast to the array, or, where it has the array's rank and fewer but not one entries
along an axis, every entry stands for a group of neighbours: a scale of shape [4, 10] for an array of shape [128, 10] belongs to
groups of 32.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax.numerics import floating

SMALLEST_NORMAL = 2.0**-126
"""Hardware may take smaller float32 numbers for zero, and a division by such a scale would give NaN."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    """An array as integers and the scales that turn them back into numbers; a pytree.

    Attributes:
      values: int8, of the array's shape; for fewer bits, int8 that holds small numbers.
      scale: float32, one for all, for a channel or for a group, as `dequantize` takes it.
      zero_point: int8, of the scale's shape: the integer that stands for 0. None for symmetric quantization.
      bits: how many bits a value needs, 2 to 8.

    >>> import jax.numpy as jnp
    >>> array = QuantizedArray(jnp.array([[-7, 0, 2, 1]], jnp.int8), jnp.array([[0.5, 10.]]), bits=4)
    >>> print(array.shape, array.dtype, array.dequantize())
    (1, 4) float32 [[-3.5  0.  20.  10. ]]
    """

    values: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None = None
    bits: int = dataclasses.field(default=8, metadata={'static': True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array that the integers stand for."""
        return self.values.shape

    @property
    def ndim(self) -> int:
        """The number of its axes."""
        return self.values.ndim

    @property
    def dtype(self) -> Any:
        """The type of its numbers, float32: that of `dequantize()`, not that of the stored integers."""
        return jnp.dtype(jnp.float32)

    def dequantize(self) -> jax.Array:
        """The numbers that the integers stand for, in float32."""
        return dequantize(self.values, self.scale, self.zero_point)


def integer_range(bits: int, *, narrow: bool) -> tuple[int, int]:
    """The smallest and the largest integer of a signed type; the narrow range leaves out the one without a counterpart.

    >>> integer_range(8, narrow=True), integer_range(8, narrow=False)
    ((-127, 127), (-128, 127))
    """
    if not 2 <= bits <= 8:
        raise ValueError(f'bits must be between 2 and 8, got {bits}')
    largest = 2 ** (bits - 1) - 1
    return -largest - (not narrow), largest


def quantize(
    x: ArrayLike, scale: ArrayLike, zero_point: ArrayLike | None = None, *, bits: int = 8, narrow: bool | None = None
) -> jax.Array:
    """round(x / scale) + zero_point, clipped to the range of the type.

    Args:
      x: any shape, floating point.
      scale: positive, broadcastable to x, or one entry for every group of x.
      zero_point: integer that stands for 0, of the scale's shape or a number; None for symmetric quantization.
      bits: 2 to 8.
      narrow: whether the range is the narrow one; None for narrow without a zero point, full with one.

    Returns:
      int8 of x's shape; for fewer bits, int8 that holds small numbers.

    Raises:
      ValueError: x is not floating point, bits are out of range, or the scale does not fit x.

    >>> import jax.numpy as jnp
    >>> x = jnp.array([-300., -1., 0., 0.5, 1.5])
    >>> print(quantize(x, 1.0), quantize(x, 1.0, bits=4), quantize(x, 1.0, bits=4, narrow=False))
    [-127   -1    0    0    2] [-7 -1  0  0  2] [-8 -1  0  0  2]
    """
    low, high = quantized_range(bits, zero_point, narrow)
    x = floating('quantize: x', x)
    scale, zero_point = scale_for('quantize', x, scale, zero_point)
    return _round(x, scale, zero_point, low, high).astype(jnp.int8)


def dequantize(values: ArrayLike, scale: ArrayLike, zero_point: ArrayLike | None = None) -> jax.Array:
    """(values - zero_point) · scale, in float32.

    Args:
      values: integers of any shape.
      scale: broadcastable to the values, or one entry for every group of them.
      zero_point: as in `quantize`.

    Returns:
      float32 of the values' shape.

    Raises:
      ValueError: the scale does not fit the values.

    >>> import jax.numpy as jnp
    >>> print(dequantize(jnp.array([-127, 0, 2], jnp.int8), 0.5))
    [-63.5   0.    1. ]
    """
    levels = jnp.asarray(values).astype(jnp.float32)
    scale, zero_point = scale_for('dequantize', levels, scale, zero_point)
    return _numbers(levels, scale, zero_point)


def fake_quantize(
    x: ArrayLike, scale: ArrayLike, zero_point: ArrayLike | None = None, *, bits: int = 8, narrow: bool | None = None
) -> jax.Array:
    """Rounds x to the grid of `quantize` and stays in floating point, with a gradient that training can use.

    The value is `dequantize(quantize(x))`, in x's dtype; NaN stays NaN. The gradient passes unchanged where x lies within the
    range and is zero where x was clipped; scale and zero point get none. (`x + stop_gradient(q - x)` would leave values off the
    grid by rounding.)

    Args:
      x: any shape, floating point.
      scale: positive, broadcastable to x, or one entry for every group of x.
      zero_point: as in `quantize`.
      bits: 2 to 8.
      narrow: as in `quantize`.

    Returns:
      An array of x's shape and dtype.

    Raises:
      ValueError: x is not floating point, bits are out of range, or the scale does not fit x.

    >>> import jax, jax.numpy as jnp
    >>> x = jnp.array([0.4, 0.6, 200.])
    >>> print(fake_quantize(x, 1.0), jax.grad(lambda x: fake_quantize(x, 1.0).sum())(x))
    [  0.   1. 127.] [1. 1. 0.]

    Reference:
      Bengio, Léonard, Courville. Estimating or Propagating Gradients Through Stochastic Neurons for Conditional
      Computation. 2013. https://arxiv.org/abs/1308.3432
    """
    low, high = quantized_range(bits, zero_point, narrow)
    x = jnp.asarray(x)
    scale, zero_point = scale_for('fake_quantize', floating('fake_quantize: x', x), scale, zero_point)
    return _fake_quantize(x, scale, zero_point, low, high)


def on_grid(x: jax.Array, scale: jax.Array, zero_point: jax.Array | None, low: int, high: int) -> jax.Array:
    """The value of `fake_quantize`, for a scale and a zero point that came through `scale_for`."""
    y = _numbers(_round(x.astype(jnp.float32), scale, zero_point, low, high), scale, zero_point).astype(x.dtype)
    return jnp.where(jnp.isnan(x), x, y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _fake_quantize(x: jax.Array, scale: jax.Array, zero_point: jax.Array | None, low: int, high: int) -> jax.Array:
    return on_grid(x, scale, zero_point, low, high)


def _forward(x: jax.Array, scale: jax.Array, zero_point: jax.Array | None, low: int, high: int) -> tuple[jax.Array, Any]:
    levels = jnp.round(x.astype(jnp.float32) / scale) + (0.0 if zero_point is None else zero_point)
    return on_grid(x, scale, zero_point, low, high), ((levels >= low) & (levels <= high), scale, zero_point)


def _backward(low: int, high: int, residuals: Any, gradient: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    del low, high
    inside, scale, zero_point = residuals
    through = jnp.where(inside, gradient, jnp.zeros_like(gradient))
    return through, jnp.zeros_like(scale), None if zero_point is None else jnp.zeros_like(zero_point)


_fake_quantize.defvjp(_forward, _backward)


def _round(x: jax.Array, scale: jax.Array, zero_point: jax.Array | None, low: int, high: int) -> jax.Array:
    levels = jnp.round(x / scale)
    # Before the cast, for integers wrap around.
    return jnp.clip(levels if zero_point is None else levels + zero_point, low, high)


def _numbers(levels: jax.Array, scale: jax.Array, zero_point: jax.Array | None) -> jax.Array:
    return (levels if zero_point is None else levels - zero_point) * scale


def quantized_range(bits: int, zero_point: ArrayLike | None, narrow: bool | None) -> tuple[int, int]:
    """The range of `quantize`: narrow without a zero point and full with one, unless `narrow` says which."""
    return integer_range(bits, narrow=zero_point is None if narrow is None else narrow)


def scale_for(name: str, x: jax.Array, scale: ArrayLike, zero_point: ArrayLike | None) -> tuple[jax.Array, jax.Array | None]:
    """Scale and zero point in float32 that broadcast to x, and that x may be divided by; `name` is the caller's."""
    scale = jnp.maximum(jnp.asarray(scale).astype(jnp.float32), SMALLEST_NORMAL)
    scale = _repeat_groups(name, scale, x.shape)
    if zero_point is None:
        return scale, None
    return scale, _repeat_groups(name, jnp.asarray(zero_point).astype(jnp.float32), x.shape)


def _repeat_groups(name: str, scale: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    given = scale.shape
    if scale.ndim == len(shape):
        for axis, (length, groups) in enumerate(zip(shape, given, strict=True)):
            if groups not in (0, 1, length) and length % groups == 0:
                scale = jnp.repeat(scale, length // groups, axis=axis)
    if scale.ndim > len(shape) or any(n not in (1, length) for n, length in zip(scale.shape[::-1], shape[::-1], strict=False)):
        raise ValueError(
            f'{name}: a scale or zero point of shape {given} does not fit an array of shape {shape}; '
            'along every axis it must have one entry, one per index, or one per group of equal size'
        )
    return scale
