"""Training from start to end: one verb for data in memory, read example by example, or in a loader's batches."""

import functools
import operator
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from kdjax.batches import count_examples
from kdjax.metrics import Average
from kdjax.networks import Variables
from kdjax.parallel import shard
from kdjax.problems import Problem, TrainState
from kdjax.training import _checkpoints, _preemption
from kdjax.training._augmentation import Augment, Views
from kdjax.training._epochs import cached
from kdjax.training._feeds import Feed, feed
from kdjax.training._logs import MetricsLog, Progress
from kdjax.training._monitoring import Monitor
from kdjax.training._nonfinite import skip_nonfinite as skipping_problem
from kdjax.training._profiling import Profile
from kdjax.training._reading import check_parameters
from kdjax.training._reading import read as read_metrics

# Cached, so that a problem is compiled once for all its runs.
_skipping = functools.lru_cache(maxsize=32)(skipping_problem)


class Fitted(NamedTuple):
    """What training ends with.

    Attributes:
      state: the state after the last step.
      best_variables: the student's variables where validation found them best; those of the last step without validation.
      best_step: the step they are from; the last one if several are equally good.
      resumed_from: the number of steps that this call found done, 0 for a fresh run.
    """

    state: TrainState
    best_variables: dict[str, Any]
    best_step: int
    resumed_from: int

    @property
    def variables(self) -> dict[str, Any]:
        """The student's variables after the last step."""
        return self.state.variables


