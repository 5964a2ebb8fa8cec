"""Checkpoints through Orbax: the newest ones and the best one are kept, and what is restored is checked first.

Orbax writes a checkpoint beside the others and renames it when it is whole, so that a process may be killed at any moment. What
storage does to a file later, Orbax may read without a word: so a checkpoint holds checksums of its arrays too.
"""

import contextlib
import json
import os
import pathlib
import re
import warnings
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from kdjax import paths
from kdjax.training.checksums import checksums
from kdjax.training.step import TrainState


def checkpoint_manager(directory: str | pathlib.Path, *, monitor: str | None = None, keep: int = 2) -> ocp.CheckpointManager:
    """Opens a folder of checkpoints, named by their step; what a killed process left half-written is removed.

    Args:
      directory: the folder; made if it is not there.
      monitor: name of the metric by which the best checkpoint is kept too, the larger the better; None keeps only the newest.
      keep: how many of the newest to keep.

    Returns:
      Orbax's manager, a context manager: leaving it waits for what is still being written.
    """
    directory = pathlib.Path(directory).absolute()
    if jax.process_index() == 0:
        _drop_damaged_metrics(directory)

    def measured(metrics: Mapping[str, float]) -> float:
        return metrics.get(monitor, -np.inf)  # a checkpoint within an epoch has none

    policies = [ocp.checkpoint_managers.LatestN(keep)]
    if monitor is not None:
        policies.append(ocp.checkpoint_managers.BestN(get_metric_fn=measured, n=1, keep_checkpoints_without_metrics=False))
    options = ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
        best_fn=None if monitor is None else measured,
        cleanup_tmp_directories=True,
    )
    # With the handler named, a folder's checkpoints describe themselves before the first save.
    return ocp.CheckpointManager(directory, item_handlers=ocp.StandardCheckpointHandler(), options=options)


def save(
    manager: ocp.CheckpointManager,
    step: int,
    state: TrainState,
    metrics: Mapping[str, float] | None = None,
    settings: Mapping[str, int] | None = None,
) -> None:
    """Begins to write the state after a step; the state is copied before this returns, and may be donated.

    Args:
      manager: the open folder.
      step: number of the steps behind the state.
      state: the state.
      metrics: what was measured of it.
      settings: numbers that a run must have in common with the one that takes it up, such as the batch size.

    Raises:
      OSError: this checkpoint, or the one before, could not be written; the last whole one stays.
    """
    metrics = dict(metrics or {})
    tree = _contents(state, settings)
    tree = {**tree, 'checksums': checksums(tree)}
    with _write_errors(manager):
        manager.save(step, args=ocp.args.StandardSave(tree), metrics={**metrics, _CHECKSUM: _checksum_of_metrics(metrics)})


def wait(manager: ocp.CheckpointManager) -> None:
    """Waits until what was saved is on disk.

    Raises:
      OSError: it could not be written; the last whole checkpoint stays.
    """
    with _write_errors(manager):
        manager.wait_until_finished()


def close(manager: ocp.CheckpointManager) -> None:
    """Closes the folder, after what was saved is on disk; raises as `wait` does."""
    with _write_errors(manager):
        manager.close()


def restore_newest(
    manager: ocp.CheckpointManager, like: TrainState, settings: Mapping[str, int] | None = None
) -> tuple[int, TrainState] | None:
    """Restores the newest checkpoint that is whole, or returns None if there is none.

    Args:
      manager: the open folder.
      like: a state of the run that resumes: its shapes, dtypes and shardings are those of the result.
      settings: as they were given to `save`.

    Returns:
      The step and the state after it. A newer checkpoint that is damaged is removed, with a warning.

    Raises:
      ValueError: the checkpoints are of another model, objective, optimizer or setting, or none of them can be read.
    """
    damaged: dict[int, str] = {}
    differences = []
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            difference = _difference(manager, step, like, settings)
            if difference is None:
                tree = _restore(manager, step, like, settings)
        except Exception as error:  # whatever the storage layers raise for a damaged file
            damaged[step] = _first_line(error)
            continue
        if difference is not None:
            differences.append(difference)
            damaged[step] = 'its description is of another state'
            continue
        _check_settings(manager, step, tree['settings'], settings)
        for newer, reason in damaged.items():
            warnings.warn(
                f'checkpoint {newer} in {manager.directory} cannot be read; training resumes from {step}: {reason}',
                stacklevel=2,
            )
            # Orbax saves no step that is there already.
            manager.delete(newer)
        return step, tree['state']
    if differences:
        raise ValueError(differences[0])
    if damaged:
        step, reason = next(iter(damaged.items()))
        raise ValueError(
            f'no checkpoint in {manager.directory} can be read: choose another folder, or remove this one; {step}: {reason}'
        )
    return None


