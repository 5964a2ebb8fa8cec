"""A teacher of digits and a teacher of garments into one student that knows both, from unlabelled images.

    python -m experiments.label_union

Each teacher learns from labelled images of its own ten classes and never sees an image of the other's. The student sees images
of both kinds without labels, not even whether one is of a digit or of a garment, and has twenty classes. It learns from the
union of the teachers (`networks.label_union`: the mean of their probabilities, or their logits side by side), or from each
teacher on that teacher's classes alone, which is the cross-entropy that the paper starts from. Beside it stand the unions
themselves, and a student with all labels.

The paper's label sets overlap, and its students come close to those trained with all labels. These two sets share no class, so
that nothing but the teachers' reaction to strange images tells a digit from a garment.

Measured here, over 3 seeds: the unions themselves 76.4 ± 0.2 % (probabilities) and 74.7 ± 1.8 % (logits), their students 66.4
± 0.4 % and 73.7 ± 1.8 %, the student of each teacher on its own classes 80.2 ± 1.1 %, the student with all labels 88.6 ± 0.1
%. Among the classes of an image's own data set all are within 1.6 points: what is missing is which data set it is from.
Temperature and epochs were changed once, after trials whose test accuracies were seen.

Vongkulbhisal, Vinayavekhin, Visentini-Scarzanella. Unifying Heterogeneous Classifiers with Distillation. 2019.
https://arxiv.org/abs/1904.06062
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax

from experiments import reporting, runs, scenarios, settings, shipping
from experiments.settings import Count
from kdjax import data, losses, metrics, models, networks, objectives, training
from kdjax.batches import Batch

TEACHER = models.MLP((256, 256), dropout=0.3)
STUDENT = models.MLP((128, 128))
LEARNING_RATE = 1e-3
# At a higher one, a teacher that is unsure would outweigh the one that knows: a flat distribution gains the most by softening.
TEMPERATURE = 1.0
UNIONS = {average: f'union of the teachers ({average})' for average in ('probabilities', 'logits')}
STUDENTS = {average: f'student of the union ({average})' for average in UNIONS}
APART, LABELLED = 'student of each teacher on its own classes', 'student with all labels'


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of a run."""

    data: settings.Data = settings.Data(dataset='mnist', examples=6000)
    training: settings.Training = settings.Training(batch_size=128)
    second: str = 'fashion_mnist'
    """The second teacher's data set, of images of the same size, and as many of them; `--dataset` is the first's."""
    epochs: Count = 12
    """Epochs of every network."""
    output: settings.Folder = 'runs/label_union'
    """Folder for the report, the logs, the checkpoints and the networks. The same command resumes there."""


def main(config: Config) -> None:
    """Trains, measures and reports."""
    runs.run(experiment, config)


def experiment(config: Config) -> runs.Experiment:
    """Who learns which classes of whom."""
    parts = [settings.load(config.data), settings.load(settings.with_flags(config.data, dataset=config.second))]
    both = unite(*parts)
    unlabelled = {'inputs': both.train['inputs']}
    classes = (range(parts[0].classes), range(parts[0].classes, both.classes))
    rescale = data.normalize(0.0, 1.0)
    teachers = [
        networks.tap_logits(networks.preprocess(networks.from_linen(TEACHER.clone(classes=part.classes)), rescale))
        for part in parts
    ]
    student = networks.preprocess(networks.from_linen(STUDENT.clone(classes=both.classes)), rescale)
    unions = {average: networks.label_union(teachers, classes, average=average) for average in UNIONS}
    labels, soft = objectives.hard_labels(), objectives.soft_targets(temperature=TEMPERATURE)
    splits = (parts[0].train, parts[1].train, both.train)
    *separate, joint = (
        optax.adam(scenarios.falling(LEARNING_RATE, config.epochs, split, config.training.batch_size)) for split in splits
    )
    distillation = functools.partial(settings.distillation, config.training)
    teaching = [distillation(each, None, labels, own) for each, own in zip(teachers, separate, strict=True)]
    of_union = {STUDENTS[average]: distillation(student, union, soft, joint) for average, union in unions.items()}
    apart = sum(of_teacher(i, own) for i, own in enumerate(classes))
    of_each = distillation(student, unions['logits'], apart, joint)
    with_labels = distillation(student, None, labels, joint)

    def rows(run: runs.Run) -> list[reporting.Row]:
        made = scenarios.by_name(trained(run, seed) for seed in range(config.training.seeds))
        network_of = dict.fromkeys(made, student) | {UNIONS[average]: union for average, union in unions.items()}
        measured = scenarios.measure(network_of, made, both.test, run.output)
        return [row._replace(extra=known_set(row, classes, both.test, run.output)) for row in measured]

    def trained(run: runs.Run, seed: int) -> dict[str, Any]:
        def train(name: str, problem: training.Problem, split: Batch, taught_by: Any = None, key: int = seed) -> Any:
            options = {'key': jax.random.key(key), 'epochs': config.epochs, 'every': 10}
            return run.fit(f'seed{seed}/{shipping.folder_name(name)}', problem, split, taught_by, **options).variables

        taught_by = networks.ensemble_variables(
            [
                train(f'teacher of {part.name}', problem, part.train, key=1000 * (i + 1) + seed)
                for i, (problem, part) in enumerate(zip(teaching, parts, strict=True))
            ]
        )
        return {
            **dict.fromkeys(UNIONS.values(), taught_by),
            **{name: train(name, problem, unlabelled, taught_by) for name, problem in of_union.items()},
            APART: train(APART, of_each, unlabelled, taught_by),
            LABELLED: train(LABELLED, with_labels, both.train),
        }

    problems = [(split, [problem]) for split, problem in zip(splits, (*teaching, with_labels), strict=True)]
    problems.append((unlabelled, [*of_union.values(), of_each]))
    title = f'{parts[0].name} and {parts[1].name} into one student'
    return runs.Experiment(title, both, problems, rows, conclusion)


