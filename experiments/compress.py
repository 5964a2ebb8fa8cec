r"""Distil, prune and quantize a student, in both orders, each with and without distillation.

    python -m experiments.compress
    python -m experiments.compress --dataset fashion_mnist --seeds 3 --epochs 6 --examples 6000 --batch-size 128 \
        --output runs/compress_fashion

A student learns from labels alone, or from 0.1 · labels + 0.9 · soft targets (T = 4) of a teacher of four times its size; all
that is trained afterwards learns in the same way. It is pruned (80 % of the weights of all kernels together; 2 of every 4
inputs; half of the channels, which are removed), quantized (weights and activations to int8, with the ranges of activations
dynamic, static, or moving averages in quantization-aware training), and both, in both orders (experiments/compression.py says
what the order means). Every stage takes half the epochs of the student, so both orders of quantization-aware training take as
many steps. What is measured was loaded from the folders to ship. The test split is read once, at the end.

References:
  Zhu, Gupta. To prune, or not to prune: exploring the efficacy of pruning for model compression. 2017.
  https://arxiv.org/abs/1710.01878
  Mishra et al. Accelerating Sparse Deep Neural Networks. 2021. https://arxiv.org/abs/2104.08378
  Fang, Ma, Song, Mi, Wang. DepGraph: Towards Any Structural Pruning. 2023. https://arxiv.org/abs/2301.12900
  Jacob et al. Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference. 2018.
  https://arxiv.org/abs/1712.05877
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax

from experiments import compression, figures, reporting, runs, scenarios, settings, shipping
from experiments.settings import Count
from kdjax import data, export, metrics, models, networks, objectives, training
from kdjax.batches import Batch

TEACHER = models.CNN((64, 128), (512,), dropout=0.3)
STUDENT = models.CNN((32, 64), (256,))
LEARNING_RATE = 2e-3
CALIBRATION_BATCHES = 4
BATCH_SIZES = (1, 128)
ALONE, DISTILLED = 'without distillation', 'distilled'


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of a run."""

    data: settings.Data = settings.Data()
    training: settings.Training = settings.Training()
    epochs: Count = 20
    """Epochs of teacher and student; every stage after these takes half as many."""
    output: settings.Folder = 'runs/compress'
    """Folder for the report, the logs, the checkpoints and the networks. The same command resumes there."""


def main(config: Config) -> None:
    """Trains, compresses, measures and reports."""
    runs.run(experiment, config)


def experiment(config: Config) -> runs.Experiment:
    """What is trained and compressed, and in which order."""
    dataset = settings.load(settings.with_flags(config.data, examples=None))
    train = settings.part_in_order(dataset.train, config.data.examples)
    training.steps_per_epoch(train, config.training.batch_size)  # complains where there is not one batch
    problems, make = prepare(config, train, dataset.classes)

    def rows(run: runs.Run) -> list[reporting.Row]:
        for seed in range(config.training.seeds):
            make(run, seed)
        return measure(run.output, config.training.seeds, dataset.test)

    return runs.Experiment(
        title=f'Distil, prune, quantize: {dataset.name}',
        dataset=dataset,
        problems=[(train, problems)],
        rows=rows,
        notes=lambda rows: f'{conclusion(rows)}\n\n{NOTES}',
        report={'batch_sizes': BATCH_SIZES, 'table': table, 'draw': draw},
    )


NOTES = (
    "Bytes are those of the weights; a folder also holds the program, its loader and a manifest. 'Of teacher' and 'of student' "
    'are these over those of the teacher and of the distilled student in floating point. Bytes and latency are those of '
    'distilled networks, of the largest and the first of all seeds; networks of one program share the latency. Where "dynamic" '
    'or "static" comes first, pruning takes integers away at once and no training follows. Quantized networks multiply int8 '
    'and sum int32; XLA does not promise that this is faster on CPUs, nor that zeros are.'
)


