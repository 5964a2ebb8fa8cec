"""Trees of weights as integers, or in half precision."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from kdjax import paths
from kdjax.paths import Leaves, kernels, select
from kdjax.quantization._arrays import QuantizedArray, quantize
from kdjax.quantization._scales import shared_scale, symmetric_scale


def quantize_weights(
    params: Any,
    *,
    leaves: Leaves = kernels,
    bits: int = 8,
    channel_axis: int | Sequence[int] | None = -1,
    group_size: int | None = None,
    group_axis: int = -2,
    narrow: bool = True,
    shared: Sequence[Leaves] = (),
) -> Any:
    """Replaces the weights of a tree by `QuantizedArray`s: symmetric int8, one scale per output channel (the last axis).

    What is already a `QuantizedArray` stays as it is, so a second call may quantize the rest with other numbers of bits.

    Args:
      params: a tree of arrays.
      leaves: which arrays; biases and norms stay as they are unless they are named.
      bits: 2 to 8; fewer bits usually want groups, for example 4 bits in groups of 32.
      channel_axis: the axis or axes along which every index gets a scale of its own; None for one scale per array.
      group_size: how many neighbours along `group_axis` share a scale; None for all.
      group_axis: the axis that groups divide: by default the last but one, over which a dense kernel is contracted.
      narrow: whether the range leaves out the smallest integer.
      shared: every entry picks, from the chosen arrays, several that have one scale together, without channels and groups.

    Returns:
      The tree with `QuantizedArray`s in the place of the chosen arrays.

    Raises:
      ValueError: `leaves` or an entry of `shared` picks nothing, an array would share two scales, an array is not floating
        point, or groups do not divide it; the message names the array.

    >>> import jax.numpy as jnp
    >>> params = {'key': {'kernel': jnp.array([[1.27, 2.0]])}, 'query': {'kernel': jnp.ones((2, 1))}}
    >>> tree = quantize_weights(params)
    >>> print(tree['key']['kernel'].values, tree['key']['kernel'].scale)
    [[127 127]] [[0.01       0.01574803]]
    >>> tree = quantize_weights(params, bits=4, shared=['*/kernel'])
    >>> print(tree['key']['kernel'].values, tree['key']['kernel'].scale, tree['query']['kernel'].scale)
    [[4 7]] 0.2857143 0.2857143
    """
    chosen = select(leaves, _without_quantized(params))
    scales: dict[str, jax.Array] = {}
    for entry in shared:
        together = select(entry, chosen)
        twice = sorted(scales.keys() & together.keys())
        if twice:
            raise ValueError(f'quantize_weights: {twice[0]} would share two scales; name it in one entry of `shared`')
        scales |= dict.fromkeys(together, shared_scale(list(together.values()), bits=bits, narrow=narrow))
    grouping: dict[str, Any] = {'channel_axis': channel_axis, 'group_size': group_size, 'group_axis': group_axis}

    def convert(path: str, leaf: Any) -> Any:
        if path not in chosen:
            return leaf
        try:
            scale = scales[path] if path in scales else symmetric_scale(leaf, bits=bits, narrow=narrow, **grouping)
        except ValueError as error:
            raise ValueError(f'quantize_weights: {path}: {error}') from error
        return QuantizedArray(quantize(leaf, scale, bits=bits, narrow=narrow), scale, bits=bits)

    return _map_arrays(convert, params)


def dequantize_weights(params: Any) -> Any:
    """Replaces the `QuantizedArray`s of a tree by float32 arrays, which any network can use.

    >>> import jax.numpy as jnp
    >>> print(dequantize_weights({'kernel': QuantizedArray(jnp.array([2], jnp.int8), jnp.array([0.5]))}))
    {'kernel': Array([1.], dtype=float32)}
    """
    return jax.tree.map(lambda leaf: leaf.dequantize() if is_quantized(leaf) else leaf, params, is_leaf=is_quantized)


def floating(path: str, leaf: jax.Array) -> bool:
    """The arrays that are cast unless said otherwise: those of floating-point numbers."""
    del path
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def cast_weights(params: Any, dtype: DTypeLike, *, leaves: Leaves = floating) -> Any:
    """Casts the weights of a tree to another floating-point type, such as float16 or bfloat16.

    Numbers beyond the largest of the type become the largest, not infinity. `QuantizedArray`s stay as they are.

    Args:
      params: a tree of arrays.
      dtype: the new type.
      leaves: which arrays.

    Raises:
      ValueError: `leaves` picks nothing, or the type or an array that was picked is not floating point.

    >>> import jax.numpy as jnp
    >>> print(cast_weights({'kernel': jnp.array([1 / 3, 1e6])}, jnp.float16))
    {'kernel': Array([3.333e-01, 6.550e+04], dtype=float16)}
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f'cast_weights: dtype must be floating point, got {jnp.dtype(dtype)}; use quantize_weights')
    chosen = select(leaves, _without_quantized(params))
    largest = float(jnp.finfo(dtype).max)

    def convert(path: str, leaf: Any) -> Any:
        if path not in chosen:
            return leaf
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f'cast_weights: {path} is {leaf.dtype}; leave arrays of integers out of `leaves`')
        narrower = jnp.finfo(dtype).max < jnp.finfo(leaf.dtype).max
        return (jnp.clip(leaf, -largest, largest) if narrower else leaf).astype(dtype)

    return _map_arrays(convert, params)


def is_quantized(leaf: Any) -> bool:
    """Whether a node of a tree is a `QuantizedArray`."""
    return isinstance(leaf, QuantizedArray)


def _without_quantized(params: Any) -> Any:
    return jax.tree.map(lambda leaf: None if is_quantized(leaf) else leaf, params, is_leaf=is_quantized)


def _map_arrays(function: Any, params: Any) -> Any:
    call = lambda keys, leaf: leaf if is_quantized(leaf) else function(paths.path_of(keys), leaf)  # noqa: E731
    return jax.tree_util.tree_map_with_path(call, params, is_leaf=is_quantized)
