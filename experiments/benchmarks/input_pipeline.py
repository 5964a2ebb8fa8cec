"""Examples a second of the input pipeline, and whether training waits for it.

    python -m experiments.benchmarks.input_pipeline

Reads images of a TFDS data set (PNG in ArrayRecord) at random through grain, in threads (0 workers) or in worker processes,
and trains a pair with them by `training.streaming_epoch`. Prints, for each number of workers, the rate of reading alone, the
share of the time for which a step has to wait for its batch (starved: each step is waited for, so what else the time is spent
on is the step), and the time of an epoch against one with the data on the device. A pipeline keeps up if it reads faster than
the step trains, with the processor's cores shared: on a CPU the step takes them from the reader and the reader from it.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import jax
import numpy as np
import optax

from experiments import runs, settings
from experiments.architectures import ARCHITECTURES, network
from experiments.benchmarks.turns import in_turns, ratio
from experiments.settings import Count, Within
from kdjax import data, networks, objectives, training
from kdjax.training import read_batches


@dataclasses.dataclass(frozen=True)
class Config:
    """What to read, and to train with it."""

    dataset: str = 'fashion_mnist'
    """A TFDS data set that is prepared as ArrayRecord, or digits."""
    data_dir: str | None = None
    """Where TFDS keeps its data sets."""
    teacher: str = 'cnn_64_128'
    """The teacher's architecture, a name of `experiments.architectures`."""
    student: str = 'cnn_32_64'
    """The student's."""
    batch_size: Count = 128
    """Examples a step."""
    steps: Count = 40
    """Steps an epoch, of the first examples of the data set."""
    workers: tuple[Annotated[int, Within(0)], ...] = (0, 1, 2)
    """Numbers of worker processes to compare; the ratio is that of the first."""
    repeats: Count = 3
    """Timed epochs of each kind, in turns, after one that is not timed."""


_WARM_UP = 24


class Images:
    """The first images of a data source, under the names that training expects, a batch at once."""

    def __init__(self, source: Any, keys: tuple[str, str], examples: int) -> None:
        self.source, self.keys, self.examples = source, keys, examples

    def __len__(self) -> int:
        """Number of examples."""
        return self.examples

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One example."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Several examples."""
        image, label = self.keys
        return [{'inputs': each[image], 'labels': np.int32(each[label])} for each in self.source.__getitems__(indices)]


def main(config: Config) -> None:
    """Measures and prints."""
    settings.check_ranges(config)
    if not config.workers:
        raise ValueError('--workers needs at least one number')
    device, source = jax.devices()[0].device_kind, _open(config)
    example = source[0]['inputs']
    print(f'{config.dataset}, {config.teacher} -> {config.student}, {config.steps} steps of {config.batch_size}, {device}')
    problem, variables = _problem(config, example)
    on_device = {
        name: np.stack([each[name] for each in source.__getitems__(range(len(source)))]) for name in ('inputs', 'labels')
    }
    on_device = jax.device_put(on_device)
    epochs = {'device': _epochs(problem, training.in_memory_epoch(problem, batch_size=config.batch_size), variables, on_device)}
    for workers in config.workers:
        run = training.streaming_epoch(problem, batch_size=config.batch_size, workers=workers)
        epochs[str(workers)] = _epochs(problem, run, variables, source)
    times = in_turns(epochs, config.repeats)
    epochs.clear()  # ends the workers
    examples = config.steps * config.batch_size
    milliseconds = {name: statistics.median(taken) for name, taken in times.items()}
    print(f'{"on the device":13} {1e3 * examples / milliseconds["device"]:9.0f} examples/s')
    rates, starved, ratios = {}, {}, {}
    for workers in config.workers:
        name = str(workers)
        rates[name], starved[name] = _read_and_wait(config, problem, variables, source, workers)
        ratios[name] = ratio(times[name], times['device'])
        print(
            f'{name:>5} workers {1e3 * examples / milliseconds[name]:9.0f} examples/s, ratio {ratios[name]:.3f}; '
            f'reading alone {rates[name]:.0f} examples/s; starved {starved[name]:.1%}'
        )
    first = str(config.workers[0])
    summary = {
        'name': 'input_pipeline',
        'ratio': ratios[first],
        'ours_ms': milliseconds[first],
        'theirs_ms': milliseconds['device'],
        'ratios': ratios,
        'reading_examples_per_second': rates,
        'starved': starved,
    }
    print(json.dumps({**summary, **dataclasses.asdict(config), 'device': device, 'jax': jax.__version__}))


