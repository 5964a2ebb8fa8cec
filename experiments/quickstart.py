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
from typing import Any

import jax
import optax

from experiments import figures, reporting, runs, scenarios, settings
from experiments.settings import Count
from kdjax import data, models, networks, objectives, pruning, quantization, training
from kdjax.batches import Batch

FEW_LABELS = 100
SPARSITY = 0.75
TEACHERS = 3


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of a run."""

    data: settings.Data = settings.Data()
    training: settings.Training = settings.Training(seeds=5)
    epochs: Count = 40
    """Epochs of every student; the teachers train half as long, the pruned student as long again."""
    output: settings.Folder = 'runs/quickstart'
    """Folder for the report, the logs, the checkpoints and the student. The same command resumes there."""


def main(config: Config) -> None:
    """Trains, measures and reports."""
    runs.run(experiment, config)


def experiment(config: Config) -> runs.Experiment:
    """Who learns what of whom, and what becomes of the student."""
    dataset = settings.load(config.data)
    steps = training.steps_per_epoch(dataset.train, config.training.batch_size)
    rescale = data.normalize(0.0, 1.0)
    teacher_member = networks.preprocess(
        networks.from_linen(models.CNN((32, 64), (128,), dataset.classes, dropout=0.3)), rescale
    )
    teacher = networks.ensemble([teacher_member] * TEACHERS)
    student = networks.preprocess(networks.from_linen(models.CNN((8, 16), (32,), dataset.classes)), rescale)

    def learning(
        network: networks.Network,
        teacher: networks.Network | None,
        objective: objectives.Objective,
        rate: float,
        epochs: int,
        sparsity: optax.Schedule | None = None,
    ) -> training.Problem:
        optimizer = optax.adam(scenarios.falling(rate, epochs, dataset.train, config.training.batch_size))
        optimizer = optimizer if sparsity is None else pruning.prune(optimizer, sparsity)
        return settings.distillation(config.training, network, teacher, objective, optimizer)

    labels = objectives.hard_labels()
    both = 0.1 * labels + 0.9 * objectives.soft_targets(temperature=2.0)
    # Half the steps to prune, half to recover.
    sparsity = pruning.cubic(SPARSITY, begin=0, end=max(1, config.epochs * steps // 2), every=5)
    teacher_epochs = max(1, config.epochs // 2)
    teaching = learning(teacher_member, None, labels, 2e-3, teacher_epochs)
    alone = learning(student, None, labels, 1e-2, config.epochs)
    distilling = learning(student, teacher, both, 1e-2, config.epochs)
    pruning_too = learning(student, teacher, both, 1e-2, config.epochs, sparsity)

    def rows(run: runs.Run) -> list[reporting.Row]:
        # The test split waits until every network of every seed is trained.
        made = scenarios.by_name(trained(run, seed) for seed in range(config.training.seeds))
        network_of = dict.fromkeys(made, student) | {'teacher': teacher}
        return scenarios.measure(network_of, made, dataset.test, run.output)

    def trained(run: runs.Run, seed: int) -> dict[str, Any]:
        few = data.hide_labels(dataset.train, keep=min(FEW_LABELS, len(dataset.train['labels'])), seed=seed)
        shift = data.augment.random_shift(pixels=1)

        def train(name: str, problem: training.Problem, split: Batch, taught_by: Any = None, **more: Any) -> Any:
            options = {'key': jax.random.key(seed), 'epochs': config.epochs, 'every': 10, 'augment': shift, **more}
            return run.fit(f'seed{seed}/{name}', problem, split, taught_by, **options).variables

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

    problems = [(dataset.train, [teaching, alone, distilling, pruning_too])]
    title = 'Quickstart: distil, prune, quantize'
    return runs.Experiment(title, dataset, problems, rows, conclusion, {'draw': figures.draw_accuracy})


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
