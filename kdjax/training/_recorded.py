"""A teacher's predictions on disk: what they were made of, and how they are opened.

A folder holds `manifest.json`, written first, which says what the predictions are made of, and files of so many examples each.
Their names begin with a digest of the manifest, so those of another recording are never taken for its own. The recording is
finished where all of them are there.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.batches import Batch, check_batch, count_examples
from kdjax.networks import LinearLogits, Network, Outputs, Variables
from kdjax.training import _fingerprints
from kdjax.training._augmentation import RECORDED_VIEWS, Views, describe_views, identify_views, is_recorded
from kdjax.training._recorded_files import check_files, open_arrays, recorded_arrays
from kdjax.training._streaming import Source, stack_examples

FORMAT = 2

Manifest = dict[str, Any]


def recorded_teacher(
    folder: str | pathlib.Path,
    *,
    data: Batch | Source | None = None,
    variables: Variables | None = None,
    views: Views | None = None,
    temperature: float | None = None,
    check: bool = True,
) -> dict[str, Any]:
    """Opens what `record_teacher` wrote; what is given of the other arguments is compared with what it was made of.

    Args:
      folder: the folder.
      data: the data that the recording must be of.
      variables: the variables that the teacher must have had.
      views: the views that it must have seen.
      temperature: one that the rest must have been computed with.
      check: whether to read all files once and compare their checksums (CRC-32), eight at a time: about as long as the disk
        takes to read them, or a second for some gigabytes that are in the system's cache. Without it a damaged file is an
        error only where its damage is not in the numbers.

    Returns:
      Read-only arrays on disk, to be merged into the data: `'teacher_logits'` [examples, ..., classes], `'teacher_hidden'`
      [examples, ..., width], or `'top_logits'` and `'top_indices'` [examples, ..., k] and `'rest'` [examples, ...], of several
      temperatures `'rest_at_1'` and so on; with views [examples, views, ...]. Each has a shape, a dtype and a length, is
      indexed as an array is, by integers, slices or arrays of them, and is read there; `np.asarray` reads all of it. Where
      nothing was stored it is NaN, and 0 in indices. Beside them `'recorded_views'` [examples], a number for the views, by
      which training knows whether it shows the student the same.

    Raises:
      ValueError: the recording is unfinished, damaged, or of something else.
    """
    folder = pathlib.Path(folder)
    manifest = read_manifest(folder)
    settings = manifest['settings']
    given: dict[str, Any] = {
        'variables': None if variables is None else _fingerprints.of_arrays(variables),
        'views': describe_views(views),
    }
    if data is not None:
        given |= data_settings(data, settings['where'])
    if temperature is not None and temperature not in np.atleast_1d(settings['temperature'] or []):
        given['temperature'] = temperature
    check_settings(folder, settings, {name: value for name, value in given.items() if value is not None})
    head, paths = file_paths(folder, manifest)
    every = [*([] if head is None else [head]), *paths]
    missing = [path for path in every if not path.exists()]
    if missing:
        raise ValueError(
            f'{folder} holds no finished recording of a teacher: run record_teacher again, which goes on where it stopped '
            f'({len(missing)} of {len(every)} files are missing)'
        )
    if check:
        check_files(every)
    number = None if settings['views'] is None else settings['views']['number']
    positions = None if settings['where'] is None else tuple(manifest['positions'])
    shapes = {name: (tuple(own['shape']), own['dtype']) for name, own in manifest['arrays'].items()}
    arrays = recorded_arrays(shapes, paths, manifest['examples'], manifest['examples_per_file'], positions, number)
    return {**arrays, RECORDED_VIEWS: np.broadcast_to(identify_views(settings['views']), manifest['examples'])}


def recorded_head(folder: str | pathlib.Path) -> tuple[Network, dict[str, Any]]:
    """The head of a teacher whose hidden states were recorded: a network of nothing else, and its variables.

    It takes the teacher's place in `distillation`, with `objectives.from_recorded_logits`, which makes `LinearLogits` of this
    head and `batch['teacher_hidden']`. Alone it gives no logits.

    Args:
      folder: what `record_teacher(..., what='hidden')` wrote.

    Raises:
      ValueError: there is no such recording, or it is of logits.
    """
    folder = pathlib.Path(folder)
    manifest = read_manifest(folder)
    head, (path, _) = manifest['head'], file_paths(folder, manifest)
    if path is None:
        raise ValueError(f"{folder} holds logits, which need no head: record_teacher(..., what='hidden') records hidden states")
    check_files([path])
    found = open_arrays(path)
    params = {
        name: np.array(found[name]).view(jnp.dtype(own['dtype'])).reshape(own['shape']) for name, own in head['arrays'].items()
    }

    def init(key: jax.Array, inputs: Any) -> dict[str, Any]:
        del key, inputs
        return {'params': params}

    def apply(
        variables: Any, inputs: Any, *, train: bool = False, rng: jax.Array | None = None
    ) -> tuple[Outputs, dict[str, Any]]:
        del inputs, train, rng
        own = variables['params']
        return Outputs(None, {'head': LinearLogits(None, own['kernel'], own.get('bias'), **head['options'])}), {}

    return Network(init, apply), {'params': params}


def read_manifest(folder: pathlib.Path) -> Manifest:
    """What a recording is made of.

    Raises:
      ValueError: there is none, it is damaged, or of a format that is not read any more.
    """
    file = folder / 'manifest.json'
    if not file.exists():
        raise ValueError(f'{folder} holds no finished recording of a teacher: run record_teacher')
    try:
        manifest = json.loads(file.read_text())
        found = manifest.get('format', 1)
        digest = manifest.pop('digest', None)
        # The digest also says that nothing in it has changed.
        if found == FORMAT and digest != _fingerprints.of_settings(manifest):
            raise KeyError
        if (
            not manifest['arrays']
            or not all(map(is_recorded, manifest['arrays']))
            or not isinstance(manifest['settings'], dict)
        ):
            raise KeyError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f'{file} is damaged: remove the folder and run record_teacher again') from None
    if found != FORMAT:
        raise ValueError(
            f'{folder} was recorded in format {found}, and this version of kdjax reads {FORMAT}: remove the folder and record '
            'again'
        )
    return manifest


def manifest_text(manifest: Manifest) -> str:
    """The manifest as it is written."""
    return json.dumps({**manifest, 'digest': _fingerprints.of_settings(manifest)}, indent=2) + '\n'


def file_paths(folder: pathlib.Path, manifest: Manifest) -> tuple[pathlib.Path | None, list[pathlib.Path]]:
    """The files of a recording: that of the head, where there is one, and those of the examples in their order."""
    digest = _fingerprints.of_settings(manifest)
    number = -(-manifest['examples'] // manifest['examples_per_file'])
    return folder / f'{digest}-head.npz' if manifest['head'] else None, [
        folder / f'{digest}-{i:06d}.npz' for i in range(number)
    ]


def check_settings(folder: pathlib.Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises where a recording was made of something else."""
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


