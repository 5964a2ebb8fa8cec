"""Distil, prune and quantize a digit classifier: labels are dear, inputs are cheap.

An ensemble of three teachers learns from all labels. A student of 1/40 of their size sees a hundred labels: alone, or
together with the teachers' soft targets on all inputs, which need no labels. The distilled student is then pruned while it
goes on being distilled, and its weights are quantized to int8. For honesty the student is also trained alone with all
labels.

    python -m experiments.quickstart

The recipe (temperature 2, 0.1 hard + 0.9 soft, learning rate, sparsity) was chosen on the validation split; the test split
is read once, at the end.

Hinton, Vinyals, Dean. Distilling the Knowledge in a Neural Network. 2015. https://arxiv.org/abs/1503.02531
"""

import dataclasses
import functools
import time
from typing import Annotated, Any

import jax
import optax
import tyro

from experiments import figures, reporting, runs, scenarios
from kdjax import data, models, networks, objectives, pruning, quantization, training
from kdjax.batches import Batch

BATCH_SIZE = 64
FEW_LABELS = 100
SPARSITY = 0.75
TEACHERS = 3


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of a run."""

    dataset: str = 'digits'
    """'digits', which is embedded, or the name of an image data set of TensorFlow Datasets."""
    data_dir: str | None = None
    """Where TensorFlow Datasets keeps its data; its own default if not given."""
    seeds: int = 5
    """Number of repetitions, each with teachers, labels and students of its own."""
    epochs: int = 40
    """Epochs of every student; the teachers train half as long, the pruned student as long again."""
    skip_nonfinite: int = 0
    """Steps of each network that may come out infinite or NaN and are then skipped; at the first one above it the run stops."""
    output: Annotated[str, tyro.conf.arg(metavar='FOLDER')] = 'runs/quickstart'
    """Folder for the report, the logs, the checkpoints and the student. The same command resumes there."""


def main(config: Config) -> None:
    """Trains, measures and reports."""
    started = time.time()
    runs.check_at_least(1, epochs=config.epochs, seeds=config.seeds)
    runs.check_at_least(0, skip_nonfinite=config.skip_nonfinite)
    dataset = data.load(config.dataset, data_dir=config.data_dir, validation=0.2)
    steps = training.steps_per_epoch(dataset.train, BATCH_SIZE)
    rescale = data.normalize(0.0, 1.0)
    teacher_member = networks.preprocess(
        networks.from_linen(models.CNN((32, 64), (128,), dataset.classes, dropout=0.3)), rescale
    )
    teacher = networks.ensemble([teacher_member] * TEACHERS)
    student = networks.preprocess(networks.from_linen(models.CNN((8, 16), (32,), dataset.classes)), rescale)

    def distillation(
        network: networks.Network,
        teacher: networks.Network | None,
        objective: objectives.Objective,
        rate: float,
        epochs: int,
        sparsity: optax.Schedule | None = None,
    ) -> training.Problem:
        optimizer = optax.adam(scenarios.falling(rate, epochs, dataset.train, BATCH_SIZE))
        optimizer = optimizer if sparsity is None else pruning.prune(optimizer, sparsity)
        return training.distillation(network, teacher, objective, optimizer)

    labels = objectives.hard_labels()
    both = 0.1 * labels + 0.9 * objectives.soft_targets(temperature=2.0)
    # Half the steps to prune, half to recover.
    sparsity = pruning.cubic(SPARSITY, begin=0, end=max(1, config.epochs * steps // 2), every=5)
    teacher_epochs = max(1, config.epochs // 2)
    teaching = distillation(teacher_member, None, labels, 2e-3, teacher_epochs)
    alone = distillation(student, None, labels, 1e-2, config.epochs)
    distilling = distillation(student, teacher, both, 1e-2, config.epochs)
    pruning_too = distillation(student, teacher, both, 1e-2, config.epochs, sparsity)
    runs.check(dataset.train, BATCH_SIZE, teaching, alone, distilling, pruning_too)
    output = runs.open_output(config)
    if output is None:
        return
    fit = functools.partial(
        training.fit,
        batch_size=BATCH_SIZE,
        every=10,
        mesh=runs.mesh(BATCH_SIZE),
        augment=data.augment.random_shift(pixels=1),
        skip_nonfinite=config.skip_nonfinite,
    )

    def networks_of(seed: int) -> dict[str, Any]:
        few = data.hide_labels(dataset.train, keep=min(FEW_LABELS, len(dataset.train['labels'])), seed=seed)

        def train(name: str, problem: training.Problem, split: Batch, taught_by: Any = None, **more: Any) -> Any:
            settings = {'key': jax.random.key(seed), 'epochs': config.epochs, **runs.saved(output, f'seed{seed}/{name}')}
            return fit(problem, split, taught_by, **(settings | more)).variables

        members = [
            train(f'teacher{i}', teaching, dataset.train, key=jax.random.key(1000 * (i + 1) + seed), epochs=teacher_epochs)
            for i in range(TEACHERS)
        ]
        taught_by = networks.ensemble_variables(members)
        distilled = train('distilled', distilling, few, taught_by)
        pruned = train('distilled-pruned', pruning_too, few, taught_by, student_variables=distilled)
        return {
            'teacher': taught_by,
            'student alone (few labels)': train('alone-few', alone, data.repeat_labelled(few)),
            'student alone (all labels)': train('alone-all', alone, dataset.train),
            'distilled': distilled,
            'distilled + pruned': pruned,
            'distilled + pruned + int8': {**pruned, 'params': quantization.quantize_weights(pruned['params'])},
        }

    # The test split waits until every network of every seed is trained.
    trained = scenarios.by_name(networks_of(seed) for seed in range(config.seeds))
    rows = scenarios.measure(dict.fromkeys(trained, student) | {'teacher': teacher}, trained, dataset.test, output)
    reporting.write_report(
        output,
        rows,
        title='Quickstart: distil, prune, quantize',
        dataset=dataset,
        started=started,
        devices=runs.devices_used(BATCH_SIZE),
        notes=conclusion(rows),
        draw=figures.draw_accuracy,
    )


def conclusion(rows: list[reporting.Row]) -> str:
    """What the table shows, with the standard error of the difference."""
    by_name = {row.name: row for row in rows}
    change, error = reporting.difference(by_name['distilled'], by_name['student alone (few labels)'])
    large, small = by_name['teacher'].size, by_name['distilled + pruned + int8'].size
    return (
        f'With {FEW_LABELS} labels, distilling changes the accuracy of the student by '
        f'{reporting.in_points(change, error, digits=1)}. The file to ship shrinks from {large:,} bytes for the teacher to '
        f'{small:,}, {large / small:.0f} times. Pruned and int8 weights are smaller on disk; once loaded they run as float32, '
        'so latency stays that of the student.'
    )


if __name__ == '__main__':
    runs.command_line(Config, main)
