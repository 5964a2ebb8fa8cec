"""Training from start to end: epochs, validation, checkpoints, a log and a progress bar."""

import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from kdjax.batches import Batch
from kdjax.metrics import Mean, add, compute
from kdjax.networks import Variables
from kdjax.training import checkpoints
from kdjax.training.epochs import Epoch
from kdjax.training.step import TrainState


class Fitted(NamedTuple):
    """What training ends with.

    Attributes:
      state: the state after the last epoch.
      best_variables: the student's variables after the best epoch, by validation; those of the last without validation.
      best_epoch: its number, from 1; of equals the last.
      resumed_from: the epoch after which this call took up the run, 0 for a fresh one.
    """

    state: TrainState
    best_variables: dict[str, Any]
    best_epoch: int
    resumed_from: int


class NonFiniteLossError(RuntimeError):
    """The loss became infinite or NaN; the message says at which step and in which term."""


def fit(
    epoch: Epoch,
    state: TrainState,
    teacher_variables: Variables | None,
    data: Batch,
    *,
    epochs: int,
    validate: Callable[[Variables], dict[str, Mean]] | None = None,
    monitor: str = 'accuracy',
    every: int = 1,
    directory: str | pathlib.Path | None = None,
    log: str | pathlib.Path | None = None,
    name: str = 'train',
    progress: bool = True,
) -> Fitted:
    """Trains for a number of epochs in all, taking up an earlier run of the same folder where it stopped.

    Args:
      epoch: runs one epoch, see `training.epoch`.
      state: the state to start from; it is donated.
      teacher_variables: the teacher's variables; None with `networks.nothing()`.
      data: the training split.
      epochs: epochs in all, those of an earlier run included.
      validate: `validate(variables) -> metrics` on the validation split.
      monitor: the metric of `validate` that tells the best epoch, the larger the better.
      every: epochs between two validations, which are followed by a checkpoint; the last epoch always has both.
      directory: folder for the checkpoints; None keeps none.
      log: file for the metrics, one JSON object a line; lines of epochs that are run again are replaced.
      name: of this run, in the log and the progress bar.
      progress: whether to show the bar, on a terminal.

    Returns:
      The result.

    Raises:
      ValueError: an argument is out of range, or the folder holds checkpoints of another model.
      NonFiniteLossError: the loss is not finite. Nothing of that epoch is saved; the last good checkpoint stays.
    """
    if epochs < 1 or every < 1:
        raise ValueError(f'fit: epochs and every must be at least 1, got {epochs} and {every}')
    teacher_variables = {} if teacher_variables is None else teacher_variables
    manager = None
    if directory is not None:
        manager = checkpoints.checkpoint_manager(directory, monitor=None if validate is None else monitor)
    try:
        first = 0
        if manager is not None and (restored := checkpoints.restore_newest(manager, state)) is not None:
            first, state = restored
            if first > epochs:
                raise ValueError(f'{directory} holds {first} epochs, more than the {epochs} asked for: choose another folder')
        log = _MetricsLog(log, name, first)
        best: tuple[float, int, Any] | None = None
        unread: list[tuple[int, list[dict[str, Mean]]]] = []
        writer = jax.process_index() == 0
        with tqdm(total=epochs, initial=first, desc=name, leave=False, disable=None if progress and writer else True) as bar:
            for number in range(first + 1, epochs + 1):
                state, metrics = epoch(state, teacher_variables, data)
                unread.append((number, metrics))
                due = number % every == 0 or number == epochs
                # Reading waits for the device, so between checkpoints the epoch before the one that runs now is read.
                while len(unread) > (0 if due else 1):
                    last = _read(*unread.pop(0), directory)
                    log.write(last)
                    bar.set_postfix(loss=f'{last["loss"]:.4f}')
                bar.update()
                if not due:
                    continue
                measured = {} if validate is None else compute(validate(state.variables))
                log.write({'epoch': number, **{f'validation/{key}': value for key, value in measured.items()}})
                if validate is not None and not np.isfinite(measured.get(monitor, np.nan)):
                    raise ValueError(f'fit: the metric {monitor!r} of epoch {number} is missing or not finite in {measured}')
                # Of equals the last is best, as Orbax has it.
                if validate is not None and (best is None or measured[monitor] >= best[0]):
                    # The state is donated to the next epoch, so what is kept is a copy.
                    best = (measured[monitor], number, jax.tree.map(jnp.copy, state.variables))
                if manager is not None:
                    checkpoints.save(manager, number, state, measured or None)
        if validate is None:
            best = (0.0, epochs, state.variables)
        elif manager is not None and first > 0:
            manager.wait_until_finished()
            best_epoch = manager.best_step()
            if best_epoch is None:
                raise ValueError(f'{directory} was trained without validation, so it has no best epoch: choose another folder')
            best = (0.0, best_epoch, checkpoints.restore(manager, best_epoch, state).variables)
        return Fitted(state, best[2], best[1], first)
    finally:
        if manager is not None:
            manager.close()


def _read(number: int, metrics: list[dict[str, Mean]], directory: Any) -> dict[str, Any]:
    """Fetches an epoch's metrics, makes sure that they are finite, and averages them."""
    fetched = jax.device_get(metrics)
    losses = np.concatenate([chunk['loss'].total for chunk in fetched])
    steps = len(losses)
    if not np.isfinite(losses).all():
        at = int(np.argmax(~np.isfinite(losses)))
        values = {key: np.concatenate([chunk[key].total for chunk in fetched])[at] for key in fetched[0]}
        terms = [key for key, value in values.items() if f'{key}/weighted' in values and not np.isfinite(value)]
        culprit = f'term {", ".join(terms)}' if terms else 'the sum of the terms'
        kept = 'no checkpoints are kept' if directory is None else f'the last good checkpoint is in {directory}'
        raise NonFiniteLossError(f'the loss is not finite at step {(number - 1) * steps + at}, from {culprit}; {kept}')
    sums = add(*({key: Mean(*(x.sum(axis=0) for x in mean)) for key, mean in chunk.items()} for chunk in fetched))
    return {'epoch': number, 'step': number * steps, **compute(sums)}


class _MetricsLog:
    """A file of JSON lines that several runs share; a run that resumes drops its own lines after the epoch it resumes from."""

    def __init__(self, path: str | pathlib.Path | None, name: str, resume_from: int) -> None:
        self.path = None if path is None or jax.process_index() != 0 else pathlib.Path(path)
        self.name = name
        if self.path is None or not self.path.exists():
            return
        lines = self.path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if not self._is_stale(line, resume_from)]
        if len(kept) < len(lines):
            partial = self.path.with_name(self.path.name + '.partial')
            partial.write_text(''.join(kept))
            partial.replace(self.path)

    def _is_stale(self, line: str, resume_from: int) -> bool:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            return True  # A run that was killed may have left half a line.
        return record['run'] == self.name and record['epoch'] > resume_from

    def write(self, record: dict[str, Any]) -> None:
        if self.path is not None:
            with self.path.open('a') as file:
                file.write(json.dumps({'run': self.name, **record}) + '\n')
