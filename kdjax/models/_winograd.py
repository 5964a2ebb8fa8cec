"""3x3 convolutions with fewer multiplications, for networks that train on CPUs."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# F(2x2, 3x3): output tile = Aᵀ [(G kernel Gᵀ) ⊙ (Bᵀ input tile B)] A.
_INPUT = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]], np.float32)
_KERNEL = np.array([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]], np.float32) / 2
_OUTPUT = np.array([[1, 1, 1, 0], [0, 1, -1, -1]], np.float32)

_LAYOUTS = 'NHWC', 'HWIO', 'NHWC'
_FEWEST_CHANNELS = 32


def winograd_convolution(
    inputs: jax.Array,
    kernel: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> jax.Array:
    """A 3x3 convolution by Winograd's minimal filtering: 16 multiplications for every 2x2 outputs, where direct sums take 36.

    Values, the gradient of the inputs and that of the kernel are all computed so. Convolutions that it is not for, those of
    another size, stride, padding or type, with dilation or groups, or with fewer than 32 channels on a side, are
    `lax.conv_general_dilated`, so a whole network can be built with it. Only reverse-mode derivatives go through it. Quantize
    and remove channels of the module with its own convolutions: the variables are the same.

    Args:
      inputs: [batch, height, width, channels].
      kernel: [height, width, channels, channels].
      window_strides: as in `lax.conv_general_dilated`.
      padding: as there.
      **options: as there; `precision` is that of the products too.

    Returns:
      [batch, height, width, channels].

    >>> import jax.numpy as jnp
    >>> images, kernel = jnp.ones((2, 8, 8, 64)), jnp.ones((3, 3, 64, 64))
    >>> winograd_convolution(images, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')).shape
    (2, 8, 8, 64)

    Reference:
      Lavin, Gray. Fast Algorithms for Convolutional Neural Networks. 2015. https://arxiv.org/abs/1509.09308
    """
    if (
        is_dense(options)
        and inputs.ndim == 4
        and kernel.shape[:2] == (3, 3)
        and min(kernel.shape[2:]) >= _FEWEST_CHANNELS
        and tuple(window_strides) == (1, 1)
        and (padding == 'SAME' or [tuple(pair) for pair in padding] == [(1, 1), (1, 1)])
        and lax.conv_dimension_numbers(inputs.shape, kernel.shape, options.get('dimension_numbers'))
        == lax.conv_dimension_numbers(inputs.shape, kernel.shape, _LAYOUTS)
        and inputs.dtype == kernel.dtype == jnp.float32
        and options.get('preferred_element_type') in (None, jnp.float32)
    ):
        return _convolve(inputs, kernel, options.get('precision'))
    return lax.conv_general_dilated(inputs, kernel, window_strides, padding, **options)


def is_dense(options: Mapping[str, Any]) -> bool:
    """Whether a convolution with these options has neither dilation nor groups."""
    dilations = (*(options.get('lhs_dilation') or ()), *(options.get('rhs_dilation') or ()))
    return {1, options.get('feature_group_count', 1), *dilations} == {1}


def _forward(inputs: jax.Array, kernel: jax.Array, precision: Any) -> jax.Array:
    batch, height, width, _ = inputs.shape
    rows, columns = -(-height // 2), -(-width // 2)
    tiles = _input_tiles(inputs)
    kernels = jnp.einsum('ai,bj,ijcd->abcd', _KERNEL, _KERNEL, kernel, precision=lax.Precision.HIGHEST)
    products = [[jnp.matmul(tiles[a][b], kernels[a, b], precision=precision) for b in range(4)] for a in range(4)]
    outputs = _transform(_OUTPUT, products)
    outputs = jnp.stack([jnp.stack(row, axis=1) for row in outputs], axis=1)
    outputs = outputs.reshape(batch, rows, columns, 2, 2, -1).swapaxes(2, 3)
    return outputs.reshape(batch, 2 * rows, 2 * columns, -1)[:, :height, :width]


def _forward_and_operands(
    inputs: jax.Array, kernel: jax.Array, precision: Any
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _convolve(inputs, kernel, precision), (inputs, kernel)


def _backward(precision: Any, operands: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    inputs, kernel = operands
    # Towards the inputs it is a convolution again, with the kernel turned round.
    of_inputs = _convolve(gradient, kernel[::-1, ::-1].swapaxes(2, 3), precision)
    tiles = _input_tiles(inputs)
    even = jnp.pad(gradient, ((0, 0), (0, gradient.shape[1] % 2), (0, gradient.shape[2] % 2), (0, 0)))
    flat = [[even[:, i::2, j::2].reshape(-1, even.shape[-1]) for j in range(2)] for i in range(2)]
    gradients = _transform(_OUTPUT.T, flat)
    products = [[jnp.matmul(tiles[a][b].T, gradients[a][b], precision=precision) for b in range(4)] for a in range(4)]
    stacked = jnp.stack([jnp.stack(row) for row in products])
    of_kernel = jnp.einsum('ai,bj,abcd->ijcd', _KERNEL, _KERNEL, stacked, precision=lax.Precision.HIGHEST)
    return of_inputs, of_kernel


_convolve = jax.custom_vjp(_forward, nondiff_argnums=(2,))
_convolve.defvjp(_forward_and_operands, _backward)


def _input_tiles(inputs: jax.Array) -> list[list[jax.Array]]:
    """Transformed 4x4 tiles that overlap by two, each of the 16 entries [tiles, channels]."""
    _, height, width, channels = inputs.shape
    padded = jnp.pad(inputs, ((0, 0), (1, 1 + height % 2), (1, 1 + width % 2), (0, 0)))
    rows, columns = padded.shape[1] - 2, padded.shape[2] - 2
    tiles = [[padded[:, i : i + rows : 2, j : j + columns : 2] for j in range(4)] for i in range(4)]
    return [[tile.reshape(-1, channels) for tile in row] for row in _transform(_INPUT, tiles)]


def _transform(matrix: np.ndarray, tile: list[list[jax.Array]]) -> list[list[jax.Array]]:
    """Computes matrix · tile · matrixᵀ, where the entries of the tile are arrays and those of the matrix 0, 1 and -1."""
    columns = [[_add_up(row, [line[j] for line in tile]) for row in matrix] for j in range(len(tile[0]))]
    return [[_add_up(row, [column[i] for column in columns]) for row in matrix] for i in range(len(matrix))]


def _add_up(signs: np.ndarray, arrays: list[jax.Array]) -> jax.Array:
    # Written out, so that XLA fuses the sums; a product with the matrix would be one more product of arrays.
    terms = [array if sign > 0 else -array for sign, array in zip(signs, arrays, strict=True) if sign]
    return sum(terms[1:], terms[0])
