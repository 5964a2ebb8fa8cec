"""Checkpoints through Orbax: the newest ones and the best one are kept, and what is restored is checked first."""

import pathlib
import warnings
from typing import Any

import jax
import orbax.checkpoint as ocp

from kdjax import paths
from kdjax.training.step import TrainState


def checkpoint_manager(directory: str | pathlib.Path, *, monitor: str | None = None, keep: int = 2) -> ocp.CheckpointManager:
    """Opens a folder of checkpoints, one for every epoch that is saved.

    Args:
      directory: the folder; made if it is not there.
      monitor: name of the metric by which the best checkpoint is kept too, the larger the better; None keeps only the newest.
      keep: how many of the newest to keep.

    Returns:
      Orbax's manager, a context manager: leaving it waits for what is still being written.
    """
    policies = [ocp.checkpoint_managers.LatestN(keep)]
    if monitor is not None:
        policies.append(ocp.checkpoint_managers.BestN(get_metric_fn=lambda metrics: metrics[monitor], n=1))
    options = ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
        best_fn=None if monitor is None else lambda metrics: metrics[monitor],
    )
    # With the handler named, a folder's checkpoints describe themselves before the first save.
    handler = ocp.StandardCheckpointHandler()
    return ocp.CheckpointManager(pathlib.Path(directory).absolute(), item_handlers=handler, options=options)


def save(manager: ocp.CheckpointManager, epoch: int, state: TrainState, metrics: dict[str, float] | None = None) -> None:
    """Begins to write the state after an epoch; the state is copied before this returns, and may be donated."""
    manager.save(epoch, args=ocp.args.StandardSave(state), metrics=metrics)


def restore_newest(manager: ocp.CheckpointManager, like: TrainState) -> tuple[int, TrainState] | None:
    """Restores the newest checkpoint that can be read, or returns None if there is none.

    Args:
      manager: the open folder.
      like: a state of the run that resumes: its shapes, dtypes and shardings are those of the result.

    Returns:
      The epoch and the state after it. A newer checkpoint that cannot be read is removed, with a warning.

    Raises:
      ValueError: the checkpoints are of another model, objective or optimizer, or none of them can be read.
    """
    unreadable = []
    for epoch in sorted(manager.all_steps(), reverse=True):
        try:
            stored = manager.item_metadata(epoch).tree
        except Exception as error:  # whatever the storage layers raise for a damaged file
            unreadable.append((epoch, error))
            continue
        _check_same_structure(manager, epoch, stored, like)
        try:
            state = restore(manager, epoch, like)
        except Exception as error:
            unreadable.append((epoch, error))
            continue
        for damaged, error in unreadable:
            reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
            warnings.warn(
                f'checkpoint {damaged} in {manager.directory} cannot be read; training resumes from {epoch}: {reason}',
                stacklevel=2,
            )
            # Orbax saves no epoch that is there already.
            manager.delete(damaged)
        return epoch, state
    if unreadable:
        raise ValueError(f'no checkpoint in {manager.directory} can be read: choose another folder, or remove this one')
    return None


def restore(manager: ocp.CheckpointManager, epoch: int, like: TrainState) -> TrainState:
    """Restores the state after an epoch, with the shapes, dtypes and shardings of `like`."""
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    return manager.restore(epoch, args=ocp.args.StandardRestore(abstract))


def _check_same_structure(manager: ocp.CheckpointManager, epoch: int, tree: Any, like: TrainState) -> None:
    """Compares a checkpoint's own description with a state, before anything is read."""
    stored = {path: tuple(leaf.shape) for path, leaf in paths.leaves_with_paths(tree).items() if hasattr(leaf, 'shape')}
    wanted = {path: _stored_shape(leaf) for path, leaf in paths.leaves_with_paths(like).items()}
    for path in sorted(stored.keys() | wanted.keys()):
        if stored.get(path) != wanted.get(path):
            raise ValueError(
                f'the checkpoint {epoch} in {manager.directory} is of another model or recipe: {path} is '
                f'{stored.get(path, "absent")} there and {wanted.get(path, "absent")} here; choose another folder'
            )


def _stored_shape(leaf: Any) -> tuple[int, ...]:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.eval_shape(jax.random.key_data, leaf).shape
    return tuple(leaf.shape)