def restore_best(
    manager: ocp.CheckpointManager, like: TrainState, settings: Mapping[str, int] | None = None
) -> tuple[int, TrainState] | None:
    """Restores the best checkpoint that is whole, as `restore_newest` does the newest; a damaged one is removed."""
    # One that was saved within an epoch has no metrics but their checksum.
    while (step := manager.best_step()) is not None and set(manager.metrics(step) or {}) > {_CHECKSUM}:
        try:
            return step, restore(manager, step, like, settings)
        except Exception as error:
            warnings.warn(
                f'the best checkpoint {step} in {manager.directory} cannot be read; the next best counts: {_first_line(error)}',
                stacklevel=2,
            )
            manager.delete(step)
    return None


def restore(
    manager: ocp.CheckpointManager, step: int, like: TrainState, settings: Mapping[str, int] | None = None
) -> TrainState:
    """Restores the state after a step, with the shapes, dtypes and shardings of `like`.

    Raises:
      ValueError: the state is not the one that was saved. What else is raised for damaged files is up to the storage.
    """
    return _restore(manager, step, like, settings)['state']


_CHECKSUM = 'crc32'


def _contents(state: TrainState, settings: Mapping[str, int] | None) -> dict[str, Any]:
    return {'settings': {name: np.asarray(value, np.int32) for name, value in (settings or {}).items()}, 'state': state}


def _restore(manager: ocp.CheckpointManager, step: int, like: TrainState, settings: Mapping[str, int] | None) -> dict[str, Any]:
    wanted = _contents(like, settings)
    wanted = {**wanted, 'checksums': np.zeros(len(jax.tree.leaves(wanted)), np.uint32)}
    abstract = jax.tree.map(lambda x: ocp.utils.to_shape_dtype_struct(x) if isinstance(x, jax.Array) else x, wanted)
    tree = manager.restore(step, args=ocp.args.StandardRestore(abstract))
    stored = tree.pop('checksums')
    found = checksums(tree)
    for path, one, other in zip(paths.leaves_with_paths(tree), found, stored, strict=True):
        if one != other:
            raise ValueError(f'{path} is not what was saved, by its checksum')
    return tree


def _difference(manager: ocp.CheckpointManager, step: int, like: TrainState, settings: Mapping[str, int] | None) -> str | None:
    """Compares a checkpoint's own description with a state, before anything is read."""
    description = manager.metadata(step)
    if 'metrics' in description.item_handlers and manager.metrics(step) is None:
        raise ValueError('its metrics are missing')
    tree = description.item_metadata.tree
    stored = {path: tuple(leaf.shape) for path, leaf in paths.leaves_with_paths(tree).items() if hasattr(leaf, 'shape')}
    wanted = {path: _stored_shape(leaf) for path, leaf in paths.leaves_with_paths(_contents(like, settings)).items()}
    wanted['checksums'] = (len(wanted),)
    # What differs in the state says more than the number of checksums.
    for path in sorted(stored.keys() | wanted.keys(), key=lambda path: (path == 'checksums', path)):
        if stored.get(path) != wanted.get(path):
            return (
                f'the checkpoint {step} in {manager.directory} is of another model or recipe: {path.removeprefix("state/")} is '
                f'{stored.get(path, "absent")} there and {wanted.get(path, "absent")} here; choose another folder'
            )
    return None


def _stored_shape(leaf: Any) -> tuple[int, ...]:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.eval_shape(jax.random.key_data, leaf).shape
    return tuple(leaf.shape)


def _check_settings(
    manager: ocp.CheckpointManager, step: int, stored: Mapping[str, Any], settings: Mapping[str, int] | None
) -> None:
    for name, value in (settings or {}).items():
        if stored[name] != value:
            raise ValueError(
                f'the checkpoint {step} in {manager.directory} is of a run with {name} {int(stored[name])}, not {value}: '
                'its steps were other batches; choose another folder'
            )


def _checksum_of_metrics(metrics: Mapping[str, float]) -> int:
    return zlib.crc32(json.dumps(metrics, sort_keys=True).encode())


def _drop_damaged_metrics(directory: pathlib.Path) -> None:
    """Orbax reads the metrics of all checkpoints when it opens a folder; damaged ones would stop it, or name a wrong best."""
    for file in directory.glob('*/metrics/metrics'):
        try:
            metrics = json.loads(file.read_bytes())
            intact = metrics.pop(_CHECKSUM) == _checksum_of_metrics(metrics)
        except (ValueError, KeyError, AttributeError, TypeError):
            intact = False
        if not intact:
            warnings.warn(f'{file} is damaged: checkpoint {file.parts[-3]} does not count as the best', stacklevel=3)
            file.unlink()


@contextlib.contextmanager
def _write_errors(manager: ocp.CheckpointManager) -> Iterator[None]:
    """Turns what the storage layers raise into one line that says where the run stands."""
    try:
        yield
    except Exception as error:
        manager.reload()
        last = manager.latest_step()
        kept = 'there is no earlier one' if last is None else f'the last whole one is of step {last}'
        raise OSError(f'a checkpoint could not be written to {manager.directory}; {kept}: {_cause(error)}') from error


def _cause(error: Exception) -> str:
    """What the operating system says, if it does: the storage layers put it at the end of a long line."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(code[1])) if code else _first_line(error)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]