def prepare(config: Config, train: Batch, classes: int) -> tuple[list[training.Problem], Callable[[runs.Run, int], None]]:
    """What is trained, and the function that trains the networks of one seed and ships them."""
    batch_size = config.training.batch_size
    batches = [train['inputs'][i : i + batch_size] for i in range(0, len(train['inputs']) - batch_size + 1, batch_size)]
    batches = batches[:CALIBRATION_BATCHES]
    rescale = data.normalize(0.0, 1.0)
    teacher = compression.network_of(TEACHER.clone(classes=classes), rescale)
    module = STUDENT.clone(classes=classes)
    student = compression.network_of(module, rescale)
    ways = compression.ways_to_prune(module, rescale, batches[0])
    steps = training.steps_per_epoch(train, batch_size)
    stages = compression.stages(student, ways, learning_rate=LEARNING_RATE, epochs=config.epochs, steps=steps)

    def problems(taught_by: networks.Network | None, objective: objectives.Objective) -> dict[str, training.Problem]:
        return {
            name: settings.distillation(config.training, stage.network, taught_by, objective, stage.optimizer)
            for name, stage in stages.items()
        }

    labels = objectives.hard_labels()
    both = 0.1 * labels + 0.9 * objectives.soft_targets(temperature=4.0)
    adam = optax.adam(scenarios.falling(LEARNING_RATE, config.epochs, train, batch_size))
    teaching = settings.distillation(config.training, teacher, None, labels, adam)
    learning = {ALONE: problems(None, labels), DISTILLED: problems(teacher, both)}

    def make(run: runs.Run, seed: int) -> None:
        if _folder(run.output, seed, *_every_name()[-1]).exists():
            return

        def fit(problem: training.Problem, *name: str, **more: Any) -> dict[str, Any]:
            where = '/'.join([f'seed{seed}', *map(shipping.folder_name, name)])
            return jax.device_get(run.fit(where, problem, train, every=10, **more).variables)

        def learn(kind: str, name: str, variables: Any) -> dict[str, Any]:
            options = {'key': jax.random.key(seed), 'epochs': stages[name].epochs, 'student_variables': variables}
            teacher_variables = taught_by if kind == DISTILLED else None
            return fit(learning[kind][name], kind, name, teacher_variables=teacher_variables, **options)

        taught_by = fit(teaching, 'teacher', key=jax.random.key(1000 + seed), epochs=config.epochs)
        compression.ship(_folder(run.output, seed, 'teacher'), compression.Compressed(teacher, None, taught_by), batches[0])
        for kind in learning:
            made = compression.compress(student, ways, functools.partial(learn, kind), batches)
            for name, compressed in made.items():
                compression.ship(_folder(run.output, seed, kind, name), compressed, batches[0])

    return [teaching, *(problem for kind in learning.values() for problem in kind.values())], make


def _every_name() -> list[tuple[str, ...]]:
    """Of all that is shipped for a seed, in that order."""
    return [('teacher',), *((kind, name) for kind in (ALONE, DISTILLED) for name in compression.names())]


def _folder(output: pathlib.Path, seed: int, *name: str) -> pathlib.Path:
    return output.joinpath('networks', f'seed{seed}', *map(shipping.folder_name, name))


def measure(output: pathlib.Path, seeds: int, test: Batch) -> list[reporting.Row]:
    """Loads what was shipped, and measures it."""
    # Networks of one program are compiled once.
    programs: dict[str, tuple[networks.Network, training.Evaluate]] = {}

    def load(name: tuple[str, ...], seed: int) -> reporting.Row:
        folder = _folder(output, seed, *name)
        artefact = export.load(folder)
        program = artefact.manifest['files']['model.stablehlo']['sha256']
        if program not in programs:
            network = shipping.as_network(artefact)
            programs[program] = network, training.evaluator(network)
        network, evaluate = programs[program]
        accuracy = metrics.compute(evaluate(artefact.weights, test))['accuracy']
        extra = {'folder_bytes': sum(file.stat().st_size for file in folder.iterdir())}
        size = artefact.manifest['files']['weights.safetensors']['bytes']
        return reporting.Row(name[-1], [accuracy], size, network, artefact.weights, extra)

    def row(*name: str) -> reporting.Row:
        each = [load(name, seed) for seed in range(seeds)]
        return each[0]._replace(accuracies=[x for row in each for x in row.accuracies], size=max(row.size for row in each))

    rows = {name: row(*name) for name in _every_name()}
    teacher, student = rows['teacher',], rows[DISTILLED, 'student']
    table = []
    for name, measured in rows.items():
        if name[0] == ALONE:
            continue
        extra = {'of_teacher': measured.size / teacher.size, 'of_student': measured.size / student.size}
        if name[0] == DISTILLED:
            extra |= reporting.mean_and_deviation('without_distillation', rows[ALONE, name[1]].accuracies)
        table.append(measured._replace(extra=measured.extra | extra))
    return table


