"""Other lowerings of convolution, for Flax's `conv_general_dilated=` and the `convolution=` of `kdjax.models`."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kdjax.models._winograd import is_dense, winograd_convolution

_LAYOUTS = 'NHWC', 'HWIO', 'NHWC'
_FEW_CHANNELS = 4


def im2col_convolution(
    inputs: jax.Array,
    kernel: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    *,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """A convolution of images as one product of matrices, [positions, window] with [window, channels].

    `jax.vmap` over kernels, those of several students, makes this a batched product, where `lax.conv_general_dilated` becomes a
    grouped convolution, which XLA runs several times slower on CPUs. It holds every window at once: window times the memory of
    the inputs.

    Args:
      inputs: [batch, height, width, channels].
      kernel: [height, width, channels, channels].
      window_strides: as in `lax.conv_general_dilated`.
      padding: as there.
      lhs_dilation: none, or ones.
      rhs_dilation: none, or ones.
      dimension_numbers: those of the layouts above, or none.
      feature_group_count: 1.
      precision: of the product.
      preferred_element_type: of the product.

    Raises:
      ValueError: the convolution is dilated, grouped, not of images, or of other layouts, or the channels differ.

    >>> import jax.numpy as jnp
    >>> im2col_convolution(jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 5)), (2, 2), 'SAME').shape
    (2, 4, 4, 5)
    """
    if dimension_numbers is not None and inputs.ndim == kernel.ndim == 4:
        given, own = (lax.conv_dimension_numbers(inputs.shape, kernel.shape, x) for x in (dimension_numbers, _LAYOUTS))
        if given != own:
            raise ValueError(f'im2col_convolution: dimension_numbers must be {_LAYOUTS}, got {dimension_numbers}')
    dilations = {*(lhs_dilation or (1,)), *(rhs_dilation or (1,))}
    if inputs.ndim != 4 or kernel.ndim != 4 or dilations != {1} or feature_group_count != 1:
        raise ValueError(
            f'im2col_convolution: needs images and kernels of four axes, without dilation or groups; got {inputs.shape}, '
            f'{kernel.shape}, dilations {sorted(dilations)}, {feature_group_count} groups'
        )
    height, width, channels, _ = kernel.shape
    if inputs.shape[-1] != channels:
        raise ValueError(f'im2col_convolution: inputs {inputs.shape} and kernel {kernel.shape} must have the same channels')
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(inputs.shape[1:3], (height, width), window_strides, padding)
    inputs = jnp.pad(inputs, ((0, 0), *padding, (0, 0)))
    rows, columns = (
        (size - window) // stride + 1
        for size, window, stride in zip(inputs.shape[1:3], (height, width), window_strides, strict=True)
    )
    down, right = window_strides
    windows = [
        inputs[:, i : i + (rows - 1) * down + 1 : down, j : j + (columns - 1) * right + 1 : right]
        for i in range(height)
        for j in range(width)
    ]
    patches = jnp.concatenate(windows, axis=-1).reshape(-1, height * width * channels)
    flat = jnp.matmul(
        patches, kernel.reshape(-1, kernel.shape[-1]), precision=precision, preferred_element_type=preferred_element_type
    )
    return flat.reshape(inputs.shape[0], rows, columns, -1)


def cpu_convolution(
    inputs: jax.Array,
    kernel: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> jax.Array:
    """A convolution of images as CPUs train it fastest.

    Images of up to four channels go through `im2col_convolution`, wide 3x3 layers through `winograd_convolution`, and the rest
    through `lax.conv_general_dilated`, whose arguments it takes. XLA's own convolutions are slow on CPUs where channels are
    few, and in their gradients. Only reverse-mode derivatives go through it. Quantize the module, and remove channels, with its
    own convolutions: the variables are the same.

    >>> import jax.numpy as jnp
    >>> cpu_convolution(jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 5)), (2, 2), 'SAME').shape
    (2, 4, 4, 5)
    """
    if inputs.ndim == 4 and inputs.shape[-1] <= _FEW_CHANNELS and is_dense(options):
        return im2col_convolution(inputs, kernel, window_strides, padding, **options)
    return winograd_convolution(inputs, kernel, window_strides, padding, **options)
