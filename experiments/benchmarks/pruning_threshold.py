"""Time and memory of the global threshold of pruning, against a sort of the same scores.

    python -m experiments.benchmarks.pruning_threshold

Compares `pruning.global_masks` with `jnp.sort`, both under jit and in one process. The masks also rank ties, exactly; the
sort is taken alone, without the masks that would follow. Memory is what XLA's plan needs besides arguments and results. Times
are taken in turns, so that what else the machine does falls on both, and the median of the ratios is reported. Expect less
than 0.5 on a CPU.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp

from experiments import runs, settings
from experiments.benchmarks import turns
from experiments.settings import Count
from kdjax import pruning


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes to measure."""

    rows: Count = 5000
    """Rows of the array of weights."""
    columns: Count = 5000
    """Columns of the array of weights."""
    repeats: Count = 5
    """Timed calls of each, in turns, after one that is not timed."""


SPARSITY = 0.5


def main(config: Config) -> None:
    """Measures and prints."""
    settings.check_ranges(config)
    weights = {
        'normal': jax.random.normal(jax.random.key(0), (config.rows, config.columns)),
        'ties': jnp.round(4.0 * jax.random.normal(jax.random.key(1), (config.rows, config.columns))),
    }
    size, device = config.rows * config.columns, jax.devices()[0].device_kind
    print(f'{size} weights, float32, {device}')

    def ours(weights: jax.Array) -> jax.Array:
        return pruning.global_masks(pruning.magnitude({'kernel': weights}), SPARSITY)['kernel']

    def sort(weights: jax.Array) -> jax.Array:
        return jnp.sort(jnp.abs(weights).ravel())

    programs = [jax.jit(function).lower(weights['normal']).compile() for function in (ours, sort)]
    memory = [program.memory_analysis().temp_size_in_bytes / 1e6 for program in programs]
    rows = []
    for name, array in weights.items():
        pruned = size - int(jnp.sum(programs[0](array)))
        if pruned != round(SPARSITY * size):
            raise RuntimeError(f'{pruned} of {size} weights were pruned, not {round(SPARSITY * size)}')
        calls = (functools.partial(program, array) for program in programs)
        rows.append({'weights': name, **turns.compare(*calls, config.repeats)})
        print('{weights:8} masks {ours_ms:9.1f} ms, sort {theirs_ms:9.1f} ms, ratio {ratio:.3f}'.format(**rows[-1]))
    summary = {'name': 'pruning_threshold', **rows[0], 'cases': rows, 'ours_mb': memory[0], 'theirs_mb': memory[1]}
    print(json.dumps({**summary, **dataclasses.asdict(config), 'device': device, 'jax': jax.__version__}))


if __name__ == '__main__':
    runs.command_line(Config, main)