def conclusion(rows: Sequence[reporting.Row]) -> str:
    """The smallest network that is about as accurate as the distilled student."""
    student = rows[1]
    near = [row for row in rows[1:] if np.mean(row.accuracies) >= np.mean(student.accuracies) - 0.01]
    smallest = min(near, key=lambda row: row.size)
    return (
        f'The smallest network within a point of the distilled student is "{smallest.name}", with {smallest.size:,} bytes, '
        f'1/{1 / smallest.extra["of_teacher"]:.1f} of the teacher and 1/{1 / smallest.extra["of_student"]:.1f} of the student; '
        f'its accuracy differs by {reporting.in_points(*reporting.difference(smallest, student))}.'
    )


def table(results: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    heads = (
        'network',
        'without distillation (%)',
        'distilled (%)',
        'parameters',
        'nonzero',
        'bytes',
        'folder',
        'of teacher',
        'of student',
        *(f'batch {size} (ms)' for size in BATCH_SIZES),
    )
    lines = ['| ' + ' | '.join(heads) + ' |', '|---' * len(heads) + '|']
    for row in results:
        alone = ''
        if 'without_distillation_mean' in row:
            alone = _percent(row, 'without_distillation')
        cells = [
            row['name'],
            alone,
            _percent(row, 'accuracy'),
            *(f'{row[key]:,}' for key in ('parameters', 'nonzero', 'bytes', 'folder_bytes')),
            *(f'1/{1 / row[key]:.1f}' for key in ('of_teacher', 'of_student')),
            f'{row["latency_ms"]:.3f}',
            f'{row["latency_128_ms"]:.1f}',
        ]
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def _percent(row: dict[str, Any], key: str) -> str:
    return reporting.spread(row, key, 2, scale=100)


COLORS = {'not pruned': 'tab:blue', 'unstructured': 'tab:orange', '2:4': 'tab:green', 'channels': 'tab:red'}
MARKERS = {'dynamic': '^', 'static': 's', compression.AWARE: 'D'}
PANELS = {'bytes': 'bytes of weights', 'latency_ms': 'latency at batch 1 (ms)', 'latency_128_ms': 'latency at batch 128 (ms)'}


def draw(path: pathlib.Path, results: Sequence[dict[str, Any]], title: str) -> None:
    """Draws the accuracy of teacher and distilled networks against bytes and latency, with the Pareto fronts."""
    handle = functools.partial(plt.Line2D, [], [], linestyle='', markersize=8)
    key = [handle(color=color, marker='o', label=way) for way, color in COLORS.items()]
    key += [handle(color='grey', marker=marker, label=method) for method, marker in MARKERS.items()]
    key.append(handle(color='grey', marker='o', markerfacecolor='white', label='quantized first, then pruned'))
    figures.draw_accuracy(path, results, title, costs=PANELS, look=look, key=key)


def look(name: str) -> dict[str, Any]:
    """How a row is drawn: the marker says how it is quantized, the colour how it is pruned, the filling which came first."""
    if name in ('teacher', 'student'):
        return {'fmt': '*' if name == 'teacher' else 'o', 'color': 'black'}
    first, *second = name.split(', then ')
    color = next((COLORS[part] for part in (first, *second) if part in COLORS), COLORS['not pruned'])
    marker = next((MARKERS[part] for part in (first, *second) if part in MARKERS), 'o')
    return {'fmt': marker, 'color': color, 'markerfacecolor': 'white' if second and first in MARKERS else color}


if __name__ == '__main__':
    runs.command_line(Config, main)
