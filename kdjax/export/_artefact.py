"""The student as a folder that runs where kdjax is not installed.

| file                  | what it holds                                                                                     |
|-----------------------|---------------------------------------------------------------------------------------------------|
| `model.stablehlo`     | the forward pass, from weights and inputs to logits, for any size of the batch (see `jax.export`) |
| `weights.safetensors` | the weights as `save_weights` writes them: integers as integers, without the zeros of pruning     |
| `manifest.json`       | shapes and dtypes, the weights in the order in which the program takes them, checksums            |
| `load.py`             | `load`, for a process that has jax, flatbuffers and safetensors, and not kdjax                    |

The program takes the weights in memory as they were given to `save`: int8 stays int8, and zeros are put back.
"""

import inspect
import json
import os
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp

from kdjax import jaxprs
from kdjax.export import _runtime
from kdjax.export._runtime import LOADER, MANIFEST, PROGRAM, WEIGHTS
from kdjax.export._weights import check_storable, save_weights, weight_name
from kdjax.networks import Network, dense_logits
from kdjax.quantization import dequantize_weights

_PLATFORMS = ('cpu', 'cuda', 'rocm', 'tpu')


def save(
    folder: str | os.PathLike,
    network: Network,
    variables: Mapping[str, Any],
    inputs: Any,
    *,
    platforms: str | Sequence[str] = ('cpu', 'cuda'),
    metadata: Mapping[str, Any] | None = None,
) -> int:
    """Writes a network and its variables as a folder that runs with jax alone, whole or not at all.

    What is written is `network.apply(variables, inputs)` up to the logits, without training. A network that takes
    `QuantizedArray`s gets them; any other one is made to take them by `dequantizing`.

    Args:
      folder: where to; made if it is not there, with its parents. An artefact that is there is replaced.
      network: the student.
      variables: its parameters and state: nested dictionaries of arrays and `QuantizedArray`s.
      inputs: a batch of inputs, any pytree of arrays or of their `jax.ShapeDtypeStruct`; the first axis of every array is the
        batch, whose size is left open. Labels, masks and weights are no inputs.
      platforms: what it is to run on, of `'cpu'`, `'cuda'`, `'rocm'` and `'tpu'`; none of them needs to be there now.
      metadata: what else the manifest is to hold, such as the names of the classes; anything that JSON can.

    Returns:
      The size of the folder's files in bytes.

    Raises:
      ValueError: the folder holds something else than an artefact, a platform is unknown, the network gives no logits or does
        not take these variables, or the metadata are not JSON.

    >>> import tempfile, flax.linen as nn, jax, jax.numpy as jnp
    >>> from kdjax import export, networks
    >>> network = networks.from_linen(nn.Dense(3))
    >>> inputs = jnp.ones((2, 5))
    >>> variables = network.init(jax.random.key(0), inputs)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     size = export.save(f'{folder}/student', network, variables, inputs, metadata={'classes': ['a', 'b', 'c']})
    ...     student = export.load(f'{folder}/student')
    >>> student(jnp.ones((7, 5))).shape, student.manifest['inputs'], student.manifest['metadata']['classes']
    ((7, 3), {'shape': ['batch', 5], 'dtype': 'float32'}, ['a', 'b', 'c'])
    """
    folder = pathlib.Path(folder).absolute()
    _check_replaceable(folder)
    check_storable(variables)
    variables = jax.tree.map(jnp.asarray, variables)  # the file holds what the program takes, without float64
    exported = _export(network, variables, inputs, (platforms,) if isinstance(platforms, str) else tuple(platforms))
    (weights, expected), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
    manifest = {
        'format': _runtime.ARTEFACT_FORMAT,
        'jax': jax.__version__,
        'platforms': exported.platforms,
        'inputs': jax.tree.map(_describe, expected),
        'outputs': _describe(exported.out_avals[0]),
        'weights': list(weights),
        'metadata': _as_json(metadata or {}),
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the folder, for files are renamed only within a file system.
    with tempfile.TemporaryDirectory(prefix=f'.{folder.name}-', dir=folder.parent) as workspace:
        new, old = pathlib.Path(workspace, 'new'), pathlib.Path(workspace, 'old')
        new.mkdir()
        save_weights(new / WEIGHTS, variables)
        (new / PROGRAM).write_bytes(exported.serialize())
        (new / LOADER).write_text(inspect.getsource(_runtime), encoding='utf-8')
        files = {name: (new / name).read_bytes() for name in (PROGRAM, WEIGHTS, LOADER)}
        manifest['files'] = {name: {'bytes': len(file), 'sha256': _runtime.digest(file)} for name, file in files.items()}
        manifest = _as_json(manifest)
        manifest['sha256'] = _runtime.manifest_digest(manifest)
        (new / MANIFEST).write_text(json.dumps(manifest, indent=2) + '\n', encoding='utf-8')
        size = sum(file.stat().st_size for file in new.iterdir())
        _replace(folder, new, old)
    return size


def dequantizing(network: Network) -> Network:
    """Makes a network whose weights may be `QuantizedArray`s: each forward pass begins by turning them into float32.

    This is weight-only quantization: the weights are integers in the file and in memory, the arithmetic is in floating point.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> from kdjax import networks, quantization
    >>> network = dequantizing(networks.from_linen(nn.Dense(3)))
    >>> variables = quantization.quantize_weights(network.init(jax.random.key(0), jnp.ones((2, 5))))
    >>> network.apply(variables, jnp.ones((2, 5)))[0].logits.shape
    (2, 3)
    """

    def apply(
        variables: Mapping[str, Any], inputs: Any, *, train: bool = False, rng: jax.Array | None = None
    ) -> tuple[Any, dict[str, Any]]:
        return network.apply(dequantize_weights(variables), inputs, train=train, rng=rng)

    return Network(network.init, apply)


def _export(network: Network, variables: Mapping[str, Any], inputs: Any, platforms: tuple[str, ...]) -> jax.export.Exported:
    unknown = [platform for platform in platforms if platform not in _PLATFORMS]
    if unknown or not platforms:
        raise ValueError(f'save: platforms must be some of {", ".join(_PLATFORMS)}, got {unknown[0] if unknown else "none"!r}')
    if any(jnp.ndim(x) == 0 for x in jax.tree.leaves(inputs)):
        raise ValueError('save: every array of inputs must have the batch as its first axis, got a scalar: pass a whole batch')
    leaves, structure = jax.tree_util.tree_flatten_with_path(variables)
    names = [weight_name(keys) for keys, _ in leaves]

    def forward(weights: dict[str, jax.Array], inputs: Any) -> jax.Array:
        return dense_logits(network.apply(jax.tree.unflatten(structure, [weights[name] for name in names]), inputs)[0].logits)

    weights = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, (_, leaf) in zip(names, leaves, strict=True)}
    batch = jax.export.symbolic_args_specs(inputs, 'batch, ...')
    program = jax.jit(forward, keep_unused=True)  # or other runtimes could not tell the weights by their order
    # Else the program names the source files of this machine, and equal networks give unequal programs.
    setting = 'jax_traceback_in_locations_limit'
    frames = getattr(jax.config, setting)
    jax.config.update(setting, 0)
    try:
        exported = jax.export.export(program, platforms=platforms)(weights, batch)
    except Exception as error:
        jaxprs.refuse_batch(inputs, error)
        if any(':' in name for name in names):
            raise ValueError('save: the network does not take QuantizedArrays: pass dequantizing(network)') from error
        raise
    finally:
        jax.config.update(setting, frames)
    if len(exported.out_avals) != 1:
        raise ValueError(f'save: the network must give logits, one array, got {len(exported.out_avals)}: export one that does')
    return exported


def _describe(array: Any) -> dict[str, Any]:
    return {'shape': [x if isinstance(x, int) else str(x) for x in array.shape], 'dtype': array.dtype.name}


def _as_json(value: Any) -> Any:
    """The value as it will be read again, with lists for tuples."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f'save: metadata must be what JSON can hold, and are not: {error}') from error


def _check_replaceable(folder: pathlib.Path) -> None:
    if not folder.exists():
        return
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else None
    if found == set():
        return
    # Python leaves the folder __pycache__ where it imported load.py.
    if not found or MANIFEST not in found or found - {PROGRAM, WEIGHTS, LOADER, MANIFEST, '__pycache__'}:
        raise ValueError(f'save: {folder} holds something else than an artefact, and is left as it is: choose another folder')


def _replace(folder: pathlib.Path, new: pathlib.Path, old: pathlib.Path) -> None:
    if folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
