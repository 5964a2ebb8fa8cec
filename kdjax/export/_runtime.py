"""Runs a student that `kdjax.export.save` wrote, where kdjax is not installed: `pip install jax flatbuffers safetensors`.

Every such folder holds this file as `load.py`. From beside it:

    import load
    model = load.load('.')
    logits = model(images)

Nothing is unpickled, and no code of the folder is run: `model.stablehlo` is a program of XLA, the rest is numbers and text.
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import numpy as np
import safetensors

ARTEFACT_FORMAT = 'kdjax-artefact-1'
WEIGHTS_FORMAT = 'kdjax-weights-1'
PROGRAM, WEIGHTS, LOADER, MANIFEST = 'model.stablehlo', 'weights.safetensors', 'load.py', 'manifest.json'


@dataclasses.dataclass(frozen=True)
class Artefact:
    """A student that is ready to run: called with a batch of inputs, of any size, it returns the logits.

    Inputs are the pytree that it was saved with: an array, or a dictionary, list or tuple of arrays.

    Attributes:
      manifest: what `manifest.json` says, the caller's own metadata under `'metadata'` among it.
      weights: arrays by name, on the device.
      apply: the compiled program, `apply(weights, inputs) -> logits`.
    """

    manifest: dict[str, Any]
    weights: dict[str, jax.Array]
    apply: Callable[[dict[str, jax.Array], Any], jax.Array]

    def __call__(self, inputs: Any) -> jax.Array:
        """The logits of a batch.

        Raises:
          ValueError: the inputs have other shapes or dtypes than the manifest says, or the device is of another platform.
        """
        return self.apply(self.weights, inputs)


def load(folder: str | os.PathLike) -> Artefact:
    """Reads what `kdjax.export.save` wrote, after checking every file against the manifest.

    Args:
      folder: the artefact.

    Returns:
      The student, a function of a batch of inputs.

    Raises:
      ValueError: the folder is no artefact or one of another version, a file is missing, damaged or was changed, or this jax is
        too old for the program.
    """
    folder = pathlib.Path(folder)
    manifest = read_manifest(folder)
    for name, file in manifest['files'].items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f'load: {folder} has no {name}: copy the whole folder again')
        if path.stat().st_size != file['bytes'] or digest(path.read_bytes()) != file['sha256']:
            raise ValueError(f'load: {path} is damaged or was changed: it is not what the manifest says; copy the folder again')
    try:
        exported = jax.export.deserialize(bytearray((folder / PROGRAM).read_bytes()))
        exported.mlir_module()  # a program of a newer jax would otherwise fail only when it runs
        (expected, _), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
    except ImportError:
        raise
    except Exception as error:  # whatever the decoder raises for bytes that it did not expect
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        versions = f'written by jax {manifest["jax"]}, cannot be read by jax {jax.__version__}'
        raise ValueError(f'load: {folder / PROGRAM}, {versions}: {reason}') from error
    arrays, _ = read_arrays(folder / WEIGHTS)
    described = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    if described != {name: (array.shape, array.dtype) for name, array in expected.items()}:
        raise ValueError(f'load: {folder} is damaged: its {len(arrays)} weights are not the {len(expected)} of the program')
    return Artefact(manifest, jax.tree.map(jax.numpy.asarray, arrays), jax.jit(exported.call))


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    """Reads `manifest.json` and checks its version, its own checksum, and that it lists the files of an artefact.

    Raises:
      ValueError: there is none, or it does not pass.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f'load: {folder} is no artefact: it has no {MANIFEST}')
    try:
        manifest = json.loads(path.read_bytes())
        version = manifest.get('format')
    except (ValueError, AttributeError) as error:
        raise ValueError(f'load: {path} is damaged: it is no JSON object') from error
    if version != ARTEFACT_FORMAT:
        raise ValueError(f'load: {path} is of the format {version!r}, and this reads {ARTEFACT_FORMAT!r}: use a matching kdjax')
    if manifest.get('sha256') != manifest_digest(manifest) or set(manifest['files']) != {PROGRAM, WEIGHTS, LOADER}:
        raise ValueError(f'load: {path} is damaged or was changed: copy the folder again')
    return manifest


def manifest_digest(manifest: dict[str, Any]) -> str:
    """The checksum that a manifest carries of everything else in it, in whatever order and spacing it is written."""
    rest = {name: value for name, value in manifest.items() if name != 'sha256'}
    return digest(json.dumps(rest, sort_keys=True).encode())


def digest(content: bytes) -> str:
    """The SHA-256 of bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def read_arrays(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Reads a file that `kdjax.export.save_weights` wrote, as arrays by name.

    Returns:
      The arrays, a quantized one as its integers under its own name, its scale under `'name:scale'` and its zero point, if it
      has one, under `'name:zero_point'`; and the bits of the integers that need fewer than 8, by name.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged, or is not one of kdjax's.
    """
    try:
        with safetensors.safe_open(path, framework='numpy') as file:
            metadata = file.metadata() or {}
            stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is not a dictionary)
    except safetensors.SafetensorError as error:
        raise ValueError(f'{path} is damaged or no safetensors file: {error}') from error
    if metadata.get('format') != WEIGHTS_FORMAT:
        raise ValueError(f'{path} was not written by kdjax.export: its format is {metadata.get("format")!r}')
    try:
        shapes, bits = (json.loads(metadata.get(name, '{}')) for name in ('shapes', 'bits'))
        masks = {key.removesuffix(':mask'): array for key, array in stored.items() if key.endswith(':mask')}
        if shapes.keys() != masks.keys() | bits.keys():
            raise ValueError('its masks and its shapes are not of the same arrays')
        arrays = {key: array for key, array in stored.items() if not key.endswith(':mask')}
        for key, shape in shapes.items():
            arrays[key] = _restore(key, arrays[key], shape, masks.get(key), bits.get(key))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f'{path} is damaged: {error}') from error
    return arrays, bits


def unpack_bits(content: np.ndarray, bits: int, size: int) -> np.ndarray:
    """Integers of 8 bits from integers of fewer that stand one after the other, most significant bit first."""
    digits = np.unpackbits(content, count=size * bits).reshape(size, bits)
    # The sign is the first digit; repeating it widens the number.
    return np.packbits(np.pad(digits, ((0, 0), (8 - bits, 0)), mode='edge'), axis=1).reshape(size).view(np.int8)


def _restore(key: str, array: np.ndarray, shape: list[int], mask: np.ndarray | None, bits: int | None) -> np.ndarray:
    if not isinstance(shape, list) or not all(isinstance(length, int) and length >= 0 for length in shape):
        raise ValueError(f'{key} has the shape {shape}')
    size = math.prod(shape)
    if mask is not None and mask.size != -(-size // 8):
        raise ValueError(f'the mask of {key} does not fit its shape')
    kept = np.ones(size, bool) if mask is None else np.unpackbits(mask, count=size).astype(bool)
    count = int(np.count_nonzero(kept))
    if bits is not None and array.size == -(-count * bits // 8):
        array = unpack_bits(array, bits, count)
    if array.size != count:
        raise ValueError(f'the values of {key} do not fit its shape or its mask')
    dense = np.zeros(size, array.dtype)
    dense[kept] = array
    return dense.reshape(shape)
