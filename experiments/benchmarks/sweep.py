"""Time of eight students in one program, against eight runs one after the other.

    python -m experiments.benchmarks.sweep

`training.sweep` vmaps the step over temperatures, weights and seeds, and runs the teacher once for all. Measured is a step of
the sweep against a step of each student alone, compiled once, with its temperature and weight as arguments. A sweep saves
seven of eight forward passes of the teacher, and keeps a large device busy with small students. Against that, a convolution
with a kernel for each student becomes a grouped one, which XLA runs slowly on CPUs; `models.im2col_convolution` makes it a
batched product. Expect ratios well below 1 where the teacher is much larger than the students, the more so with im2col, about 1
for dense students that fill the device by themselves, and above 1 for wide ordinary convolutions on a CPU.
"""

import dataclasses
import json
import statistics
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import runs, settings
from experiments.benchmarks.turns import in_turns, ratio
from experiments.settings import Count
from kdjax import models, networks, objectives, training


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes to measure."""

    batch_size: Count = 128
    """Examples a step."""
    image: Count = 32
    """Height and width of the images."""
    shrink: Count = 1
    """Divides every width of every network: larger numbers are for a quick look."""
    cases: tuple[str, ...] = (
        'mlp',
        'mlp, large teacher',
        'cnn',
        'cnn, im2col',
        'cnn, large teacher',
        'cnn, large teacher, im2col',
    )
    """Pairs to measure."""
    repeats: Count = 5
    """Timed steps of each kind, in turns, after one that is not timed."""


ROWS = {
    'temperature': jnp.array([1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 8.0, 8.0]),
    'weight': jnp.array([0.5, 0.9, 0.5, 0.9, 0.5, 0.9, 0.9, 0.9]),
}
STUDENTS = 8


class Convolutional(nn.Module):
    """`models.CNN` with a choice of how convolutions are computed."""

    channels: tuple[int, ...]
    hidden: int
    convolution: models.Convolution = jax.lax.conv_general_dilated

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images to logits."""
        for channels in self.channels:
            x = nn.relu(nn.Conv(channels, (3, 3), conv_general_dilated=self.convolution)(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(self.hidden)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(x)


def pairs(shrink: int) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Teachers and students by the name of the case."""

    def cnn(channels: tuple[int, ...], hidden: int, **more: Any) -> nn.Module:
        return Convolutional(tuple(max(1, width // shrink) for width in channels), max(1, hidden // shrink), **more)

    def mlp(width: int) -> nn.Module:
        return models.MLP((max(1, width // shrink),) * 2)

    im2col = {'convolution': models.im2col_convolution}
    return {
        'mlp': (mlp(1200), mlp(800)),
        'mlp, large teacher': (mlp(1200), mlp(80)),
        'cnn': (cnn((64, 128), 512), cnn((32, 64), 256)),
        'cnn, im2col': (cnn((64, 128), 512), cnn((32, 64), 256, **im2col)),
        'cnn, large teacher': (cnn((64, 128), 512), cnn((8, 16), 32)),
        'cnn, large teacher, im2col': (cnn((64, 128), 512), cnn((8, 16), 32, **im2col)),
    }


def main(config: Config) -> None:
    """Measures and prints."""
    settings.check_ranges(config)
    unknown = [case for case in config.cases if case not in pairs(1)]
    if unknown:
        raise ValueError(f'there is no case {unknown[0]!r}; there are: {"; ".join(pairs(1))}')
    device, random = jax.devices()[0].device_kind, np.random.default_rng(0)
    batch = {
        'inputs': jnp.asarray(random.normal(size=(config.batch_size, config.image, config.image, 3)), jnp.float32),
        'labels': jnp.asarray(random.integers(0, 10, config.batch_size), jnp.int32),
    }
    print(f'{STUDENTS} students, batches of {config.batch_size}, {device}')
    summary: dict[str, Any] = {'name': 'sweep', 'ratio': {}, 'ours_ms': {}, 'theirs_ms': {}}
    for name, (teacher, student) in ((case, pairs(config.shrink)[case]) for case in config.cases):
        times = in_turns(_steps(networks.from_linen(teacher), networks.from_linen(student), batch), config.repeats)
        summary['ratio'][name] = ratio(times['sweep'], times['alone'])
        summary['ours_ms'][name], summary['theirs_ms'][name] = (statistics.median(each) for each in times.values())
        print(
            f'{name:28} sweep {summary["ours_ms"][name]:9.1f} ms, alone {summary["theirs_ms"][name]:9.1f} ms, '
            f'ratio {summary["ratio"][name]:.3f}'
        )
    print(json.dumps({**summary, **dataclasses.asdict(config), 'device': device, 'jax': jax.__version__}))


def _steps(teacher: networks.Network, student: networks.Network, batch: Any) -> dict[str, Callable[[], Any]]:
    """Functions that take one step more of all students each time that they are called."""

    def make(row: dict[str, jax.Array]) -> training.Problem:
        soft, weight = objectives.soft_targets(temperature=row['temperature']), row['weight']
        objective = (1 - weight) * objectives.hard_labels() + weight * soft
        return training.distillation(student, teacher, objective, optax.sgd(0.01, momentum=0.9))

    variables = jax.jit(teacher.init)(jax.random.key(0), batch['inputs'])
    students = training.sweep(make, ROWS)
    state = jax.jit(students.init)(jax.random.key(1), batch)
    rows = [jax.tree.map(lambda x, i=i: x[i], ROWS) for i in range(STUDENTS)]
    begin = jax.jit(lambda row, key: make(row).init(key, batch))
    states = [begin(row, jax.random.key(i)) for i, row in enumerate(rows)]
    step = jax.jit(lambda row, state, variables, batch: make(row).step(state, variables, batch), donate_argnums=1)

    def sweep() -> Any:
        nonlocal state
        state, metrics = students.step(state, variables, batch)
        return metrics

    def alone() -> Any:
        measured = []
        for i, row in enumerate(rows):
            states[i], metrics = step(row, states[i], variables, batch)
            measured.append(metrics)
        return measured

    return {'sweep': sweep, 'alone': alone}


if __name__ == '__main__':
    runs.command_line(Config, main)
