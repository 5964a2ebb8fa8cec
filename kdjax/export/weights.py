"""The student as a file: weights in safetensors, pruned ones without their zeros, quantized ones as integers.

Every array is stored in whichever of two forms takes fewer bytes: as it is, or as one bit per element and the elements that are
not zero. Nothing is lost either way, nothing is pickled, and a file says by itself how to read it:

| key            | what it holds                                                             |
|----------------|---------------------------------------------------------------------------|
| `PATH`         | an array                                                                  |
| `PATH:scale`   | the scale of a `QuantizedArray`, whose int8 values are stored as `PATH`   |
| `PATH:mask`    | bits, most significant first: which elements of `PATH` follow, the others being 0 |

The shapes of the arrays stored with a mask stand in the file's metadata.
"""

import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from kdjax.quantization import QuantizedArray

_FORMAT = 'kdjax-weights-1'
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
      ValueError: the tree holds something else than dictionaries with plain names and arrays.

    >>> import tempfile, numpy as np
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     size = save_weights(f'{folder}/w.safetensors', {'params': {'kernel': np.eye(100, dtype=np.float32)}})
    >>> size < 100 * 100 * 4 / 10
    True
    """
    arrays: dict[str, np.ndarray] = {}
    shapes: dict[str, list[int]] = {}
    for name, leaf in _flatten(variables):
        if isinstance(leaf, QuantizedArray):
            arrays[f'{name}:scale'] = np.asarray(jax.device_get(leaf.scale))
            leaf = leaf.values
        array = np.asarray(jax.device_get(leaf))
        array = np.asarray(array, order='C')  # ascontiguousarray would give an array of no axes one
        # By its bytes, for -0.0 is not nothing.
        nonzero = array.reshape(-1).view(np.uint8).reshape(array.size, -1).any(axis=1) if array.size else np.zeros(0, bool)
        packed = -(-array.size // 8) + np.count_nonzero(nonzero) * array.itemsize
        if packed + _MASK_OVERHEAD < array.nbytes:
            arrays[f'{name}:mask'] = np.packbits(nonzero)
            shapes[name] = list(array.shape)
            array = array.reshape(-1)[nonzero]
        arrays[name] = array
    metadata = {'format': _FORMAT} | ({'shapes': json.dumps(shapes, separators=(',', ':'))} if shapes else {})
    path = pathlib.Path(path)
    partial = path.with_name(path.name + '.partial')
    try:
        safetensors.numpy.save_file(arrays, partial, metadata=metadata)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path.stat().st_size


def load_weights(path: str | os.PathLike) -> dict[str, Any]:
    """Reads what `save_weights` wrote.

    Returns:
      Nested dictionaries of numpy arrays and `QuantizedArray`s; `quantization.dequantize_weights` makes the latter arrays too.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged, or is not one of kdjax's.
    """
    try:
        with safetensors.safe_open(path, framework='numpy') as file:
            metadata = file.metadata() or {}
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is not a dictionary)
    except safetensors.SafetensorError as error:
        raise ValueError(f'{path} is damaged or no safetensors file: {error}') from error
    if metadata.get('format') != _FORMAT:
        raise ValueError(f'{path} was not written by kdjax.export: its format is {metadata.get("format")!r}')
    shapes = json.loads(metadata.get('shapes', '{}'))
    if set(shapes) != {key.removesuffix(':mask') for key in arrays if key.endswith(':mask')}:
        raise ValueError(f'{path} is damaged: its masks and its shapes are not of the same arrays')
    variables: dict[str, Any] = {}
    for key, array in arrays.items():
        if ':' in key:
            continue
        if key in shapes:
            array = _unpack(path, key, array, arrays.get(f'{key}:mask'), shapes[key])
        leaf = QuantizedArray(array, arrays[f'{key}:scale']) if f'{key}:scale' in arrays else array
        *folders, name = key.split('/')
        node = variables
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = leaf
    return variables


def _unpack(path: Any, key: str, values: np.ndarray, bits: np.ndarray | None, shape: list[int]) -> np.ndarray:
    if not isinstance(shape, list) or not all(isinstance(length, int) and length >= 0 for length in shape):
        raise ValueError(f'{path} is damaged: {key} has the shape {shape}')
    size = math.prod(shape)
    if bits is not None and bits.size != -(-size // 8):
        raise ValueError(f'{path} is damaged: the mask of {key} does not fit its shape')
    kept = np.zeros(0, bool) if bits is None else np.unpackbits(bits, count=size).astype(bool)
    if kept.size != size or np.count_nonzero(kept) != values.size:
        raise ValueError(f'{path} is damaged: the mask of {key} does not fit its values')
    array = np.zeros(size, values.dtype)
    array[kept] = values
    return array.reshape(shape)


def _flatten(node: Any, prefix: str = '') -> Any:
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
    return any(jax.dtypes.issubdtype(array.dtype, kind) for kind in (np.bool_, np.integer, np.floating))
