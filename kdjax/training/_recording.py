"""A teacher's predictions on disk, made once, so that training does not run the teacher.

    views = Views(augment, jax.random.key(7), 8)
    recorded = record_teacher(teacher, variables, data, folder, views=views)
    problem = distillation(student, None, objectives.from_recorded_logits(objective), optimizer)
    run = in_memory_epoch(problem, batch_size=128, views=views)
    state, metrics = run(state, {}, {**data, **recorded})

A folder holds plain .npy files, which are read through memory maps, and `manifest.json`, which is written last and says what
they were made of.
"""

import contextlib
import functools
import json
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.lib import format as npy

from kdjax import losses
from kdjax.batches import Batch, check_batch, count_examples
from kdjax.files import write_whole
from kdjax.networks import Network, Variables, dense_logits, map_in_chunks
from kdjax.training import _fingerprints
from kdjax.training._augmentation import (
    RECORDED,
    RECORDED_VIEWS,
    Views,
    augmented,
    check_augmentation,
    describe_views,
    identify_views,
)
from kdjax.training._streaming import Source, stack_examples


def record_teacher(
    teacher: Network,
    variables: Variables,
    data: Batch | Source,
    folder: str | pathlib.Path,
    *,
    batch_size: int = 256,
    views: Views | None = None,
    top_k: int | None = None,
    temperature: float = 4.0,
    dtype: Any = np.float32,
) -> dict[str, np.ndarray]:
    """Runs the teacher once over the data and writes its logits, or finds them written.

    All logits take 4 · examples · views · classes bytes, or half of that in float16; the k largest with the mass of the rest,
    for `objectives.top_k_soft_targets`, (8 k + 4) · examples · views. A folder without manifest, as a killed run leaves it, is
    written again. Recorded logits equal those that a training step computes from the same inputs, up to the rounding of
    batches of another size.

    Args:
      teacher: the network; it runs with `train=False`.
      variables: its variables.
      data: `'inputs'`, a pytree of arrays [examples, ...], which may be memory maps, or a `Source`; other entries are not used.
        It is read twice.
      folder: where to write; made if it is not there.
      batch_size: examples at a time; the last batch is filled up, so that all have one shape.
      views: the augmented views to record; None records the inputs as they are.
      top_k: how many of the largest logits to keep; None keeps all.
      temperature: of the rest, which must be that of the loss; only with `top_k`.
      dtype: of what is written, float32 or float16.

    Returns:
      What `recorded_teacher` reads, to be merged into the data.

    Raises:
      ValueError: the folder holds the recording of another teacher, of the same variables in another network or precision, of
        other data, views or settings, an argument is out of range, or there is a logit that the dtype cannot hold.

    >>> import flax.linen as nn, tempfile
    >>> from kdjax import networks
    >>> teacher, data = networks.from_linen(nn.Dense(3)), {'inputs': np.ones((10, 4), np.float32)}
    >>> variables = teacher.init(jax.random.key(0), data['inputs'])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     record_teacher(teacher, variables, data, folder)['teacher_logits'].shape
    (10, 3)
    """
    folder, stored, (read, examples) = pathlib.Path(folder), np.dtype(dtype), _reader(data)
    if stored not in (np.float16, np.float32):
        raise ValueError(f'record_teacher: dtype must be float32 or float16, got {stored}')
    if batch_size < 1 or not examples:
        raise ValueError(f'record_teacher: batch_size and examples must be at least 1, got {batch_size} and {examples}')
    check_augmentation(None, views)
    settings = {
        'data': _fingerprints.of_examples(read, examples),
        'variables': _fingerprints.of_arrays(variables),
        'views': describe_views(views),
        'top_k': top_k,
        'temperature': None if top_k is None else temperature,
        'dtype': stored.name,
    }
    finished = _read_manifest(folder)['settings'] if (folder / 'manifest.json').exists() else None
    if finished is not None:
        _check_settings(folder, finished, settings)
        # The program is compared for batches of one size, and how large they are does not matter.
        batch_size = finished.get('batch_size', batch_size)

    @jax.jit
    def predict(variables: Variables, inputs: Any, indices: Any, view: Any) -> dict[str, jax.Array]:
        inputs = augmented(inputs, indices, view, views=views)
        logits = teacher.apply(variables, inputs, train=False)[0].logits
        if logits is None:
            raise ValueError('record_teacher: the teacher gives no logits')
        if top_k is None:
            return {'teacher_logits': dense_logits(logits).astype(np.float32)}
        largest = map_in_chunks(functools.partial(losses.top_k_logits, k=top_k, temperature=temperature), logits)
        return dict(zip(RECORDED[1:], largest, strict=True))

    first = np.minimum(np.arange(batch_size), examples - 1)
    program = predict.trace(variables, read(first), first.astype(np.int32), np.int32(0)).jaxpr
    settings |= {'batch_size': batch_size, 'program': _fingerprints.of_program(program)}
    if finished is not None:
        _check_settings(folder, finished, settings)
        return recorded_teacher(folder)

    def predict_batch(start: int) -> dict[str, np.ndarray]:
        indices = np.minimum(np.arange(start, start + batch_size), examples - 1)
        batch, indices = read(indices), indices.astype(np.int32)
        kept = min(batch_size, examples - start)
        seen = [predict(variables, batch, indices, np.int32(view)) for view in range(1 if views is None else views.number)]
        seen = jax.device_get(seen[0] if views is None else jax.tree.map(lambda *each: jnp.stack(each, axis=1), *seen))
        return {name: _stored(array[:kept], stored) for name, array in seen.items()}

    batches = (predict_batch(start) for start in range(0, examples, batch_size))
    arrays = _write_arrays(folder, batches, examples)
    write_whole(folder / 'manifest.json', json.dumps({'arrays': arrays, 'settings': settings}, indent=2) + '\n')
    return recorded_teacher(folder)


