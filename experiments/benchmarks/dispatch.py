"""What it costs to start a step: an epoch of an MLP pair on data on the device, one step or many at a time.

    python -m experiments.benchmarks.dispatch

An epoch of n steps in one dispatch takes c + n · s: s is the step itself, from two lengths of scan, and c the start. What
starting adds to a step, (time per step - s) / s, is reported for one step, eight, and all steps of an epoch at a time. Times
are taken in turns; medians.
"""

import dataclasses
import json
import statistics

import jax
import numpy as np
import optax

from experiments import runs, settings
from experiments.benchmarks.turns import in_turns
from experiments.settings import Count
from kdjax import models, networks, objectives, training
from kdjax.batches import take_examples


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes to measure."""

    batch_size: Count = 128
    """Examples a step."""
    steps: Count = 64
    """Steps of an epoch, a multiple of 8."""
    repeats: Count = 15
    """Timed epochs of each, in turns."""


def main(config: Config) -> None:
    """Measures and prints."""
    settings.check_ranges(config)
    if config.steps % 8:
        raise ValueError(f'--steps must be a multiple of 8, got {config.steps}')
    teacher, student = (networks.from_linen(models.MLP(hidden, 10)) for hidden in ((1200, 1200), (800, 800)))
    objective = 0.1 * objectives.hard_labels() + 0.9 * objectives.soft_targets()
    problem = training.distillation(student, teacher, objective, optax.sgd(0.05, momentum=0.9))
    rng = np.random.default_rng(0)
    long = {
        'inputs': jax.device_put(rng.standard_normal((config.steps * config.batch_size, 784), np.float32)),
        'labels': jax.device_put(rng.integers(0, 10, config.steps * config.batch_size, np.int32)),
    }
    short = take_examples(long, slice(0, config.steps // 8 * config.batch_size))
    teacher_variables = teacher.init(jax.random.key(1), long['inputs'][:1])

    def epoch(data: dict[str, jax.Array], at_once: int) -> object:
        run = training.in_memory_epoch(problem, batch_size=config.batch_size, steps_per_dispatch=at_once)
        state = problem.init(jax.random.key(0), take_examples(data, slice(0, config.batch_size)))

        def call() -> object:
            nonlocal state
            state, metrics = run(state, teacher_variables, data)
            return state.params, metrics

        return call

    names = {'one at a time': 1, 'eight at a time': 8, 'all at once': config.steps}
    times = in_turns({'short': epoch(short, config.steps), **{k: epoch(long, n) for k, n in names.items()}}, config.repeats)
    medians = {name: statistics.median(values) for name, values in times.items()}
    step = (medians['all at once'] - medians['short']) / (config.steps * 7 / 8)
    costs = {name: medians[name] / config.steps / step - 1 for name in names}
    device = jax.devices()[0].device_kind
    print(f'MLP 1200-1200 to 800-800, batch {config.batch_size}, {config.steps} steps, {device}: {step:.3f} ms a step')
    for name, cost in costs.items():
        print(f'{name:16} {medians[name] / config.steps:8.3f} ms a step, starting adds {100 * cost:.1f} %')
    summary = {
        'name': 'dispatch',
        'ratio': round(costs['all at once'], 4),
        'ours_ms': round(medians['all at once'] / config.steps, 4),
        'theirs_ms': round(step, 4),
        'one_at_a_time': round(costs['one at a time'], 4),
        'eight_at_a_time': round(costs['eight at a time'], 4),
        'device': device,
    }
    print(json.dumps(summary))


if __name__ == '__main__':
    runs.command_line(Config, main)