def data_settings(data: Batch | Source, where: str | None) -> dict[str, Any]:
    """The digests of the inputs, and of the mask where there is one."""
    read, examples = reader(data, where)
    found = _fingerprints.of_examples(read, examples)
    return {'data': found['inputs'], 'positions': found.get('where')}


def reader(data: Batch | Source, where: str | None) -> tuple[Callable[[np.ndarray], dict[str, Any]], int]:
    """A function that reads the inputs of the examples with some indices, and their mask, and the number of examples."""

    def chosen(batch: Batch) -> dict[str, Any]:
        check_batch(batch)
        if where is None:
            return {'inputs': batch['inputs']}
        mask = batch.get(where)
        if mask is None:
            raise ValueError(f"record_teacher: where='{where}' must be among the data, which have {', '.join(sorted(batch))}")
        if np.dtype(mask.dtype) != np.bool_ or len(mask.shape) < 1:
            raise ValueError(f"record_teacher: where='{where}' must be booleans [examples, positions], got {mask.dtype}")
        return {'inputs': batch['inputs'], 'where': mask}

    if isinstance(data, dict):
        entries = chosen(data)
        return lambda indices: jax.tree.map(lambda leaf: np.asarray(leaf[indices]), entries), count_examples(data)
    return lambda indices: chosen(stack_examples(data, indices)[0]), len(data)
