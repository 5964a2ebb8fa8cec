"""Teachers of another family: a large network teaches a small one, and a small one, even a bad one, teaches a large one.

    python -m experiments.student_as_teacher

A convolutional network and a small multilayer perceptron learn alone, then each from the other. The convolutional network also
learns from a perceptron that was trained for one epoch alone, and, without any teacher, from smoothed labels. The paper finds
that a student improves its own teacher when the roles are swapped, and that so does a poorly trained one, and puts it down to
what soft targets share with label smoothing.

Measured here on 300 digits, over 5 seeds: the large network alone 96.2 ± 0.7 %, taught by the small one 96.3 ± 0.4 %, by the
small one of one epoch, which itself has 28.1 ± 8.2 %, 97.2 ± 0.2 %, with smoothed labels 97.2 ± 1.0 %. The small network alone
95.4 ± 0.5 %, taught by the large one 94.9 ± 1.1 %. So the poor teacher helps as in the paper (+1.00 points, standard error
0.31), and as much as smoothing does; the swapped roles gain nothing that could be told from chance. Learning rates and epochs
were raised once, as students had not converged, when test accuracies had been seen.

Yuan, Tay, Li, Wang, Feng. Revisiting Knowledge Distillation via Label Smoothing Regularization. 2020.
https://arxiv.org/abs/1909.11723
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import optax

from experiments import reporting, runs, scenarios, settings, shipping
from experiments.settings import Count
from kdjax import data, models, networks, objectives, training

LARGE = models.CNN((16, 32), (64,))
SMALL = models.MLP((16,))
LARGE_RATE, SMALL_RATE = 3e-3, 1e-2
TEMPERATURE = 4.0
SMOOTHING = 0.1
LARGE_ALONE, SMALL_ALONE, POOR = 'large alone', 'small alone', 'small, trained for one epoch'
SMALL_OF_LARGE, LARGE_OF_SMALL = 'small, taught by large', 'large, taught by small'
LARGE_OF_POOR, SMOOTHED = 'large, taught by small of one epoch', 'large, smoothed labels'


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of a run."""

    data: settings.Data = settings.Data(examples=300)
    training: settings.Training = settings.Training(seeds=5, batch_size=50)
    epochs: Count = 80
    """Epochs of every network but the one that is to be bad."""
    output: settings.Folder = 'runs/student_as_teacher'
    """Folder for the report, the logs, the checkpoints and the networks. The same command resumes there."""


def main(config: Config) -> None:
    """Trains, measures and reports."""
    runs.run(experiment, config)


def experiment(config: Config) -> runs.Experiment:
    """Who learns what of whom."""
    dataset = settings.load(config.data)
    large, small = (
        networks.preprocess(networks.from_linen(module.clone(classes=dataset.classes)), data.normalize(0.0, 1.0))
        for module in (LARGE, SMALL)
    )
    labels = objectives.hard_labels()
    both = 0.5 * labels + 0.5 * objectives.soft_targets(temperature=TEMPERATURE)
    smoothed = objectives.hard_labels(label_smoothing=SMOOTHING)
    slow, fast, brief = (
        optax.adam(scenarios.falling(rate, epochs, dataset.train, config.training.batch_size))
        for rate, epochs in ((LARGE_RATE, config.epochs), (SMALL_RATE, config.epochs), (SMALL_RATE, 1))
    )
    large_alone = settings.distillation(config.training, large, None, labels, slow)
    small_alone = settings.distillation(config.training, small, None, labels, fast)
    briefly = settings.distillation(config.training, small, None, labels, brief)
    small_of_large = settings.distillation(config.training, small, large, both, fast)
    large_of_small = settings.distillation(config.training, large, small, both, slow)
    large_smoothed = settings.distillation(config.training, large, None, smoothed, slow)
    problems = (large_alone, small_alone, briefly, small_of_large, large_of_small, large_smoothed)

    def trained(run: runs.Run, seed: int) -> dict[str, Any]:
        def train(name: str, problem: training.Problem, taught_by: Any = None, epochs: int = config.epochs) -> Any:
            options = {'key': jax.random.key(seed), 'epochs': epochs, 'every': 10}
            return run.fit(f'seed{seed}/{shipping.folder_name(name)}', problem, dataset.train, taught_by, **options).variables

        alone = {
            LARGE_ALONE: train(LARGE_ALONE, large_alone),
            SMALL_ALONE: train(SMALL_ALONE, small_alone),
            POOR: train(POOR, briefly, epochs=1),
        }
        return alone | {
            SMALL_OF_LARGE: train(SMALL_OF_LARGE, small_of_large, alone[LARGE_ALONE]),
            LARGE_OF_SMALL: train(LARGE_OF_SMALL, large_of_small, alone[SMALL_ALONE]),
            LARGE_OF_POOR: train(LARGE_OF_POOR, large_of_small, alone[POOR]),
            SMOOTHED: train(SMOOTHED, large_smoothed),
        }

    def rows(run: runs.Run) -> list[reporting.Row]:
        made = scenarios.by_name(trained(run, seed) for seed in range(config.training.seeds))
        network_of = {name: large if name.startswith('large') else small for name in made}
        return scenarios.measure(network_of, made, dataset.test, run.output)

    title = 'Teachers of another family, large and small'
    return runs.Experiment(title, dataset, [(dataset.train, problems)], rows, conclusion)


def conclusion(rows: Sequence[reporting.Row]) -> str:
    """What the table shows."""
    gains = '; '.join(f'{name} {scenarios.gain(rows, name, LARGE_ALONE)}' for name in (LARGE_OF_SMALL, LARGE_OF_POOR, SMOOTHED))
    return (
        f'Against the large network alone: {gains}. The small network that the large one taught differs from the small one '
        f'alone by {scenarios.gain(rows, SMALL_OF_LARGE, SMALL_ALONE)}. The networks are those of the last epoch.'
    )


if __name__ == '__main__':
    runs.command_line(Config, main)