def recorded_teacher(
    folder: str | pathlib.Path,
    *,
    data: Batch | Source | None = None,
    variables: Variables | None = None,
    views: Views | None = None,
    temperature: float | None = None,
) -> dict[str, np.ndarray]:
    """Opens what `record_teacher` wrote; what is given of the other arguments is compared with what it was made of.

    Args:
      folder: the folder.
      data: the data that the recording must be of.
      variables: the variables that the teacher must have had.
      views: the views that it must have seen.
      temperature: the one that `rest` must have been computed with.

    Returns:
      Read-only memory maps, to be merged into the data: `'teacher_logits'` [examples, ..., classes], or `'top_logits'` and
      `'top_indices'` [examples, ..., k] and `'rest'` [examples, ...]; with views [examples, views, ...]. Beside them
      `'recorded_views'` [examples], a number for the views, by which training knows whether it shows the student the same.

    Raises:
      ValueError: the recording is unfinished, damaged, or of something else.
    """
    folder = pathlib.Path(folder)
    manifest = _read_manifest(folder)
    given = {
        'data': None if data is None else _fingerprints.of_examples(*_reader(data)),
        'variables': None if variables is None else _fingerprints.of_arrays(variables),
        'views': describe_views(views),
        'temperature': temperature,
    }
    _check_settings(folder, manifest['settings'], {name: value for name, value in given.items() if value is not None})
    arrays = {name: _open_array(folder / f'{name}.npy', wanted) for name, wanted in manifest['arrays'].items()}
    examples = len(next(iter(arrays.values())))
    return {**arrays, RECORDED_VIEWS: np.broadcast_to(identify_views(manifest['settings'].get('views')), examples)}


def _write_arrays(folder: pathlib.Path, batches: Iterable[dict[str, np.ndarray]], examples: int) -> dict[str, Any]:
    """Writes batch after batch and returns shapes and dtypes. A full disk is an error, where a map would end the process."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays, files = {}, {}
    with contextlib.ExitStack() as stack:
        for batch in batches:
            for name, array in batch.items():
                if name not in files:
                    files[name] = stack.enter_context((folder / f'{name}.npy').open('wb'))
                    arrays[name] = {'shape': [examples, *array.shape[1:]], 'dtype': array.dtype.name}
                    header = {'descr': npy.dtype_to_descr(array.dtype), 'fortran_order': False}
                    npy.write_array_header_1_0(files[name], {**header, 'shape': tuple(arrays[name]['shape'])})
                files[name].write(array.tobytes())
    return arrays


def _read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    file = folder / 'manifest.json'
    if not file.exists():
        raise ValueError(f'{folder} holds no finished recording of a teacher: run record_teacher')
    try:
        manifest = json.loads(file.read_text())
        # Names become file names, so only those that are known.
        if not manifest['arrays'] or not set(manifest['arrays']) <= set(RECORDED) or not isinstance(manifest['settings'], dict):
            raise KeyError
    except (ValueError, KeyError, TypeError):
        raise ValueError(f'{file} is damaged: remove the folder and run record_teacher again') from None
    return manifest


def _open_array(file: pathlib.Path, wanted: dict[str, Any]) -> np.ndarray:
    try:
        array = np.load(file, mmap_mode='r', allow_pickle=False)
    except (OSError, ValueError, EOFError):
        array = None
    if array is None or {'shape': list(array.shape), 'dtype': array.dtype.name} != wanted:
        raise ValueError(f'{file} is truncated or damaged: remove the folder and run record_teacher again')
    return array


def _check_settings(folder: pathlib.Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, value in wanted.items():
        if found.get(name) == value:
            continue
        if name == 'program':
            raise ValueError(
                f'{folder} was recorded by another program (network, precision, augmentation or version of jax): choose '
                'another folder; recorded_teacher opens it as it is'
            )
        raise ValueError(
            f'{folder} was recorded with other {name}: {found.get(name)} there, {value} here; choose another folder'
        )


def _stored(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The array in the dtype of storage; class indices stay integers."""
    if not np.issubdtype(array.dtype, np.floating):
        return array
    with np.errstate(over='ignore'):
        stored = array.astype(dtype)
    if np.isnan(array).any() or (np.isinf(stored) & ~np.isinf(array)).any():
        raise ValueError(f'record_teacher: the teacher gives logits that are NaN or too large for {dtype}')
    return stored


def _reader(data: Batch | Source) -> tuple[Callable[[np.ndarray], Any], int]:
    """A function that reads the inputs of the examples with some indices, and the number of examples."""
    if isinstance(data, dict):
        check_batch(data)
        return lambda indices: jax.tree.map(lambda leaf: np.asarray(leaf[indices]), data['inputs']), count_examples(data)

    def read(indices: np.ndarray) -> Any:
        batch, _ = stack_examples(data, indices)
        check_batch(batch)
        return batch['inputs']

    return read, len(data)
