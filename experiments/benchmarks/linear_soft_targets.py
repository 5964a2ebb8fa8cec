"""Memory and time of distilling over a large vocabulary, with and without the logits of all tokens in memory.

    python -m experiments.benchmarks.linear_soft_targets

Compares `losses.linear_soft_targets` with `losses.soft_targets` of the two products, both under jit: the loss alone, and with
the gradients of the student's hidden states and kernel. Memory is what XLA's plan needs besides arguments and results. Times
are taken in turns, so that what else the machine does falls on both, and the median is reported.
"""

import dataclasses
import functools
import json
from collections.abc import Callable

import jax
import jax.numpy as jnp

from experiments import runs, settings
from experiments.benchmarks import turns
from experiments.settings import Count
from kdjax import losses

Arrays = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes to measure."""

    tokens: Count = 2048
    """Number of tokens of a batch."""
    width: Count = 512
    """Width of the hidden states of both networks."""
    vocabulary: Count = 131072
    """Number of classes."""
    chunk: Count = 256
    """Tokens that `linear_soft_targets` takes at a time."""
    repeats: Count = 3
    """Timed calls of each, in turns, after one that is not timed."""


def main(config: Config) -> None:
    """Measures and prints."""
    settings.check_ranges(config)
    arrays = _arrays(config)

    def ours(student: jax.Array, student_kernel: jax.Array, teacher: jax.Array, teacher_kernel: jax.Array) -> jax.Array:
        return losses.linear_soft_targets(student, student_kernel, teacher, teacher_kernel, chunk=config.chunk).mean()

    def theirs(student: jax.Array, student_kernel: jax.Array, teacher: jax.Array, teacher_kernel: jax.Array) -> jax.Array:
        return losses.soft_targets(student @ student_kernel, teacher @ teacher_kernel).mean()

    device = jax.devices()[0].device_kind
    print(f'{config.tokens} tokens, width {config.width}, vocabulary {config.vocabulary}, float32, {device}')
    forward = _compare('loss alone', ours, theirs, arrays, config.repeats)
    both = _compare(
        'loss and gradients', *(jax.value_and_grad(f, argnums=(0, 1)) for f in (ours, theirs)), arrays, config.repeats
    )
    summary = {
        'name': 'linear_soft_targets',
        **both,
        **{f'forward_{key}': value for key, value in forward.items()},
        **dataclasses.asdict(config),
        'device': device,
        'jax': jax.__version__,
    }
    print(json.dumps(summary))


def _arrays(config: Config) -> Arrays:
    """Random hidden states of norm √width and kernels of unit columns, for student and teacher."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(config.tokens, config.width), (config.width, config.vocabulary)] * 2
    scales = [1.0, config.width**-0.5] * 2
    return tuple(scale * jax.random.normal(key, shape) for key, shape, scale in zip(keys, shapes, scales, strict=True))


def _compare(
    title: str, ours: Callable[..., object], theirs: Callable[..., object], arrays: Arrays, repeats: int
) -> dict[str, float]:
    """Prints and returns both times in milliseconds, both memories in MB, and their ratios."""
    programs = [jax.jit(function).lower(*arrays).compile() for function in (ours, theirs)]
    memory = [program.memory_analysis().temp_size_in_bytes / 1e6 for program in programs]
    results = [jax.block_until_ready(program(*arrays)) for program in programs]
    values = [float(jnp.asarray(jax.tree.leaves(result)[0])) for result in results]
    del results  # gigabytes
    measured = turns.compare(*(functools.partial(program, *arrays) for program in programs), repeats)
    for name, value, size in zip(('ours', 'theirs'), values, memory, strict=True):
        print(f'{title:20} {name:7} value {value:.6f} {size:9.1f} MB {measured[f"{name}_ms"]:9.1f} ms')
    return {**measured, 'memory_ratio': memory[0] / memory[1], 'ours_mb': memory[0], 'theirs_mb': memory[1]}


if __name__ == '__main__':
    runs.command_line(Config, main)
