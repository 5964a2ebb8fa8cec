"""Temporary memory and time of a step of distilling a language model: logits of all tokens against `networks.linear_head`.

    python -m experiments.benchmarks.language
    python -m experiments.benchmarks.language --tokens 1024 --chunk 64

One network teaches another that begins elsewhere, by cross-entropy with the labels, forward and reverse divergence,
Jensen-Shannon, and all four at once, over small and large vocabularies; SGD. Both are an embedding, a block and a head: what is
small here beside the head is not in a real model, so its ratios lie nearer to 1. Memory is what XLA's plan of the step needs
beside arguments and results. Times are taken in turns, so that what else the machine does falls on both, and the median is
reported; ratios are ours over theirs. The last line's ratio is the worst of the times', its memory ratio the worst of those.
"""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from experiments import runs, settings
from experiments.benchmarks import turns
from experiments.settings import Count
from kdjax import networks, objectives, training


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes to measure."""

    vocabularies: tuple[Count, ...] = (32_768, 131_072)
    """Numbers of classes."""
    tokens: Count = 256
    """Number of tokens of a batch."""
    width: Count = 128
    """Width of the hidden states of both networks."""
    chunk: Count = 32
    """Tokens that `linear_head` takes at a time."""
    half: bool = False
    """Compute both networks in bfloat16."""
    repeats: Count = 1
    """Timed steps of each, in turns, after one that is not timed."""


TERMS = {
    'cross-entropy': objectives.hard_labels(),
    'forward KL': objectives.soft_targets(temperature=1.0),
    'reverse KL': objectives.reverse_kl(),
    'Jensen-Shannon': objectives.jensen_shannon(),
}
MEASURED = {**TERMS, 'all four': objectives.combine(**{name.replace(' ', '_'): term for name, term in TERMS.items()})}


class Language(nn.Module):
    """An embedding, a block and a head."""

    vocabulary: int
    width: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens [batch, length] to logits [batch, length, vocabulary]."""
        x = nn.Embed(self.vocabulary, self.width, name='embed')(tokens)
        x = x + nn.Dense(self.width, name='reduce')(nn.gelu(nn.Dense(4 * self.width, name='expand')(x)))
        return nn.Dense(self.vocabulary, use_bias=False, name='head')(nn.RMSNorm(name='norm')(x))


def main(config: Config) -> None:
    """Measures and prints."""
    settings.check_ranges(config)
    device = jax.devices()[0].device_kind
    kind = 'bfloat16' if config.half else 'float32'
    print(f'{config.tokens} tokens, width {config.width}, chunks of {config.chunk}, {kind}, {device}')
    rows = [measure(config, vocabulary, name) for vocabulary in config.vocabularies for name in MEASURED]
    summary = {
        'name': 'language',
        **max(rows, key=lambda row: row['ratio']),
        'memory_ratio': max(row['memory_ratio'] for row in rows),
        'rows': rows,
        'device': device,
        'jax': jax.__version__,
    }
    print(json.dumps(summary))


def measure(config: Config, vocabulary: int, name: str) -> dict[str, Any]:
    """Prints and returns times in milliseconds, memories in MB, and their ratios."""
    dense = networks.from_linen(Language(vocabulary, config.width), features='norm')
    linear = networks.linear_head(dense, 'norm', 'head/kernel', chunk=config.chunk)
    steps, memory = {}, {}
    for side, network in (('ours', linear), ('theirs', dense)):
        network = networks.mixed_precision(network) if config.half else network
        steps[side], memory[f'{side}_mb'] = compiled(config, network, vocabulary, MEASURED[name])
    measured = turns.compare(steps['ours'], steps['theirs'], config.repeats)
    memory_ratio = memory['ours_mb'] / memory['theirs_mb']
    sides = ', '.join(f'{side} {memory[f"{side}_mb"]:8.1f} MB {measured[f"{side}_ms"]:8.0f} ms' for side in steps)
    print(f'{vocabulary:7} {name:15} {sides}: memory {memory_ratio:.3f}, time {measured["ratio"]:.2f}', flush=True)
    return {'vocabulary': vocabulary, 'objective': name, **measured, 'memory_ratio': memory_ratio, **memory}


def compiled(
    config: Config, network: networks.Network, vocabulary: int, objective: objectives.Objective
) -> tuple[Callable[[], Any], float]:
    """A function that takes one step from where the last one ended, and the temporary memory of its program in MB."""
    problem = training.distillation(network, network, objective, optax.sgd(1e-3))
    tokens = jax.random.randint(jax.random.key(0), (1, config.tokens + 1), 0, vocabulary)
    batch = {'inputs': tokens[:, :-1], 'labels': tokens[:, 1:]}
    teacher_variables = jax.jit(network.init)(jax.random.key(1), batch['inputs'])
    # In place of the initial draw, which takes as long as the step: the teacher's parameters, a little off.
    student_variables = jax.tree.map(lambda x: x * jnp.asarray(1.1, x.dtype), teacher_variables)
    state = problem.init(jax.random.key(2), batch, student_variables=student_variables)
    program = jax.jit(problem.step, donate_argnums=0).lower(state, teacher_variables, batch).compile()

    def step() -> Any:
        nonlocal state
        state, metrics = program(state, teacher_variables, batch)
        return metrics

    return step, program.memory_analysis().temp_size_in_bytes / 1e6


if __name__ == '__main__':
    runs.command_line(Config, main)
