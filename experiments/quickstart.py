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
import time
from typing import Annotated, Any

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
    runs.check_at_least_one(epochs=config.epochs, seeds=config.seeds)
    dataset = data.load(config.dataset, data_dir=config.data_dir, validation=0.2)
    steps = training.steps_per_epoch(dataset.train, BATCH_SIZE)
    rescale = data.normalize(0.0, 1.0)
    teacher_member = networks.preprocess(
        networks.from_linen(models.CNN((32, 64), (128,), dataset.classes, dropout=0.3)), rescale
    )
    teacher = networks.ensemble([teacher_member] * TEACHERS)
    student = networks.preprocess(networks.from_linen(models.CNN((8, 16), (32,), dataset.classes)), rescale)

    def prepare(
        network: networks.Network,
        objective: objectives.Objective,
        rate: float,
        epochs: int,
        teacher: networks.Network,
        sparsity: optax.Schedule | None = None,
    ) -> runs.Run:
        optimizer = optax.adam(optax.cosine_decay_schedule(rate, epochs * steps))
        if sparsity is not None:
            optimizer = pruning.prune(optimizer, sparsity)
        problem = training.distillation(network, teacher, objective, optimizer)
        shift = data.augment.random_shift(pixels=1)
        return runs.prepare(
            problem,
            dataset.train,
            epochs=epochs,
            batch_size=BATCH_SIZE,
            augment=shift,
            skip_nonfinite=config.skip_nonfinite,
        )

    labels, nobody = objectives.hard_labels(), networks.nothing()
    both = 0.1 * labels + 0.9 * objectives.soft_targets(temperature=2.0)
    # Half the steps to prune, half to recover.
    sparsity = pruning.cubic(SPARSITY, begin=0, end=max(1, config.epochs * steps // 2), every=5)
    teaching = prepare(teacher_member, labels, 2e-3, max(1, config.epochs // 2), nobody)
    alone = prepare(student, labels, 1e-2, config.epochs, nobody)
    distilling = prepare(student, both, 1e-2, config.epochs, teacher)
    pruning_too = prepare(student, both, 1e-2, config.epochs, teacher, sparsity)
    output = runs.open_output(config)
    if output is None:
        return

    def networks_of(seed: int) -> dict[str, Any]:
        few = data.hide_labels(dataset.train, keep=min(FEW_LABELS, len(dataset.train['labels'])), seed=seed)

        def train(name: str, run: runs.Run, split: Batch, key: int = seed, **more: Any) -> Any:
            return runs.train(run, split, seed=key, output=output, name=f'seed{seed}/{name}', **more).state.variables

        members = [train(f'teacher{i}', teaching, dataset.train, key=1000 * (i + 1) + seed) for i in range(TEACHERS)]
        taught_by = networks.ensemble_variables(members)
        distilled = train('distilled', distilling, few, teacher_variables=taught_by)
        pruned = train('distilled-pruned', pruning_too, few, teacher_variables=taught_by, student_variables=distilled)
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
