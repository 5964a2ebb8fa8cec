"""Training from start to end: epochs, validation, checkpoints, a log and a progress bar."""

import json
import operator
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from kdjax.batches import Batch
from kdjax.metrics import Average, compute
from kdjax.networks import Variables
from kdjax.training import checkpoints, preemption
from kdjax.training.epochs import Epoch, count_examples, steps_per_epoch
from kdjax.training.step import TrainState


class Fitted(NamedTuple):
    """What training ends with.

    Attributes:
      state: the state after the last epoch.
      best_variables: the student's variables after the best epoch, by validation; those of the last without validation.
      best_epoch: its number, from 1; of equals the last.
      resumed_from: the number of whole epochs that this call found done, 0 for a fresh run.
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
    validate: Callable[[Variables], dict[str, Average]] | None = None,
    variables_of: Callable[[TrainState], dict[str, Any]] = operator.attrgetter('variables'),
    monitor: str = 'accuracy',
    target: float | None = None,
    every: int = 1,
    directory: str | pathlib.Path | None = None,
    log: str | pathlib.Path | None = None,
    name: str = 'train',
    progress: bool = True,
    skip_nonfinite: int = 0,
) -> Fitted:
    """Trains for a number of epochs in all, taking up an earlier run of the same folder where it stopped.

    A run may be killed at any moment, and taken up by the same call: it ends with the same numbers, bit for bit. At SIGTERM it
    saves its state first, within an epoch too, and raises `Preempted`.

    Args:
      epoch: runs one epoch, see `training.in_memory_epoch`.
      state: the state to start from; it is donated.
      teacher_variables: the teacher's variables; None with `networks.nothing()`.
      data: the training split.
      epochs: epochs in all, those of an earlier run included.
      validate: `validate(variables) -> metrics` on the validation split.
      variables_of: which variables of a state are validated and kept as the best: the student's own, or
        `training.averaged_variables`.
      monitor: the metric of `validate` that tells the best epoch, the larger the better.
      target: value of the metric at which training stops, after the epoch that reaches it.
      every: epochs between two validations, which are followed by a checkpoint; the last epoch always has both.
      directory: folder for the checkpoints; None keeps none.
      log: file for the metrics, one JSON object a line; lines of steps that are run again are replaced. An epoch that was
        interrupted has a line for each part.
      name: of this run, in the log and the progress bar.
      progress: whether to show the bar, on a terminal.
      skip_nonfinite: how many steps of this call may be skipped; `epoch` must be of a problem that `training.skip_nonfinite`
        made.

    Returns:
      The result.

    Raises:
      ValueError: an argument is out of range, or the folder holds checkpoints of another model or of other batches.
      NonFiniteLossError: the loss is not finite, or more steps were skipped than allowed. Nothing of that epoch is saved; the
        last good checkpoint stays.
      OSError: a checkpoint could not be written, as on a full disk; the last good one stays.
      Preempted: SIGTERM came; the state is saved.
    """
    if epochs < 1 or every < 1:
        raise ValueError(f'fit: epochs and every must be at least 1, got {epochs} and {every}')
    if target is not None and validate is None:
        raise ValueError('fit: target needs validate, which measures what is to reach it')
    if skip_nonfinite < 0:
        raise ValueError(f'fit: skip_nonfinite must be at least 0, got {skip_nonfinite}')
    steps = steps_per_epoch(data, epoch.batch_size)
    settings = {'examples': count_examples(data), 'batch_size': epoch.batch_size}
    teacher_variables = {} if teacher_variables is None else teacher_variables
    manager = None
    if directory is not None:
        manager = checkpoints.checkpoint_manager(directory, monitor=None if validate is None else monitor)
    try:
        if manager is not None and (restored := checkpoints.restore_newest(manager, state, settings)) is not None:
            _, state = restored
        start = step = int(state.step)
        first = start // steps
        if start > epochs * steps:
            raise ValueError(
                f'{directory} holds {start / steps:g} epochs, more than the {epochs} asked for: choose another folder'
            )
        if target is not None and start == first * steps > 0 and compute(validate(variables_of(state)))[monitor] >= target:
            epochs = first
        log = _MetricsLog(log, name, start)
        best: tuple[float, int, Any] | None = None
        unread: list[tuple[int, int, list[dict[str, Average]]]] = []
        skipped = 0
        writer = jax.process_index() == 0
        bar = tqdm(total=epochs, initial=first, desc=name, leave=False, disable=None if progress and writer else True)
        with bar, preemption.notices(start) as stop:
            for number in range(first + 1, epochs + 1):
                begun = step
                state, metrics = epoch(state, teacher_variables, data, stop, begun)
                step += sum(len(chunk['loss'].total) for chunk in metrics)
                unread.append((number, begun, metrics))
                due = step == number * steps and (number % every == 0 or number == epochs)
                stopped = stop(step)
                # Reading waits for the device, so between checkpoints the epoch before the one that runs now is read.
                while len(unread) > (0 if due or stopped else 1):
                    last, more = _read(*unread.pop(0), skip_nonfinite - skipped, directory)
                    skipped += more
                    log.write(last)
                    bar.set_postfix(loss=f'{last.get("loss", np.nan):.4f}')
                if step == number * steps:
                    bar.update()
                if not due and not stopped:
                    continue
                measured: dict[str, float] = {}
                if due and validate is not None:
                    measured = compute(validate(variables_of(state)))
                    log.write({'epoch': number, 'step': step, **{f'validation/{key}': x for key, x in measured.items()}})
                    if not np.isfinite(measured.get(monitor, np.nan)):
                        raise ValueError(
                            f'fit: the metric {monitor!r} of epoch {number} is missing or not finite in {measured}'
                        )
                    # Of equals the last is best, as Orbax has it.
                    if best is None or measured[monitor] >= best[0]:
                        # The state is donated to the next epoch, so what is kept is a copy.
                        best = (measured[monitor], number, jax.tree.map(jnp.copy, variables_of(state)))
                if manager is not None:
                    checkpoints.save(manager, step, state, measured, settings)
                if stop(step):
                    raise _preempted(step, manager)
                if target is not None and measured[monitor] >= target:
                    break
        if validate is None or (manager is None and best is None):
            return Fitted(state, variables_of(state), epochs, first)
        if manager is None or start == 0:
            return Fitted(state, best[2], best[1], first)
        checkpoints.wait(manager)
        restored = checkpoints.restore_best(manager, state, settings)
        if restored is None:
            raise ValueError(f'{directory} was trained without validation, so it has no best epoch: choose another folder')
        return Fitted(state, variables_of(restored[1]), restored[0] // steps, first)
    finally:
        if manager is not None:
            checkpoints.close(manager)


def _read(
    number: int, begun: int, metrics: list[dict[str, Average]], allowed: int, directory: Any
) -> tuple[dict[str, Any], int]:
    """Fetches the metrics of an epoch's steps, makes sure that they are finite, and averages them; counts skipped steps."""
    fetched = jax.device_get(metrics)
    series = {key: Average(*map(np.concatenate, zip(*(chunk[key] for chunk in fetched), strict=True))) for key in fetched[0]}
    losses = series['loss'].total
    kept = 'no checkpoints are kept' if directory is None else f'the last good checkpoint is in {directory}'
    if not np.isfinite(losses).all():
        at = int(np.argmax(~np.isfinite(losses)))
        terms = [key for key in series if f'{key}/weighted' in series and not np.isfinite(series[key].total[at])]
        culprit = f'term {", ".join(terms)}' if terms else 'the sum of the terms'
        raise NonFiniteLossError(f'the loss is not finite at step {begun + at}, from {culprit}; {kept}')
    skipped = np.zeros(len(losses))
    if 'skipped' in series:
        skipped = series['skipped'].total
    elif allowed:
        raise ValueError('fit: skip_nonfinite needs an epoch of a problem that training.skip_nonfinite made')
    if skipped.sum() > allowed:
        at = int(np.argmax(np.cumsum(skipped) > allowed))
        raise NonFiniteLossError(f'step {begun + at} is not finite, and no more steps may be skipped; {kept}')
    averages = compute({key: Average(*(x.astype(np.float64).sum(axis=0) for x in mean)) for key, mean in series.items()})
    return {'epoch': number, 'step': begun + len(losses), **averages}, int(skipped.sum())


def _preempted(step: int, manager: Any) -> preemption.Preempted:
    """Waits until the state is on disk, and says so."""
    if manager is None:
        return preemption.Preempted(
            f'stopped by SIGTERM at step {step}; nothing is kept, as there is no folder for checkpoints'
        )
    checkpoints.wait(manager)
    return preemption.Preempted(
        f'stopped by SIGTERM at step {step}, which is saved in {manager.directory}: the same command resumes there'
    )


class _MetricsLog:
    """A file of JSON lines that several runs share; a run that resumes drops its own lines after the step it resumes from."""

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
        return record['run'] == self.name and record['step'] > resume_from

    def write(self, record: dict[str, Any]) -> None:
        if self.path is not None:
            with self.path.open('a') as file:
                file.write(json.dumps({'run': self.name, **record}) + '\n')