def _open(config: Config) -> Images:
    examples = config.steps * config.batch_size
    if config.dataset == 'digits':
        split, keys = data.load('digits').train, ('inputs', 'labels')
        source: Any = _InMemory(split)
    else:
        import tensorflow_datasets as tfds  # takes long to import

        builder = tfds.builder(config.dataset, data_dir=config.data_dir, file_format='array_record')
        source, keys = builder.as_data_source(split='train'), builder.info.supervised_keys
    if len(source) < examples:
        raise ValueError(f'{config.dataset} has {len(source)} examples, fewer than {config.steps} x {config.batch_size}')
    return Images(source, keys, examples)


@dataclasses.dataclass(frozen=True)
class _InMemory:
    """Arrays as a data source of TFDS."""

    arrays: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.arrays['labels'])

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return [{name: array[i] for name, array in self.arrays.items()} for i in indices]


def _problem(config: Config, example: np.ndarray) -> tuple[training.Problem, Any]:
    normalize = data.augment.normalize(0.5, 0.25)
    teacher, student = (
        networks.preprocess(network(ARCHITECTURES[name], 10), normalize) for name in (config.teacher, config.student)
    )
    objective = 0.1 * objectives.hard_labels() + 0.9 * objectives.soft_targets()
    problem = training.distillation(student, teacher, objective, optax.sgd(0.01, momentum=0.9))
    return problem, jax.jit(teacher.init)(jax.random.key(0), example[None])


def _begin(problem: training.Problem, source: Any) -> training.TrainState:
    example = source[0] if not isinstance(source, dict) else {name: array[0] for name, array in source.items()}
    return jax.jit(problem.init)(jax.random.key(1), {name: np.asarray(x)[None] for name, x in example.items()})


def _epochs(problem: training.Problem, run: training.Epoch, variables: Any, source: Any) -> Callable[[], Any]:
    """A function that runs one epoch more each time that it is called."""
    state = _begin(problem, source)

    def one_epoch() -> Any:
        nonlocal state
        state, metrics = run(state, variables, source)
        return metrics

    return one_epoch


def _read_and_wait(
    config: Config, problem: training.Problem, variables: Any, source: Images, workers: int
) -> tuple[float, float]:
    """Examples a second of reading alone, and the share of the time for which steps wait for what they read."""
    batches = read_batches(source, config.batch_size, seed=0, workers=workers)
    state = _begin(problem, source)
    state, _ = problem.step(state, variables, next(batches)[0])
    # What was read ahead during compilation is not counted; the buffers hold fewer batches than these.
    for _ in range(_WARM_UP):
        next(batches)
    started = time.perf_counter()
    for _ in range(config.steps):
        jax.block_until_ready(next(batches))
    rate = config.steps * config.batch_size / (time.perf_counter() - started)
    waited, began = 0.0, time.perf_counter()
    for _ in range(config.steps):
        started = time.perf_counter()
        batch, _ = jax.block_until_ready(next(batches))
        waited += time.perf_counter() - started
        state, metrics = problem.step(state, variables, batch)
        jax.block_until_ready(metrics)
    share = waited / (time.perf_counter() - began)
    batches.close()
    return rate, share


if __name__ == '__main__':
    runs.command_line(Config, main)
