"""What every experiment needs around its main: a command line, an output folder that resumes, and training."""

import dataclasses
import json
import logging
import math
import pathlib
import signal
import sys
from collections.abc import Callable
from typing import Any

import jax
import tyro

from experiments.reporting import write_json
from kdjax import export, networks, parallel, quantization, training
from kdjax.batches import Batch, take_examples


def command_line(config: type, main: Callable[[Any], None]) -> None:
    """Reads the flags into the config and runs main; what the user got wrong ends as one line on stderr.

    A run that SIGTERM stopped ends with status 143, as shells report that signal, after its state is saved.
    """
    arguments = tyro.cli(config, description=sys.modules[config.__module__].__doc__)
    # Orbax logs the tracebacks of errors that it raises too.
    logging.getLogger('absl').setLevel(logging.CRITICAL)
    try:
        parallel.initialize_distributed()
        main(arguments)
    except training.Preempted as error:
        print(error, file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)
    except (ValueError, training.NonFiniteLossError, OSError, ImportError) as error:
        sys.exit(f'error: {next(iter(str(error).splitlines()), type(error).__name__)}')


def check_at_least(least: int, **values: int) -> None:
    """Raises for the first flag that is below a number."""
    for name, value in values.items():
        if value < least:
            raise ValueError(f'--{name.replace("_", "-")} must be at least {least}, got {value}')


def open_output(config: Any) -> pathlib.Path | None:
    """Makes the output folder with `config.json`, or finds the run that it holds; several hosts share it.

    Returns:
      The folder; None if the run in it is finished, which is then said.

    Raises:
      ValueError: the folder holds a run with another config, or other files.
    """
    output = pathlib.Path(config.output)
    wanted = {key: value for key, value in dataclasses.asdict(config).items() if key != 'output'}
    wanted = json.loads(json.dumps(wanted, default=str))
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
    parallel.on_first_host(lambda: write_json(file, wanted), 'output opened')
    return output


def say(text: str) -> None:
    """Prints once, however many hosts there are."""
    if jax.process_index() == 0:
        print(text)


def check(data: Batch, batch_size: int, *problems: training.Problem) -> None:
    """Raises where data, networks and objectives do not fit, before anything has been written.

    Raises:
      ValueError: the data are fewer than a batch, or hold what a problem has no use for.
    """
    training.steps_per_epoch(data, batch_size)
    for problem in problems:
        problem.check(data, batch_size)
        jax.eval_shape(problem.init, jax.random.key(0), take_examples(data, slice(0, batch_size)))


def mesh(batch_size: int, *, fsdp: int = 1) -> jax.sharding.Mesh:
    """A mesh of `devices_used(batch_size)` devices, and says so if these are not all; see `parallel.data_parallel`."""
    used, there = devices_used(batch_size), jax.device_count()
    if used < there:
        say(
            f'Training on {used} of {there} devices, as many as divide a batch of {batch_size}; '
            f'batches of {-(-batch_size // there) * there} would use all'
        )
    return parallel.data_parallel(jax.devices()[:used], fsdp=fsdp)


def devices_used(batch_size: int) -> int:
    """How many devices `mesh` has: as many as divide the batch; with several hosts, all of theirs."""
    return math.gcd(batch_size, jax.device_count()) if jax.process_count() == 1 else jax.device_count()


def saved(output: pathlib.Path, name: str) -> dict[str, Any]:
    """Where `training.fit` keeps the checkpoints and the log of a run, `fit(..., **saved(output, name))`."""
    return {'directory': output / 'checkpoints' / name, 'log': output / 'metrics.jsonl', 'name': name}


def ship(output: pathlib.Path, name: str, seed: int, variables: Any) -> tuple[int, dict[str, Any]]:
    """Writes the file to ship, and returns its size and what a user would load from it."""
    file = output / 'networks' / f'seed{seed}' / file_name(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    parallel.on_first_host(lambda: export.save_weights(file, variables), str(file))
    return shipped(output, name, seed)


def shipped(output: pathlib.Path, name: str, seed: int) -> tuple[int, dict[str, Any]]:
    """The size of a file that `ship` wrote, and what a user would load from it."""
    file = output / 'networks' / f'seed{seed}' / file_name(name)
    return file.stat().st_size, quantization.dequantize_weights(export.load_weights(file))


def as_network(artefact: export.Artefact) -> networks.Network:
    """The program that `export.load` read, as a network whose variables are weights of such an artefact."""

    def apply(variables: Any, inputs: Any, *, train: bool = False, rng: Any = None) -> tuple[networks.Outputs, dict[str, Any]]:
        del train, rng
        return networks.Outputs(artefact.apply(variables, inputs)), {}

    return networks.Network(lambda key, inputs: artefact.weights, apply)


def file_name(name: str) -> str:
    """A row's name as the name of a file."""
    return f'{folder_name(name)}.safetensors'


def folder_name(name: str) -> str:
    """A row's name as the name of a folder."""
    return '-'.join(''.join(c if c.isalnum() else ' ' for c in name).split())
