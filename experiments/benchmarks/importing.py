"""How long `import kdjax` takes beside what it stands on.

    python -m experiments.benchmarks.importing

Starts fresh interpreters in turns that import jax, flax and optax, or kdjax after them, or also the packages of kdjax that a
training script uses. Medians.
"""

import dataclasses
import json
import statistics
import subprocess
import sys

from experiments import runs, settings
from experiments.settings import Count

_BASE = 'import jax, flax, optax'
_SCRIPTS = {
    'jax, flax, optax': _BASE,
    'kdjax': f'{_BASE}, kdjax',
    'losses': f'{_BASE}; from kdjax import losses',
    'a training script': f'{_BASE}; from kdjax import losses, models, networks, objectives, pruning, quantization, training',
}
_TIMED = 'import time; started = time.perf_counter(); {}; print(time.perf_counter() - started)'


@dataclasses.dataclass(frozen=True)
class Config:
    """How often to measure."""

    repeats: Count = 7
    """Interpreters of each kind."""


def main(config: Config) -> None:
    """Measures and prints."""
    settings.check_ranges(config)
    times: dict[str, list[float]] = {name: [] for name in _SCRIPTS}
    # The first turn reads the files from the disk and is not counted.
    for turn in range(config.repeats + 1):
        for name, script in _SCRIPTS.items():
            command = [sys.executable, '-c', _TIMED.format(script)]
            seconds = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            if turn:
                times[name].append(1e3 * seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    base = medians['jax, flax, optax']
    for name, value in medians.items():
        print(f'{name:20} {value:7.0f} ms, {value / base:.2f}')
    summary = {
        'name': 'importing',
        'ratio': round(medians['kdjax'] / base, 3),
        'ours_ms': round(medians['kdjax'], 1),
        'theirs_ms': round(base, 1),
        'losses': round(medians['losses'] / base, 3),
        'training_script': round(medians['a training script'] / base, 3),
        'device': 'cpu',
    }
    print(json.dumps(summary))


if __name__ == '__main__':
    runs.command_line(Config, main)
