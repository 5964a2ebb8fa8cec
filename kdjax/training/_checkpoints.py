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
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from kdjax import paths
from kdjax.errors import first_line
from kdjax.problems import TrainState
from kdjax.training._checksums import checksums


def checkpoint_manager(
    directory: str | pathlib.Path, *, monitor: str | None = None, mode: Literal['min', 'max'] = 'max', keep: int = 2
) -> ocp.CheckpointManager:
    """Opens a folder of checkpoints, named by their step; what a killed process left half-written is removed.

    Args:
      directory: the folder; made if it is not there.
      monitor: name of the metric by which the best checkpoint is kept too; None keeps only the newest.
      mode: whether the metric is best where it is largest, `'max'`, or smallest, `'min'`.
      keep: how many of the newest to keep.

    Returns:
      Orbax's manager, a context manager: leaving it waits for what is still being written.
    """
    directory = pathlib.Path(directory).absolute()
    if jax.process_index() == 0:
        _drop_damaged_metrics(directory)

    def measured(metrics: Mapping[str, float]) -> float:
        # A checkpoint between two validations has none.
        return -np.inf if monitor is None or monitor not in metrics else metrics[monitor] * (1 if mode == 'max' else -1)

    policies: list[ocp.checkpoint_managers.PreservationPolicy] = [ocp.checkpoint_managers.LatestN(keep)]
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
    settings: Mapping[str, Any] | None = None,
    position: Any = None,
) -> None:
    """Begins to write the state after a step; the state is copied before this returns, and may be donated.

    Args:
      manager: the open folder.
      step: number of the steps behind the state.
      state: the state.
      metrics: what was measured of it.
      settings: what a run must have in common with the one that takes it up, such as the batch size; what JSON can hold.
      position: where the data stand, if they do not say by the step alone; what JSON can hold.

    Raises:
      OSError: this checkpoint, or the one before, could not be written; the last whole one stays.
    """
    metrics = dict(metrics or {})
    # As an array, which the checksums cover as all others.
    described = json.dumps({'settings': dict(settings or {}), 'position': position}).encode()
    tree = {'described': np.frombuffer(described, np.uint8), 'state': state}
    tree = {**tree, 'checksums': checksums(tree)}
    metrics = {**metrics, _CHECKSUM: _checksum_of_metrics(metrics)}
    with _write_errors(manager):
        manager.save(step, args=ocp.args.StandardSave(tree), metrics=metrics)


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
    manager: ocp.CheckpointManager, like: TrainState, settings: Mapping[str, Any] | None = None
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
    found = restore_run(manager, like, settings)
    return None if found is None else found[:2]


def restore_run(
    manager: ocp.CheckpointManager, like: TrainState, settings: Mapping[str, Any] | None = None
) -> tuple[int, TrainState, Any] | None:
    """As `restore_newest`, with the position that was given to `save`."""
    damaged: dict[int, str] = {}
    differences = []
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            difference = _difference(manager, step, like)
            if difference is None:
                state, described = _restore(manager, step, like)
        except Exception as error:  # whatever the storage layers raise for a damaged file
            damaged[step] = first_line(error)
            continue
        if difference is not None:
            differences.append(difference)
            damaged[step] = 'its description is of another state'
            continue
        _check_settings(manager, step, described['settings'], settings)
        for newer, reason in damaged.items():
            warnings.warn(
                f'checkpoint {newer} in {manager.directory} cannot be read; training resumes from {step}: {reason}',
                stacklevel=2,
            )
            # Orbax saves no step that is there already.
            manager.delete(newer)
        return step, state, described['position']
    if differences:
        raise ValueError(differences[0])
    if damaged:
        step, reason = next(iter(damaged.items()))
        raise ValueError(
            f'no checkpoint in {manager.directory} can be read: choose another folder, or remove this one; {step}: {reason}'
        )
    return None


def restore_best(manager: ocp.CheckpointManager, like: TrainState) -> tuple[int, TrainState] | None:
    """Restores the best checkpoint that is whole, as `restore_newest` does the newest; a damaged one is removed."""
    # One that was saved between two validations has no metrics but their checksum.
    while (step := manager.best_step()) is not None and set(manager.metrics(step) or {}) > {_CHECKSUM}:
        try:
            return step, restore(manager, step, like)
        except Exception as error:
            warnings.warn(
                f'the best checkpoint {step} in {manager.directory} cannot be read; the next best counts: {first_line(error)}',
                stacklevel=2,
            )
            manager.delete(step)
    return None


def restore(manager: ocp.CheckpointManager, step: int, like: TrainState) -> TrainState:
    """Restores the state after a step, with the shapes, dtypes and shardings of `like`.

    Raises:
      ValueError: the state is not the one that was saved. What else is raised for damaged files is up to the storage.
    """
    return _restore(manager, step, like)[0]