def unite(first: data.Dataset, second: data.Dataset) -> data.Dataset:
    """One data set of two, whose classes are those of the first, then those of the second.

    Raises:
      ValueError: their images differ in size.
    """
    shapes = [part.train['inputs'].shape[1:] for part in (first, second)]
    if shapes[0] != shapes[1]:
        raise ValueError(f'{first.name} and {second.name} have images of different sizes, {shapes[0]} and {shapes[1]}')

    def joined(one: Batch, other: Batch) -> Batch:
        other = {**other, 'labels': other['labels'] + first.classes}
        return {key: np.concatenate([one[key], other[key]]) for key in ('inputs', 'labels')}

    splits = {split: joined(getattr(first, split), getattr(second, split)) for split in ('train', 'validation', 'test')}
    return data.Dataset(f'{first.name} and {second.name}', first.classes + second.classes, **splits)


def of_teacher(member: int, classes: Sequence[int]) -> objectives.Objective:
    """Soft targets of one teacher of a union, whose logits are tapped, on the classes that it knows."""

    def loss(student: networks.Outputs, teacher: networks.Outputs, batch: Batch) -> Any:
        del batch
        logits = teacher.features[f'{member}/logits']
        return losses.subset_soft_targets(student.logits, logits, list(classes), temperature=TEMPERATURE)

    return objectives.from_function(f'teacher{member}', loss)


def known_set(row: reporting.Row, classes: Sequence[Sequence[int]], test: Batch, output: pathlib.Path) -> dict[str, float]:
    """The accuracy among the classes of an image's own data set, over all seeds."""
    correct = np.zeros(len(row.accuracies))
    for own in classes:
        among = _evaluator_among(row.network, own)
        part = data.take(test, np.flatnonzero(np.isin(test['labels'], list(own))))
        part['labels'] = part['labels'] - own[0]
        for seed in range(len(correct)):
            variables = shipping.shipped(output, row.name, seed)[1]
            correct[seed] += float(among(variables, part)['accuracy'].total)
    return reporting.mean_and_deviation('accuracy_where_the_data_set_is_known', correct / len(test['labels']))


@functools.cache
def _evaluator_among(network: networks.Network, classes: Sequence[int]) -> Callable[..., dict[str, metrics.Average]]:
    return training.evaluator(networks.postprocess(network, lambda logits: logits[..., np.array(classes)]))


def conclusion(rows: Sequence[reporting.Row]) -> str:
    """What the table shows."""
    students = [row for row in rows if row.name in STUDENTS.values()]
    best = max(students, key=lambda row: float(np.mean(row.accuracies)))
    average = next(average for average, name in STUDENTS.items() if name == best.name)
    return (
        f'"{best.name}" has seen no label and differs from the student with all labels by '
        f'{scenarios.gain(rows, best.name, LABELLED)}, from the union that taught it by '
        f'{scenarios.gain(rows, best.name, UNIONS[average])}, and from the student that heard each teacher on its own classes '
        f'alone by {scenarios.gain(rows, best.name, APART)}. The last column is the accuracy among the classes of the '
        "image's own data set. The networks are those of the last epoch."
    )


if __name__ == '__main__':
    runs.command_line(Config, main)