def fit(
    problem: Problem,
    data: Any,
    teacher_variables: Variables | None = None,
    *,
    key: jax.Array,
    batch_size: int | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    validate: Callable[[Variables], Mapping[str, Average | float]] | None = None,
    monitor: str = 'accuracy',
    mode: Literal['min', 'max'] | None = None,
    target: float | None = None,
    patience: int | None = None,
    every: float | None = None,
    directory: str | pathlib.Path | None = None,
    log: str | pathlib.Path | None = None,
    on_record: Callable[[dict[str, Any]], None] | None = None,
    name: str = 'train',
    mesh: Mesh | None = None,
    augment: Augment | None = None,
    views: Views | None = None,
    workers: int = 0,
    student_variables: Variables | None = None,
    variables_of: Callable[[TrainState], dict[str, Any]] = operator.attrgetter('variables'),
    skip_nonfinite: int = 0,
    profile: str | pathlib.Path | None = None,
    progress: bool = True,
) -> Fitted:
    """Trains for a number of epochs or steps in all, taking up an earlier run of the same folder where it stopped.

    A run may be killed at any moment, and taken up by the same call: it ends with the same numbers, bit for bit, on as many
    processor cores. At SIGTERM it saves its state first, and raises `Preempted`. What a problem compiles to is kept for its
    next run.

    Args:
      problem: what to train, see `training.distillation`.
      data: one of
        - a dictionary of pytrees of arrays, `{'inputs': ..., 'labels': ...}`, [examples, ...]: it lives on the device, see
          `training.in_memory_epoch`. Where the inputs are memory maps they are read piece by piece instead;
        - examples that can be read in any order, dictionaries too, such as `tfds.data_source`, a `grain.MapDataset` or
          `training.JoinedSource`: they are streamed, see `training.streaming_epoch`;
        - batches that somebody else's loader makes, dictionaries too: torch's DataLoader, a batched grain data set, a
          generator. A run that resumes goes on from the loader's own state if it has one that JSON can hold, and else reads and
          leaves out what it has seen, which is only right for a loader that gives the same batches again.
      teacher_variables: the teacher's variables; None for a problem without one.
      key: the run's random key: of the initial student, of the order of the examples, of their augmentation and of noise.
      batch_size: examples a step, over all devices and hosts; not needed for data in batches.
      epochs: epochs in all, those of an earlier run included.
      steps: steps in all, in place of epochs.
      validate: `validate(variables) -> metrics` on the validation split: averages, as `training.evaluator` makes them, or
        numbers.
      monitor: the metric of `validate` that tells what is best.
      mode: whether it is best where it is largest, `'max'`, or smallest, `'min'`; not needed for the names of `kdjax.metrics`.
      target: value of the metric at which training stops, after the validation that reaches it.
      patience: validations in a row without a new best after which training stops.
      every: epochs, with `epochs=`, or steps, with `steps=`, between two validations, each followed by a checkpoint; the end
        always has both. Parts of epochs are fine. One epoch, or a tenth of the steps, by default. The log has a line for each
        such interval, and for each epoch.
      directory: folder for the checkpoints; None keeps none.
      log: file for the metrics, one JSON object a line; lines of steps that are run again are replaced. An interval that was
        interrupted has a line for each part.
      on_record: called with every record of the log, for TensorBoard and the like.
      name: of this run, in the log and the progress bar.
      mesh: devices to split each batch over, see `parallel.data_parallel`; state, teacher and data are laid out on it here.
      augment: applied to every example's inputs with a key of its own.
      views: augmented views that repeat, in place of `augment`: those that `record_teacher` has recorded.
      workers: processes that read, for data that are streamed; 0 reads in threads.
      student_variables: variables that the student starts from, in place of fresh ones.
      variables_of: which variables of a state are validated and kept as the best: the student's own, or
        `optimizers.averaged_variables`.
      skip_nonfinite: how many steps of this call may be skipped because they would make something infinite or NaN, see
        `training.skip_nonfinite`.
      profile: folder for a `jax.profiler` trace of the sixth to the tenth step of this call, or of steps in its middle if there
        are fewer; XProf, TensorBoard and Perfetto show it.
      progress: whether to show a bar on a terminal, and a line for every interval elsewhere, on stderr.

    Returns:
      The result.

    Raises:
      ValueError: an argument is out of range, the data are of another kind or hold values that the objective has no use for,
        or the folder holds checkpoints of another model, of other data or of another key.
      NonFiniteLossError: the loss, its gradient or a parameter is not finite, or more steps were skipped than allowed. Nothing
        of that interval is saved; the last good checkpoint stays.
      OSError: a checkpoint could not be written, as on a full disk; the last good one stays.
      Preempted: SIGTERM came; the state is saved.

    >>> import flax.linen as nn, jax, numpy as np, optax
    >>> from kdjax import networks, objectives, optimizers, parallel, training
    >>> data = {'inputs': np.ones((8, 5), np.float32), 'labels': np.zeros(8, np.int32)}
    >>> student = networks.from_linen(nn.Dense(3))
    >>> problem = training.distillation(student, None, objectives.hard_labels(), optax.sgd(0.1))
    >>> fitted = fit(problem, data, key=jax.random.key(0), batch_size=4, epochs=3, progress=False)
    >>> int(fitted.state.step), fitted.best_step, sorted(fitted.variables)
    (6, 6, ['params'])
    """
    if (epochs is None) == (steps is None):
        raise ValueError('fit: give either epochs or steps')
    for option, value in (('epochs', epochs), ('steps', steps), ('patience', patience)):
        if value is not None and (value < 1 or value != int(value)):
            raise ValueError(f'fit: {option} must be a whole number of at least 1, got {value}')
    if every is not None and not 0 < every < np.inf:
        raise ValueError(f'fit: every must be above 0, got {every}')
    if skip_nonfinite < 0:
        raise ValueError(f'fit: skip_nonfinite must be at least 0, got {skip_nonfinite}')
    best = Monitor(validate, variables_of, monitor, mode, target, patience)
    if skip_nonfinite:
        problem = cached(_skipping, problem)
    source = feed(problem, data, batch_size=batch_size, mesh=mesh, augment=augment, views=views, workers=workers)
    problem.check(source.at_hand, count_examples(source.example), student_variables=student_variables)
    total = _number_of_steps(epochs, steps, source.steps_per_epoch)
    marks = _marks(total, every, None if epochs is None else source.steps_per_epoch)
    state = problem.init(key, source.example, student_variables=student_variables)
    teacher_variables = {} if teacher_variables is None else teacher_variables
    if mesh is not None:
        state, teacher_variables = shard(mesh, (state, teacher_variables))
    manager = None
    if directory is not None:
        manager = _checkpoints.checkpoint_manager(directory, monitor=None if validate is None else monitor, mode=best.mode)
    try:
        state, begun = _resume(manager, state, source, skip=progress)
        if begun > total:
            raise ValueError(f'{directory} holds {begun} steps, more than the {total} asked for: choose another folder')
        if begun:
            best.resume(manager, begun, marks)
        total = begun if best.satisfied else total
        step, skipped = begun, 0
        record = _recorder(MetricsLog(log, name, begun), on_record)
        unread: list[tuple[int, list[dict[str, Average]]]] = []
        with (
            Progress(name, begun, total, wanted=progress) as bar,
            Profile(profile, begun, total) as trace,
            _preemption.notices(begun) as stop,
        ):
            trace.at(step, state)
            for end in sorted(x for x in {*marks, *_epoch_ends(source, total), *trace.steps} if begun < x <= total):
                first = step
                state, metrics = source.epoch(state, teacher_variables, source.data, stop, first, end - first)
                step += sum(np.shape(chunk['loss'].total)[0] for chunk in metrics)
                bar.advance(step - first)
                trace.at(step, state)
                unread.append((first, metrics))
                due, stopped = step in marks, stop(step)
                # Reading waits for the device, so between checkpoints the interval before the one that runs now is read.
                while len(unread) > (0 if due or stopped else 1):
                    read, more = read_metrics(*unread.pop(0), skip_nonfinite - skipped, directory)
                    skipped += more
                    bar.show(record(_numbered(source, read)), line=read['step'] in marks)
                if not due and not stopped:
                    continue
                check_parameters(state, step, directory)
                measured = {each: x for each, x in (best.measure(state, step) if due else {}).items() if np.ndim(x) == 0}
                if measured:
                    told = {f'validation/{each}': x for each, x in measured.items()}
                    bar.show(record(_numbered(source, {'step': step, **told})), line=True)
                if manager is not None:
                    _checkpoints.save(manager, step, state, measured, source.settings, source.position())
                if stop(step):
                    raise _preempted(step, manager)
                if best.satisfied:
                    break
        if best.best_variables is not None and best.best_step is not None and (manager is None or begun == 0):
            return Fitted(state, best.best_variables, best.best_step, begun)
        if validate is None or manager is None:
            return Fitted(state, variables_of(state), step, begun)
        _checkpoints.wait(manager)
        restored = _checkpoints.restore_best(manager, state)
        if restored is None:
            raise ValueError(f'{directory} was trained without validation, so nothing in it is best: choose another folder')
        return Fitted(state, variables_of(restored[1]), restored[0], begun)
    finally:
        if manager is not None:
            _checkpoints.close(manager)