def restore_variables(
    directory: str | pathlib.Path, *, monitor: str = 'accuracy', mode: Literal['min', 'max'] = 'max'
) -> dict[str, Any]:
    """Reads a student's variables out of the folder of checkpoints that `training.fit` wrote, for whatever comes after it.

    Neither the objective nor the optimizer that trained it need to be known. They are those of the student itself, not averages
    of them.

    Args:
      directory: the folder.
      monitor: the metric of validation that tells which checkpoint is best; where none was validated, the newest is taken.
      mode: whether it is best where it is largest, `'max'`, or smallest, `'min'`.

    Returns:
      The variables, as numpy arrays.

    Raises:
      ValueError: there is no checkpoint that is whole.
    """
    directory = pathlib.Path(directory).absolute()
    if not directory.is_dir():
        raise ValueError(f'{directory} is no folder of checkpoints')
    damaged = ''
    with checkpoint_manager(directory, monitor=monitor, mode=mode) as manager:
        measured = {step: (manager.metrics(step) or {}).get(monitor) for step in manager.all_steps()}
        sign = 1 if mode == 'max' else -1
        # The best first, of equals the last; those that were not validated after them, the newest first.
        rank = {step: (value is not None, sign * (value or 0.0), step) for step, value in measured.items()}
        for step in sorted(rank, key=rank.__getitem__, reverse=True):
            try:
                return _stored_variables(manager, step)
            except Exception as error:  # whatever the storage layers raise for a damaged file
                damaged = f': {first_line(error)}'
    raise ValueError(f'{directory} holds no checkpoint that can be read{damaged}')


def _stored_variables(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """The variables in a checkpoint, as it describes itself."""
    as_numpy = lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)  # noqa: E731 - takes no memory
    wanted = jax.tree.map(as_numpy, _stored_tree(manager, step))
    tree: dict[str, Any] = dict(manager.restore(step, args=ocp.args.StandardRestore(wanted)))
    # In another order than that of the state, whose types are not known here.
    stored = sorted(np.asarray(tree.pop('checksums')).tolist())
    if sorted(checksums(tree).tolist()) != stored:
        raise ValueError('an array is not what was saved, by its checksum')
    return {'params': tree['state']['params'], **tree['state']['model_state']}


_CHECKSUM = 'crc32'


def _restore(manager: ocp.CheckpointManager, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """The state after a step, and what was described beside it."""
    length = _stored_tree(manager, step)['described'].shape
    wanted = {'described': np.zeros(length, np.uint8), 'state': like}
    wanted = {**wanted, 'checksums': np.zeros(len(jax.tree.leaves(wanted)), np.uint32)}
    abstract = jax.tree.map(_abstract, wanted)
    tree: dict[str, Any] = dict(manager.restore(step, args=ocp.args.StandardRestore(abstract)))
    stored = tree.pop('checksums')
    for path, one, other in zip(paths.leaves_with_paths(tree), checksums(tree), stored, strict=True):
        if one != other:
            raise ValueError(f'{path} is not what was saved, by its checksum')
    return tree['state'], json.loads(np.asarray(tree['described']).tobytes())


def _abstract(leaf: Any) -> Any:
    return ocp.utils.to_shape_dtype_struct(cast(Any, leaf)) if isinstance(leaf, jax.Array) else leaf


def _stored_tree(manager: ocp.CheckpointManager, step: int) -> Any:
    """What Orbax knows of the arrays in a checkpoint, in the tree that they were."""
    metadata: Any = manager.metadata(step)
    return metadata.item_metadata.tree


def _difference(manager: ocp.CheckpointManager, step: int, like: TrainState) -> str | None:
    """Compares a checkpoint's own description with a state, before anything is read."""
    if 'metrics' in (manager.metadata(step).item_handlers or ()) and manager.metrics(step) is None:
        raise ValueError('its metrics are missing')
    tree = _stored_tree(manager, step)
    there = f'the checkpoint {step} in {manager.directory} is of another model or recipe'
    named = tree['state']['objective_params'], like.objective_params
    terms = [set(each) if isinstance(each, Mapping) else set() for each in named]
    if terms[0] != terms[1]:
        # A term that trains and remembers nothing has no arrays to tell it by.
        gone, new = (', '.join(sorted(x)) for x in (terms[0] - terms[1], terms[1] - terms[0]))
        told = [f'it has the term {gone}, which the objective lacks'] if gone else []
        told += [f'it lacks the term {new} of the objective'] if new else []
        return f'{there}: {" and ".join(told)}; choose another folder'
    stored = {path: tuple(leaf.shape) for path, leaf in paths.leaves_with_paths(tree).items() if hasattr(leaf, 'shape')}
    wanted = {path: _stored_shape(leaf) for path, leaf in paths.leaves_with_paths({'state': like}).items()}
    wanted |= {'described': stored.get('described'), 'checksums': (len(wanted) + 1,)}
    # What differs in the state says more than the number of checksums.
    for path in sorted(stored.keys() | wanted.keys(), key=lambda path: (path == 'checksums', path)):
        if stored.get(path) != wanted.get(path):
            return (
                f'{there}: {path.removeprefix("state/")} is {stored.get(path, "absent")} there and '
                f'{wanted.get(path, "absent")} here; choose another folder'
            )
    return None


def _stored_shape(leaf: Any) -> tuple[int, ...]:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.eval_shape(jax.random.key_data, leaf).shape
    return tuple(leaf.shape)


def _check_settings(
    manager: ocp.CheckpointManager, step: int, stored: Mapping[str, Any], settings: Mapping[str, Any] | None
) -> None:
    for name, value in (settings or {}).items():
        if stored.get(name) != value:
            raise ValueError(
                f'the checkpoint {step} in {manager.directory} is of a run with {name} {stored.get(name)}, not {value}: '
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
    return os.strerror(int(code[1])) if code else first_line(error)
