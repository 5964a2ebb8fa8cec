"""Ten teachers into one student: what an ensemble knows, in a network of the size of one of its members.

    python -m experiments.ensemble

Ten networks learn from the same labels and differ in their initial parameters alone. The mean of their probabilities is the
teacher of one more network like them, which is compared with one that learns alone for as long, and with one that has a single
teacher. The paper's ten-fold ensemble of acoustic models gains 2.2 points of frame accuracy over one model, and the distilled
model keeps more than 80 % of that gain.

Hinton, Vinyals, Dean. Distilling the Knowledge in a Neural Network. 2015. https://arxiv.org/abs/1503.02531
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import tyro

from experiments import reporting, runs, scenarios
from kdjax import data, models, networks, objectives

MEMBER = models.MLP((256, 256))
LEARNING_RATE = 1e-3
TEMPERATURE = 2.0
TEACHER, ENSEMBLE = 'one teacher', 'ensemble'
ALONE, ONE, ALL = 'student alone', 'student of one teacher', 'student of the ensemble'


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of a run."""

    dataset: str = 'fashion_mnist'
    """'digits', which is embedded, or the name of an image data set of TensorFlow Datasets."""
    data_dir: str | None = None
    """Where TensorFlow Datasets keeps its data; its own default if not given."""
    examples: int | None = 6000
    """Training examples that teachers and students see; all if not given."""
    teachers: int = 10
    """Members of the ensemble."""
    seeds: int = 3
    """Number of repetitions, each with teachers and students of its own."""
    epochs: int = 15
    """Epochs of every teacher; students take twice as many."""
    batch_size: int = 64
    """Examples a step."""
    output: Annotated[str, tyro.conf.arg(metavar='FOLDER')] = 'runs/ensemble'
    """Folder for the report, the logs, the checkpoints and the networks. The same command resumes there."""


def main(config: Config) -> None:
    """Trains, measures and reports."""
    started = time.time()
    runs.check_at_least_one(teachers=config.teachers, epochs=config.epochs, seeds=config.seeds, batch_size=config.batch_size)
    dataset = scenarios.load(config.dataset, data_dir=config.data_dir, examples=config.examples)
    member = networks.preprocess(networks.from_linen(MEMBER.clone(classes=dataset.classes)), data.normalize(0.0, 1.0))
    ensemble = networks.ensemble([member] * config.teachers)
    labels = objectives.hard_labels()
    both = 0.1 * labels + 0.9 * objectives.soft_targets(temperature=TEMPERATURE)

    def learn(objective: objectives.Objective, epochs: int, teacher: networks.Network | None = None) -> runs.Run:
        settings = {'rate': LEARNING_RATE, 'epochs': epochs, 'batch_size': config.batch_size}
        return scenarios.learn(member, objective, dataset.train, teacher=teacher, **settings)

    teaching, alone = learn(labels, config.epochs), learn(labels, 2 * config.epochs)
    of_one, of_all = learn(both, 2 * config.epochs, member), learn(both, 2 * config.epochs, ensemble)
    output = runs.open_output(config)
    if output is None:
        return

    def trained(seed: int) -> dict[str, Any]:
        train = scenarios.trainer(output, dataset.train, seed)
        members = [train(f'teacher{i}', teaching, key=1000 * (i + 1) + seed) for i in range(config.teachers)]
        joined = networks.ensemble_variables(members)
        return {
            TEACHER: members[0],
            ENSEMBLE: joined,
            ALONE: train(ALONE, alone),
            ONE: train(ONE, of_one, members[0]),
            ALL: train(ALL, of_all, joined),
        }

    made = scenarios.by_name(trained(seed) for seed in range(config.seeds))
    network_of = {name: ensemble if name == ENSEMBLE else member for name in made}
    rows = scenarios.measure(network_of, made, dataset.test, output)
    title = f'{config.teachers} teachers into one student'
    scenarios.report(config, output, rows, title=title, dataset=dataset, started=started, notes=conclusion(rows))


def conclusion(rows: Sequence[reporting.Row]) -> str:
    """What the table shows."""
    mean = {row.name: float(np.mean(row.accuracies)) for row in rows}
    possible = mean[ENSEMBLE] - mean[ALONE]
    kept = f'{(mean[ALL] - mean[ALONE]) / possible:.0%} of' if possible > 0 else 'against'
    return (
        f'The student of the ensemble differs from the student alone by {scenarios.gain(rows, ALL, ALONE)}, which is {kept} '
        f'what the ensemble itself does ({scenarios.gain(rows, ENSEMBLE, ALONE)}); the student of one teacher differs by '
        f'{scenarios.gain(rows, ONE, ALONE)}. Nothing was tuned here, and the networks are those of the last epoch.'
    )


if __name__ == '__main__':
    runs.command_line(Config, main)
