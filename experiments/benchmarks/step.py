"""One distillation step against PyTorch: the same networks, batch, loss and optimizer, in turns.

    pip install torch
    python -m experiments.benchmarks.step
    python -m experiments.benchmarks.step --pairs cnn resnet20 --compile --half

Teacher forward, student forward and backward, soft targets at temperature 4 and labels, SGD with momentum, float32 images of
32x32 and 100 classes. PyTorch runs with channels_last, eager or compiled. On CPUs the steps run on the threads that both take
by themselves, and kdjax builds its networks with `models.cpu_convolution`; elsewhere with XLA's own convolutions.
`GLIBC_TUNABLES=glibc.malloc.hugetlb=1` before the command gives both large pages on Linux.
"""

import dataclasses
import json
import statistics
import time
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import runs, settings
from experiments.benchmarks.turns import in_turns, ratio
from experiments.settings import Count
from kdjax import models, networks, objectives, training

_NARROW, _WIDE = (16, 16, 32, 64), (32, 64, 128, 256)

# Teacher and student: depth and widths of a ResNet, or channels and hidden widths of a CNN.
PAIRS = {
    'cnn': (((64, 128), (512,)), ((32, 64), (256,))),
    'resnet20': ((20, _NARROW), (8, _NARROW)),
    'resnet56': ((56, _NARROW), (20, _NARROW)),
    'resnet32x4': ((32, _WIDE), (8, _WIDE)),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to compare."""

    pairs: tuple[Literal[tuple(PAIRS)], ...] = tuple(PAIRS)
    """Teachers; their students are those of the distillation tables."""
    batch_size: Count = 128
    """Examples a step."""
    repeats: Count = 9
    """Timed steps of each, in turns."""
    half: bool = False
    """Whether to compute in bfloat16."""
    compile: bool = False
    """Whether to compare with torch.compile too."""


def main(config: Config) -> None:
    """Measures and prints."""
    settings.check_ranges(config)
    try:
        import torch  # only this comparison needs it
    except ImportError:
        raise ValueError('this benchmark compares with PyTorch, which is not installed: pip install torch') from None

    rng = np.random.default_rng(0)
    images = rng.standard_normal((config.batch_size, 32, 32, 3), np.float32)
    labels = rng.integers(0, 100, config.batch_size)
    device = jax.devices()[0].device_kind
    arithmetic = 'bfloat16' if config.half else 'float32'
    print(f'batch {config.batch_size}, {arithmetic}, {device}, jax {jax.__version__}, torch {torch.__version__}')
    print('milliseconds, median: kdjax, torch eager, torch compiled; ratios of kdjax to each, turn by turn')
    rows = [_compare(pair, config, images, labels) for pair in config.pairs]
    worst = max(rows, key=lambda row: row['ratio'])
    print(json.dumps({'name': 'step', **worst, 'pairs': rows, 'device': device}))


def _compare(pair: str, config: Config, images: np.ndarray, labels: np.ndarray) -> dict[str, object]:
    import torch

    from experiments.benchmarks import torch_pairs

    def theirs(compiled: bool) -> torch_pairs.Step:
        teacher, student = ((torch_pairs.CNN if pair == 'cnn' else torch_pairs.ResNet)(*sizes, 100) for sizes in PAIRS[pair])
        nchw = torch.from_numpy(images).permute(0, 3, 1, 2)
        return torch_pairs.Step(student, teacher, nchw, torch.from_numpy(labels), half=config.half, compiled=compiled)

    ours, compile_s, flops = _ours(pair, config, images, labels)
    contestants = {'kdjax': ours, 'eager': theirs(False)}
    if config.compile:
        contestants['compiled'] = theirs(True)
    times = in_turns(contestants, config.repeats)
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = {name: ratio(times['kdjax'], times[name]) for name in times if name != 'kdjax'}
    print(
        f'{pair:12}',
        *(f'{value:8.1f}' for value in medians.values()),
        *(f'{value:6.2f}' for value in ratios.values()),
        f'  {flops / medians["kdjax"] / 1e6:.0f} GFLOP/s, compiled in {compile_s:.1f} s',
    )
    return {
        'pair': pair,
        'ratio': round(ratios['eager'], 3),
        'ours_ms': round(medians['kdjax'], 2),
        'theirs_ms': round(medians['eager'], 2),
        **({'ratio_to_compiled': round(ratios['compiled'], 3)} if config.compile else {}),
        'gflops_per_s': round(flops / medians['kdjax'] / 1e6, 1),
        'compile_s': round(compile_s, 2),
    }


def _ours(pair: str, config: Config, images: np.ndarray, labels: np.ndarray) -> tuple[object, float, float]:
    """The step as a function without arguments, the seconds it took to compile, and its floating-point operations."""
    teacher, student = (_network(pair, sizes, config.half) for sizes in PAIRS[pair])
    objective = 0.1 * objectives.hard_labels() + 0.9 * objectives.soft_targets(temperature=4.0)
    problem = training.distillation(student, teacher, objective, optax.sgd(0.05, momentum=0.9))
    batch = {'inputs': jnp.asarray(images), 'labels': jnp.asarray(labels, jnp.int32)}
    teacher_variables = jax.jit(teacher.init)(jax.random.key(1), batch['inputs'])
    state = problem.init(jax.random.key(0), batch)
    started = time.perf_counter()
    compiled = problem.step.lower(state, teacher_variables, batch).compile()
    compile_s = time.perf_counter() - started

    def step() -> jax.Array:
        nonlocal state
        state, metrics = compiled(state, teacher_variables, batch)
        return state.params, metrics

    return step, compile_s, _flops(pair, batch, config)


def _flops(pair: str, batch: dict[str, jax.Array], config: Config) -> float:
    """Of products as they are defined, however they are computed: the teacher's forward pass and three times the student's."""
    total = 0.0
    for times, sizes in zip((1, 3), PAIRS[pair], strict=True):
        network = networks.from_linen(_module(pair, sizes, jax.lax.conv_general_dilated))
        variables = jax.eval_shape(network.init, jax.random.key(0), batch['inputs'])
        lowered = jax.jit(lambda v, x, network=network: network.apply(v, x)[0].logits).lower(variables, batch['inputs'])
        total += times * lowered.cost_analysis()['flops']
    return total


def _network(pair: str, sizes: tuple, half: bool) -> networks.Network:
    wide = jax.default_backend() == 'cpu' and not half
    made = networks.from_linen(_module(pair, sizes, models.cpu_convolution if wide else jax.lax.conv_general_dilated))
    return networks.mixed_precision(made) if half else made


def _module(pair: str, sizes: tuple, convolution: models.Convolution) -> nn.Module:
    if pair == 'cnn':
        return models.CNN(*sizes, classes=100, convolution=convolution)
    depth, widths = sizes
    return models.ResNet(depth, 100, widths, convolution)


if __name__ == '__main__':
    runs.command_line(Config, main)
