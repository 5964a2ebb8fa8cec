"""GGUF, the format of llama.cpp: what a file says of its network, and its arrays under their own names."""

# An extra, that may not be installed.
# pyright: reportMissingImports=false

import dataclasses
import math
import os
import pathlib
from typing import Any

import numpy as np

from kdjax.errors import first_line

_ROWS = 1024


@dataclasses.dataclass(frozen=True)
class _Dequantized:
    """An array that is read into float32 each time that it is asked for."""

    shape: tuple[int, ...]
    dtype: np.dtype
    data: np.ndarray
    kind: Any

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        from gguf import quants

        # gguf makes several copies on its way: of so many rows at a time.
        rows = self.data.reshape(-1, self.data.shape[-1])
        array = np.empty((len(rows), math.prod(self.shape) // max(len(rows), 1)), np.float32)
        for begin in range(0, len(rows), _ROWS):
            array[begin : begin + _ROWS] = quants.dequantize(rows[begin : begin + _ROWS], self.kind)
        array = array.reshape(self.shape)
        return array if dtype is None else array.astype(dtype, copy=False)


def read_gguf(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a file says, by key, and its arrays by name; quantized ones take memory only when they are used.

    Arrays are [outputs, inputs], as PyTorch has them. Those of float16, float32 and float64 keep their dtype, and all others
    become float32 by gguf's own rule.

    Raises:
      ValueError: the file is damaged, of another format, or quantized in a way that gguf cannot undo.
      ImportError: gguf is not installed.
    """
    try:
        import gguf
        from gguf import quants
    except ImportError as error:
        raise ImportError("reading GGUF needs gguf, which is not installed: pip install 'kdjax[pretrained]'") from error
    path = pathlib.Path(path)
    try:
        reader = gguf.GGUFReader(path)
        said = {name: field.contents() for name, field in reader.fields.items()}
        tensors = list(reader.tensors)
    except Exception as error:
        raise ValueError(f'{path} is damaged or no GGUF file: {first_line(error)}') from error
    plain = {gguf.GGMLQuantizationType[f'F{bits}']: np.dtype(f'float{bits}') for bits in (16, 32, 64)}
    arrays: dict[str, Any] = {}
    for tensor in tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        if tensor.tensor_type in plain:
            array = tensor.data.view(plain[tensor.tensor_type])
            arrays[tensor.name] = array.reshape(shape)
            continue
        try:
            # One block, for whether it can be undone at all.
            _, size = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
            quants.dequantize(np.zeros((1, size), np.uint8), tensor.tensor_type)
        except (NotImplementedError, KeyError) as error:
            raise ValueError(f'{path}: gguf cannot read {tensor.name}, which is {tensor.tensor_type.name}') from error
        arrays[tensor.name] = _Dequantized(shape, np.dtype(np.float32), tensor.data, tensor.tensor_type)
        if tensor.n_elements != math.prod(shape):
            raise ValueError(f'{path} is damaged: {tensor.name} has {tensor.n_elements} numbers, and {shape} is said')
    return said, arrays