def _number_of_steps(epochs: int | None, steps: int | None, steps_per_epoch: int | None) -> int:
    if steps is not None:
        return steps
    if epochs is None or steps_per_epoch is None:
        raise ValueError('fit: data that do not say how many batches they have need steps, not epochs')
    return epochs * steps_per_epoch


def _marks(total: int, every: float | None, steps_per_epoch: int | None) -> set[int]:
    """The steps after which the student is validated and saved."""
    if steps_per_epoch is None:
        between = max(1.0, total / 10) if every is None else every
    else:
        between = steps_per_epoch * (1 if every is None else every)
    return {max(1, round(i * between)) for i in range(1, int(total / between) + 1)} | {total}


def _epoch_ends(source: Feed, total: int) -> range:
    return range(0) if source.steps_per_epoch is None else range(source.steps_per_epoch, total + 1, source.steps_per_epoch)


def _resume(manager: Any, state: TrainState, source: Feed, *, skip: bool) -> tuple[TrainState, int]:
    """The newest state in the folder, if there is one, with the data where it left them; and the number of its steps."""
    if manager is None:
        return state, 0
    restored = _checkpoints.restore_run(manager, state, source.settings)
    if restored is None:
        return state, 0
    begun, found, position = restored
    if not np.array_equal(jax.random.key_data(found.key), jax.random.key_data(state.key)):
        raise ValueError(
            f'{manager.directory} holds a run with another key, whose steps were other batches: choose another folder'
        )
    source.seek(begun, position, skip)
    return found, begun


def _recorder(
    log: MetricsLog, on_record: Callable[[dict[str, Any]], None] | None
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def record(measured: dict[str, Any]) -> dict[str, Any]:
        log.write(measured)
        if on_record is not None and jax.process_index() == 0:
            on_record(measured)
        return measured

    return record


def _numbered(source: Feed, measured: dict[str, Any]) -> dict[str, Any]:
    """The record with the number of the epoch that its last step was in, from 1."""
    if source.steps_per_epoch is None:
        return measured
    return {'epoch': -(-measured['step'] // source.steps_per_epoch), **measured}


def _preempted(step: int, manager: Any) -> _preemption.Preempted:
    """Waits until the state is on disk, and says so."""
    if manager is None:
        return _preemption.Preempted(
            f'stopped by SIGTERM at step {step}; nothing is kept, as there is no folder for checkpoints'
        )
    _checkpoints.wait(manager)
    return _preemption.Preempted(
        f'stopped by SIGTERM at step {step}, which is saved in {manager.directory}: the same command resumes there'
    )
