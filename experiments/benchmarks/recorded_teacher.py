"""Time of an epoch from recorded logits, against one that runs the teacher.

    python -m experiments.benchmarks.recorded_teacher

Random images of 32 x 32 pixels, cropped at random in a number of views that repeat, so that the teacher's logits can be
recorded once (`training.record_teacher`). Prints the time to record, the bytes on disk of all logits and of the largest ones,
and the time of an epoch from each, against one with the teacher in the step. Recording runs the teacher once for each view, so
it pays where there are more epochs than views, and the more, the smaller the student is beside its teacher.
"""

import dataclasses
import functools
import json
import pathlib
import statistics
import tempfile
import time
from typing import Any

import jax
import numpy as np
import optax

from experiments import runs, settings
from experiments.architectures import ARCHITECTURES, network
from experiments.benchmarks.turns import in_turns, ratio
from experiments.settings import Count
from kdjax import data, networks, objectives, training
from kdjax.batches import take_examples


@dataclasses.dataclass(frozen=True)
class Config:
    """The pair and the sizes to measure."""

    teacher: str = 'resnet20'
    """The teacher's architecture, a name of `experiments.architectures`."""
    student: str = 'resnet8'
    """The student's."""
    examples: Count = 1024
    """Random images."""
    batch_size: Count = 128
    """Examples a step."""
    classes: Count = 100
    """Number of classes."""
    views: Count = 2
    """Augmented views of each image."""
    top_k: Count = 10
    """How many of the largest logits to keep."""
    repeats: Count = 5
    """Timed epochs of each kind, in turns, after one that is not timed."""


def main(config: Config) -> None:
    """Measures and prints."""
    settings.check_ranges(config)
    device = jax.devices()[0].device_kind
    print(f'{config.teacher} -> {config.student}, {config.examples} images, {config.views} views, {device}')
    random = np.random.default_rng(0)
    images = {
        'inputs': random.integers(0, 256, (config.examples, 32, 32, 3), np.uint8),
        'labels': random.integers(0, config.classes, config.examples, np.int32),
    }
    teacher, student = (
        networks.preprocess(network(ARCHITECTURES[name], config.classes), data.augment.normalize(0.5, 0.25))
        for name in (config.teacher, config.student)
    )
    variables = jax.jit(teacher.init)(jax.random.key(0), images['inputs'][:1])
    views = training.Views(data.augment.random_crop(padding=4), jax.random.key(1), config.views)
    optimizer, hard = optax.sgd(0.1, momentum=0.9), 0.1 * objectives.hard_labels()
    soft = hard + 0.9 * objectives.soft_targets()
    problems = {
        'teacher': training.distillation(student, teacher, soft, optimizer),
        'recorded': training.distillation(student, None, objectives.from_recorded_logits(soft), optimizer),
        'top_k': training.distillation(student, None, hard + 0.9 * objectives.top_k_soft_targets(), optimizer),
    }
    with tempfile.TemporaryDirectory() as folder:
        record = functools.partial(
            training.record_teacher, teacher, variables, images, batch_size=config.batch_size, views=views
        )
        started = time.perf_counter()
        recordings: dict[str, dict[str, Any]] = {'teacher': {}, 'recorded': record(folder=f'{folder}/recorded')}
        seconds = time.perf_counter() - started
        recordings['top_k'] = record(folder=f'{folder}/top_k', top_k=config.top_k)
        disk = {
            name: sum(file.stat().st_size for file in pathlib.Path(folder, name).iterdir()) for name in ('recorded', 'top_k')
        }
        epochs = {
            name: _epochs(problem, config.batch_size, views, {**images, **recordings[name]}, variables)
            for name, problem in problems.items()
        }
        times = in_turns(epochs, config.repeats)
    print(f'recorded in {seconds:.1f} s with compilation; on disk {disk["recorded"]} bytes, the largest {disk["top_k"]}')
    ratios = {name: ratio(times[name], times['teacher']) for name in ('recorded', 'top_k')}
    for name, taken in times.items():
        print(f'{name:8} {statistics.median(taken):9.1f} ms an epoch, ratio {ratios.get(name, 1.0):.3f}')
    summary = {
        'name': 'recorded_teacher',
        'ratio': ratios['recorded'],
        'ours_ms': statistics.median(times['recorded']),
        'theirs_ms': statistics.median(times['teacher']),
        'top_k_ratio': ratios['top_k'],
        'record_s': seconds,
        'bytes': disk['recorded'],
        'top_k_bytes': disk['top_k'],
    }
    print(json.dumps({**summary, **dataclasses.asdict(config), 'device': device, 'jax': jax.__version__}))


def _epochs(problem: training.Problem, batch_size: int, views: training.Views, examples: dict[str, Any], variables: Any) -> Any:
    """A function that runs one epoch more each time that it is called."""
    examples = jax.device_put({name: np.asarray(array) for name, array in examples.items()})
    batch = training.one_view(take_examples(examples, slice(0, batch_size)), 0)
    state = jax.jit(problem.init)(jax.random.key(2), batch)
    run = training.in_memory_epoch(problem, batch_size=batch_size, views=views)

    def one_epoch() -> Any:
        nonlocal state
        state, metrics = run(state, variables, examples)
        return metrics

    return one_epoch


if __name__ == '__main__':
    runs.command_line(Config, main)
