"""The student as a file: weights in safetensors, pruned ones without their zeros, quantized ones as integers.

Every array is stored in whichever of two forms takes fewer bytes: as it is, or as one bit per element and the elements that are
not zero. Integers of fewer than 8 bits take no more than those. Nothing is lost, nothing is pickled, and a file says by itself
how to read it:

| key               | what it holds                                                                     |
|-------------------|-----------------------------------------------------------------------------------|
| `PATH`            | an array; of a `QuantizedArray`, its integers                                     |
| `PATH:scale`      | the scale of a `QuantizedArray`                                                   |
| `PATH:zero_point` | its zero point, if it has one                                                     |
| `PATH:mask`       | bits, most significant first: which elements of `PATH` follow, the others being 0 |

As JSON, the metadata of the file hold `bits`, how many bits each array of integers of fewer than 8 takes, and `shapes`, those
of these arrays and of the ones with a mask. Integers of fewer bits, in two's complement, stand one after the other, most
significant bit first, so that a byte holds two of 4 bits.
"""

import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax.traverse_util import unflatten_dict

from kdjax.export._runtime import WEIGHTS_FORMAT, read_arrays
from kdjax.files import write_whole
from kdjax.quantization import QuantizedArray

# What the file's header needs to describe one more array, about.
_MASK_OVERHEAD = 128


def save_weights(path: str | os.PathLike, variables: Mapping[str, Any]) -> int:
    """Writes a network's variables to a file, whole or not at all.

    Args:
      path: the file, conventionally `*.safetensors`; its folder must exist. A file that is there is replaced.
      variables: nested dictionaries of arrays and `QuantizedArray`s.

    Returns:
      The size of the file in bytes.

    Raises:
      ValueError: the tree holds something else than dictionaries with plain names and arrays, or a `QuantizedArray` holds
        integers that its bits do not.

    >>> import tempfile, numpy as np
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     size = save_weights(f'{folder}/w.safetensors', {'params': {'kernel': np.eye(100, dtype=np.float32)}})
    >>> size < 100 * 100 * 4 / 10
    True
    """
    arrays: dict[str, np.ndarray] = {}
    shapes: dict[str, list[int]] = {}
    bits: dict[str, int] = {}
    for name, leaf in _flatten(variables):
        if isinstance(leaf, QuantizedArray) and leaf.bits < 8:
            bits[name] = leaf.bits
        for keys, array in jax.tree_util.tree_leaves_with_path(leaf):
            key = name + weight_name(keys)
            array = np.asarray(jax.device_get(array), order='C')  # ascontiguousarray would give an array of no axes one
            stored = _stored(key, array, bits.get(key))
            arrays |= stored
            if key in bits or f'{key}:mask' in stored:
                shapes[key] = list(array.shape)
    notes = {name: json.dumps(note, separators=(',', ':')) for name, note in (('shapes', shapes), ('bits', bits)) if note}
    # `save_file` would make a file that its owner alone can read.
    write_whole(path, safetensors.numpy.save(arrays, metadata={'format': WEIGHTS_FORMAT, **notes}))
    return pathlib.Path(path).stat().st_size


def load_weights(path: str | os.PathLike) -> dict[str, Any]:
    """Reads what `save_weights` wrote.

    Returns:
      Nested dictionaries of numpy arrays and `QuantizedArray`s; `quantization.dequantize_weights` makes the latter arrays too.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged, or is not one of kdjax's.
    """
    arrays, bits = read_arrays(path)
    entries: dict[str, Any] = dict(arrays)
    leaves = {}
    for key, leaf in entries.items():
        if ':' in key:
            continue
        if f'{key}:scale' in entries:
            leaf = QuantizedArray(leaf, entries[f'{key}:scale'], entries.get(f'{key}:zero_point'), bits.get(key, 8))
        leaves[key] = leaf
    return unflatten_dict(leaves, sep='/')


def check_storable(variables: Mapping[str, Any]) -> None:
    """Checks what `save_weights` checks of the tree.

    Raises:
      ValueError: it holds something else than dictionaries with plain names and arrays.
    """
    for _ in _flatten(variables):
        pass


def weight_name(keys: tuple[Any, ...]) -> str:
    """The name under which an array is stored, from its key path in the tree.

    >>> import numpy as np
    >>> tree = {'head': {'kernel': QuantizedArray(np.ones((2, 3), np.int8), np.ones((1, 3), np.float32))}}
    >>> [weight_name(keys) for keys, array in jax.tree_util.tree_leaves_with_path(tree)]
    ['head/kernel', 'head/kernel:scale']
    """
    path = '/'.join(key.key for key in keys if isinstance(key, jax.tree_util.DictKey))
    parts = [key.name for key in keys if isinstance(key, jax.tree_util.GetAttrKey) and key.name != 'values']
    return ':'.join([path, *parts])


def _stored(key: str, array: np.ndarray, bits: int | None) -> dict[str, np.ndarray]:
    """The array, or its mask and what it leaves; `bits` are those that its integers need, if they are fewer than 8."""
    # By its bytes, for -0.0 is not nothing.
    nonzero = array.reshape(-1).view(np.uint8).reshape(array.size, -1).any(axis=1) if array.size else np.zeros(0, bool)
    width = bits or 8 * array.itemsize
    mask = {}
    if array.size + np.count_nonzero(nonzero) * width + 8 * _MASK_OVERHEAD < array.size * width:
        mask[f'{key}:mask'] = np.packbits(nonzero)
        array = array.reshape(-1)[nonzero]
    return {key: array if bits is None else _pack_bits(key, array, bits), **mask}


def _pack_bits(name: str, integers: np.ndarray, bits: int) -> np.ndarray:
    if integers.dtype != np.int8 or np.any(integers < -(2 ** (bits - 1))) or np.any(integers >= 2 ** (bits - 1)):
        raise ValueError(f'save_weights: {name} holds integers that need more than its {bits} bits: quantize it again')
    digits = np.unpackbits(integers.reshape(-1, 1).view(np.uint8), axis=1)
    return np.packbits(digits[:, 8 - bits :])


def _flatten(node: Any, prefix: str = '') -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        for name, child in node.items():
            if not isinstance(name, str) or not name or '/' in name or ':' in name:
                raise ValueError(
                    f'cannot store the name {name!r} under {prefix or "the root"}: names are strings without / and :'
                )
            yield from _flatten(child, f'{prefix}/{name}' if prefix else name)
    elif isinstance(node, QuantizedArray) or (isinstance(node, (jax.Array, np.ndarray)) and _is_plain(node)):
        yield prefix, node
    else:
        raise ValueError(f'cannot store {type(node).__name__} at {prefix}: only dictionaries of arrays of numbers')


def _is_plain(array: Any) -> bool:
    return any(jnp.issubdtype(array.dtype, kind) for kind in (np.bool_, np.integer, np.floating))
