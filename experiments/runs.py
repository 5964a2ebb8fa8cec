"""What every experiment needs around what it is about: a command line, an output folder that resumes, and training.

A script is a `Config` and a function of it that makes an `Experiment`: what is trained on what, and how it is reported. `run`
does the rest.
"""

import contextlib
import dataclasses
import json
import logging
import math
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import tyro

from experiments import logs, reporting, settings
from kdjax import data, parallel, training
from kdjax.batches import Batch, take_examples


class Trained(NamedTuple):
    """What a training ends with.

    Attributes:
      variables: the student's after the last step, averaged if the flags say so.
      best_variables: those that validation found best.
      resumed_from: the number of steps that were done before.
    """

    variables: dict[str, Any]
    best_variables: dict[str, Any]
    resumed_from: int


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that has begun.

    Attributes:
      output: its folder.
      settings: how it computes.
      mesh: the devices it has.
    """

    output: pathlib.Path
    settings: settings.Training
    mesh: jax.sharding.Mesh

    def fit(
        self,
        name: str,
        problem: training.Problem,
        split: Any,
        teacher_variables: Any = None,
        *,
        folder: pathlib.Path | None = None,
        **options: Any,
    ) -> Trained:
        """Trains by `training.fit`, or takes up an earlier training of this name.

        Args:
          name: of the checkpoints and in the logs, such as 'seed0/alone'.
          problem: what to train.
          split: on what.
          teacher_variables: the teacher's.
          folder: where checkpoints and log are; the run's own if not given.
          options: of `training.fit`, before those that the flags give.
        """
        traced, events = self.settings.profile, self.settings.tensorboard
        options = {
            'batch_size': self.settings.batch_size,
            'mesh': self.mesh,
            'skip_nonfinite': self.settings.skip_nonfinite,
            'profile': None if traced is None else pathlib.Path(traced) / name,
            'variables_of': settings.variables_of(self.settings),
            **saved(folder or self.output, name),
            **options,
        }
        if jax.process_index() == 0:
            summary = logs.summary(problem, split, options['batch_size'], teacher_variables)
            print(f'{name}: {summary}', file=sys.stderr)
        with logs.tensorboard(None if events is None else pathlib.Path(events) / name) as on_record:
            fitted = training.fit(problem, split, teacher_variables, on_record=on_record, **options)
        return Trained(options['variables_of'](fitted.state), fitted.best_variables, fitted.resumed_from)


class Experiment(NamedTuple):
    """What a script is about.

    Attributes:
      title: of the report.
      dataset: whose test split is measured.
      problems: what is trained on what: pairs of a split and of problems, which are checked before anything is written.
      rows: trains everything in a run, then measures it on the test split: `rows(run) -> rows of the table`.
      notes: what the rows show.
      report: further arguments of `reporting.write_report`.
      sections: what follows in the report: `sections(run) -> sections`, once the rows are measured.
    """

    title: str
    dataset: data.Dataset
    problems: Sequence[tuple[Batch, Sequence[training.Problem]]]
    rows: Callable[[Run], list[reporting.Row]]
    notes: Callable[[list[reporting.Row]], str]
    report: Mapping[str, Any] = {}
    sections: Callable[[Run], Sequence[reporting.Section]] = lambda run: ()


def run(experiment: Callable[[Any], Experiment], config: Any) -> None:
    """Trains, measures and reports what a config asks for, or takes up a run that was interrupted.

    Args:
      experiment: makes the experiment of a config, and writes nothing.
      config: with the shared settings `training` and an `output`.

    Raises:
      ValueError: a flag is out of range, data and networks do not fit, or the output folder holds something else; nothing has
        been written then.
    """
    started = time.time()
    settings.check_ranges(config)
    made = experiment(config)
    batch_size = config.training.batch_size
    for split, problems in made.problems:
        check(split, batch_size, *problems)
    devices = mesh(batch_size, fsdp=config.training.fsdp)
    output = open_output(config)
    if output is None:
        return
    begun = Run(output, config.training, devices)
    rows = made.rows(begun)
    reporting.write_report(
        output,
        rows,
        title=made.title,
        dataset=made.dataset,
        started=started,
        devices=devices_used(batch_size),
        notes=made.notes(rows),
        sections=made.sections(begun),
        **made.report,
    )


def command_line(config: type, main: Callable[[Any], None]) -> None:
    """Reads the flags into the config and runs main; what the user got wrong ends as one line on stderr.

    A run that SIGTERM or Ctrl-C stopped ends with status 143 or 130, as shells report these signals, after its state is saved.
    """
    arguments = tyro.cli(config, description=sys.modules[config.__module__].__doc__, config=(tyro.conf.OmitArgPrefixes,))
    # Orbax logs the tracebacks of errors that it raises too.
    logging.getLogger('absl').setLevel(logging.CRITICAL)
    interrupted: list[int] = []
    try:
        if hasattr(arguments, 'training'):
            settings.prepare_jax(arguments.training)
        parallel.initialize_distributed()
        with _interruptible(interrupted):
            main(arguments)
    except training.Preempted as error:
        print(error, file=sys.stderr)
        sys.exit(128 + (signal.SIGINT if interrupted else signal.SIGTERM))
    except KeyboardInterrupt:
        print('stopped: the same command goes on after what was saved last', file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except (ValueError, training.NonFiniteLossError, OSError, ImportError) as error:
        sys.exit(f'error: {next(iter(str(error).splitlines()), type(error).__name__)}')


@contextlib.contextmanager
def _interruptible(interrupted: list[int]) -> Iterator[None]:
    """Lets the first Ctrl-C during a training save its state, as SIGTERM does, and the second one stop at once."""

    def stop(number: int, frame: Any) -> None:
        del frame
        trains = signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, signal.SIG_IGN, None)
        if interrupted or not trains:
            raise KeyboardInterrupt
        interrupted.append(number)
        print('\nsaving the state first; Ctrl-C again stops at once', file=sys.stderr)
        signal.raise_signal(signal.SIGTERM)

    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def open_output(config: Any) -> pathlib.Path | None:
    """Makes the output folder with `config.json`, or finds the run that it holds; several hosts share it.

    Returns:
      The folder; None if the run in it is finished, which is then said.

    Raises:
      ValueError: the folder holds a run with another config, or other files.
    """
    output = pathlib.Path(config.output)
    flags = {name: value for name, _, value in settings.fields(config) if name not in ('output', *settings.OF_NO_CONSEQUENCE)}
    wanted = json.loads(json.dumps(flags, default=str))
    file = output / 'config.json'
    if file.exists():
        found = json.loads(file.read_text())
        if found != wanted:
            key = next(key for key in {**found, **wanted} if found.get(key) != wanted.get(key))
            raise ValueError(
                f'{output} holds a run with {key} {found.get(key)!r}, not {wanted.get(key)!r}: '
                'choose another --output, or remove that folder'
            )
        if (output / 'report.json').exists():
            say((output / 'report.md').read_text())
            say(f'This run is finished already; its report is {output / "report.md"}')
            return None
        say(f'Resuming the run in {output}')
        return output
    if output.exists() and any(output.iterdir()):
        raise ValueError(f'{output} is not empty and holds no run: choose another --output')
    parallel.wait_for_hosts('output found')  # all have looked before the first one writes
    parallel.on_first_host(lambda: reporting.write_json(file, wanted), 'output opened')
    return output


def say(text: str) -> None:
    """Prints once, however many hosts there are."""
    if jax.process_index() == 0:
        print(text)


def check(split: Batch, batch_size: int, *problems: training.Problem) -> None:
    """Raises where data, networks and objectives do not fit, before anything has been written.

    Raises:
      ValueError: the data are fewer than a batch, or hold what a problem has no use for.
    """
    training.steps_per_epoch(split, batch_size)
    for problem in problems:
        problem.check(split, batch_size)
        jax.eval_shape(problem.init, jax.random.key(0), take_examples(split, slice(0, batch_size)))


def mesh(batch_size: int, *, fsdp: int = 1) -> jax.sharding.Mesh:
    """A mesh of `devices_used(batch_size)` devices, and says so if these are not all; see `parallel.data_parallel`."""
    used, there = devices_used(batch_size), jax.device_count()
    if used < there:
        left = ', '.join(str(device) for device in jax.devices()[used:])
        say(
            f'Training on {used} of {there} devices, as many as divide a batch of {batch_size}, without {left}; '
            f'batches of {-(-batch_size // there) * there} would use all'
        )
    return parallel.data_parallel(jax.devices()[:used], fsdp=fsdp)


def devices_used(batch_size: int) -> int:
    """How many devices `mesh` takes: as many as divide the batch; with several hosts, all of theirs."""
    return math.gcd(batch_size, jax.device_count()) if jax.process_count() == 1 else jax.device_count()


def saved(output: pathlib.Path, name: str) -> dict[str, Any]:
    """Where `training.fit` keeps the checkpoints and the log of a run, `fit(..., **saved(output, name))`."""
    return {'directory': output / 'checkpoints' / name, 'log': output / 'metrics.jsonl', 'name': name}
