"""Files of weights, mapped into memory or read an array at a time. No file is ever executed."""

# An extra, that may not be installed.
# pyright: reportMissingImports=false

import dataclasses
import json
import os
import pathlib
import zipfile
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from kdjax.errors import first_line
from kdjax.pretrained._gguf import read_gguf

INDEX = 'model.safetensors.index.json'
_SAFETENSORS = {
    'BOOL': np.bool_,
    **{f'{sign}{bits}': np.dtype(f'{name}{bits}') for sign, name in (('U', 'uint'), ('I', 'int')) for bits in (8, 16, 32, 64)},
    **{f'F{bits}': np.dtype(f'float{bits}') for bits in (16, 32, 64)},
    'BF16': ml_dtypes.bfloat16,
    'F8_E4M3': ml_dtypes.float8_e4m3fn,
    'F8_E5M2': ml_dtypes.float8_e5m2,
}


@dataclasses.dataclass(frozen=True)
class _Unread:
    """An array that is read each time that it is asked for."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self.read()
        return array if dtype is None else array.astype(dtype, copy=False)


def read_state_dict(path: str | os.PathLike) -> dict[str, Any]:
    """The arrays of a file or folder by their names, none of which takes memory before it is used.

    | what                                   | how                                                                    |
    |----------------------------------------|------------------------------------------------------------------------|
    | `*.safetensors`                        | mapped into memory                                                     |
    | `model.safetensors.index.json`         | all files that it lists, mapped into memory                            |
    | `*.gguf`                               | mapped into memory, quantized ones read into float32 when used         |
    | `*.npz`                                | an array is read when used                                             |
    | `*.bin`, `*.pt`, `*.pth`               | mapped by torch, which is asked for weights alone and runs nothing     |
    | a folder                               | its `model.safetensors`, or its index of several                       |

    Raises:
      ValueError: there is no such file, it is damaged, or of none of these formats.
      ImportError: gguf or torch is needed and not installed.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.savez(f'{folder}/weights.npz', kernel=np.ones((2, 3)))
    ...     arrays = read_state_dict(f'{folder}/weights.npz')
    ...     arrays['kernel'].shape, np.asarray(arrays['kernel']).tolist()[0]
    ((2, 3), [1.0, 1.0, 1.0])
    """
    path = pathlib.Path(path)
    if path.is_dir():
        found = [path / name for name in (INDEX, 'model.safetensors') if (path / name).exists()]
        if not found:
            others = ', '.join(sorted(each.name for each in path.iterdir())[:10]) or 'nothing'
            raise ValueError(f'{path} has neither model.safetensors nor {INDEX}; there is: {others}')
        if len(found) > 1:
            raise ValueError(f'{path} has both model.safetensors and {INDEX}: name the file that is meant')
        path = found[0]
    if not path.exists():
        raise ValueError(f'there is no {path}')
    readers = {
        '.safetensors': _read_safetensors,
        '.json': _read_shards,
        '.gguf': lambda path: read_gguf(path)[1],
        '.npz': _read_npz,
        **dict.fromkeys(('.bin', '.pt', '.pth'), _read_torch),
    }
    if path.suffix not in readers:
        raise ValueError(f'{path} must be one of {", ".join(readers)}, or a folder')
    return readers[path.suffix](path)


def _read_safetensors(path: pathlib.Path) -> dict[str, Any]:
    try:
        with safetensors.safe_open(path, framework='numpy'):
            pass  # it has looked at the header, and whether all that it promises is there
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f'{path} is damaged or no safetensors file: {first_line(error)}') from error
    with path.open('rb') as file:
        length = int.from_bytes(file.read(8), 'little')
        header = json.loads(file.read(length))
    header.pop('__metadata__', None)
    unknown = {entry['dtype'] for entry in header.values()} - set(_SAFETENSORS)
    if unknown:
        raise ValueError(f'{path} has arrays of {", ".join(sorted(unknown))}; known are {", ".join(_SAFETENSORS)}')
    mapped = np.memmap(path, np.uint8, 'r')[8 + length :]

    def view(entry: dict) -> np.ndarray:
        begin, end = entry['data_offsets']
        # The format aligns the whole, not each array, as numpy wants it.
        return np.ndarray(entry['shape'], _SAFETENSORS[entry['dtype']], mapped[begin:end].data)

    return {name: view(entry) for name, entry in header.items()}


def _read_shards(path: pathlib.Path) -> dict[str, Any]:
    try:
        listed = json.loads(path.read_text())['weight_map']
        files = sorted(set(listed.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{path} is damaged or no index of weights: it must be JSON with a weight_map') from error
    # A name of a file is no path: an index cannot read what is elsewhere.
    absent = [name for name in files if pathlib.PurePath(name).name != name or not (path.parent / name).exists()]
    if absent:
        raise ValueError(f'{path} lists files that are not beside it: {", ".join(absent)}')
    arrays = {}
    for name in files:
        shard = _read_safetensors(path.parent / name)
        there = {key for key, file in listed.items() if file == name}
        if set(shard) != there:
            differ = sorted(set(shard) ^ there)
            raise ValueError(
                f'{path.parent / name} and {path.name} disagree on {", ".join(differ[:10])}: they are not of one save'
            )
        arrays |= shard
    return arrays


def _read_npz(path: pathlib.Path) -> dict[str, Any]:
    def read(member: str) -> np.ndarray:
        with zipfile.ZipFile(path) as archive, archive.open(member) as file:
            return np.lib.format.read_array(file, allow_pickle=False)

    arrays = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                with archive.open(member) as file:
                    version = np.lib.format.read_magic(file)
                    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                    shape, _, dtype = header(file)
                if dtype.hasobject:
                    raise ValueError(f'{member} holds Python objects, which are not read')
                arrays[member.removesuffix('.npy')] = _Unread(shape, dtype, lambda member=member: read(member))
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise ValueError(f'{path} is damaged or no file of numpy.savez: {first_line(error)}') from error
    return arrays


def _read_torch(path: pathlib.Path) -> dict[str, Any]:
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f'{path} needs torch, which is not installed: pip install torch, or save it as safetensors'
        ) from error
    try:
        tensors = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError(f'{path} is no file of weights alone that torch can map: {first_line(error)}') from error
    if not isinstance(tensors, dict) or not all(isinstance(each, torch.Tensor) for each in tensors.values()):
        raise ValueError(f'{path} must hold a state_dict, tensors by their names, and nothing beside')

    def view(tensor: Any) -> np.ndarray:
        tensor = tensor.detach()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    return {name: view(tensor) for name, tensor in tensors.items()}
