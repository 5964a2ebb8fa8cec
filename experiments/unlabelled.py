"""Students that never see a label, against the share of the inputs that they are shown.

    python -m experiments.unlabelled

A classifier and an autoencoder learn from all training digits. Smaller students then learn from a share of the inputs, which
reach them without labels:

  labels                   for comparison: the labels of the same share, without the teacher
  soft targets             the teacher's predictions at temperature 4
  + attention              soft targets, and every layer near the teacher's where the teacher attends
  + diversity              soft targets, and predictions that are confident for each input and diverse over the batch
  logits                   the teacher's logits reconstructed
  + inner product          the same, with last features that are small and orthogonal to the teacher's
  autoencoder of inputs    an autoencoder that reconstructs the inputs
  autoencoder of outputs   one that reconstructs what the teacher's autoencoder makes of them

All take the same number of steps, so a smaller share is repeated more often. The accuracy of an autoencoder is that of the
teacher's classifier on what it reconstructs. Weights were chosen on the validation split; the test split is read once.

Measured here, 3 seeds, test accuracy of the students in %:

  inputs shown        58           115          288          1150
  labels          83.0 ± 2.9   89.8 ± 1.4   93.7 ± 0.2   97.1 ± 0.6
  soft targets    89.6 ± 1.8   94.2 ± 1.5   96.2 ± 0.4   96.5 ± 0.2

Hinton, Vinyals and Dean trained on 3 % of their speech data: soft targets kept nearly all of the accuracy (57.0 %, against
58.9 % with all of it) that hard targets lost (44.5 %). The same shows here with 5 to 25 % of the inputs, and without a label:
with 25 % the student is within a point of what all labels give. With all inputs soft targets gain nothing over labels.
Attention and diversity change nothing beyond the standard errors. To reconstruct logits may help with the fewest inputs (+2.0
points, standard error 1.1), and is worse with all (-1.2, 0.3). To reconstruct the teacher's output rather than the inputs makes
no difference to the autoencoders.

References:
  Hinton, Vinyals, Dean. Distilling the Knowledge in a Neural Network. 2015. https://arxiv.org/abs/1503.02531
  Hinton, Salakhutdinov. Reducing the Dimensionality of Data with Neural Networks. 2006.
  https://doi.org/10.1126/science.1127647
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from experiments import figures, reporting, runs, scenarios, settings, shipping
from experiments.settings import Count, Share
from kdjax import data, losses, metrics, models, networks, objectives, training
from kdjax.batches import Batch

LAYERS = ('hidden0', 'hidden1')
TEACHER = models.MLP((256, 256), dropout=0.3)
STUDENT = models.MLP((32, 32))
# As classes an autoencoder has the pixels.
TEACHER_AUTOENCODER = models.MLP((256, 32, 256))
STUDENT_AUTOENCODER = models.MLP((64, 16, 64))
LEARNING_RATE = 3e-3
ATTENTION, INNER_PRODUCT, DIVERSITY = 100.0, 1e-2, 0.1


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of a run."""

    data: settings.Data = settings.Data()
    training: settings.Training = settings.Training()
    epochs: Count = 40
    """Epochs of teachers and students, counted in training sets: a student of a small share takes as many steps."""
    shares: tuple[Share, ...] = (0.05, 0.1, 0.25, 1.0)
    """Shares of the training inputs that are transfer sets, in rising order."""
    output: settings.Folder = 'runs/unlabelled'
    """Folder for the report, the logs, the checkpoints and the students. The same command resumes there."""


class Method(NamedTuple):
    """How a student learns.

    Attributes:
      network: the student.
      taught_by: `'classifier'`, `'autoencoder'`, or None.
      objective: what it learns.
      labelled: whether it sees labels.
    """

    network: networks.Network
    taught_by: str | None
    objective: objectives.Objective
    labelled: bool = False


def methods(student: networks.Network, autoencoder: networks.Network) -> dict[str, Method]:
    """All that is compared, by name."""
    soft, logits = objectives.soft_targets(temperature=4.0), objectives.reconstruction()
    attention = sum(objectives.attention_distillation(layer, layer) for layer in LAYERS)
    inner = objectives.attention_distillation(LAYERS[-1], LAYERS[-1], variant='inner_product')
    return {
        'labels': Method(student, None, objectives.hard_labels(), labelled=True),
        'soft targets': Method(student, 'classifier', soft),
        'soft targets + attention': Method(student, 'classifier', soft + ATTENTION * attention),
        'soft targets + diversity': Method(student, 'classifier', soft + DIVERSITY * objectives.diversity()),
        'logits': Method(student, 'classifier', logits),
        'logits + inner product': Method(student, 'classifier', logits + INNER_PRODUCT * inner),
        'autoencoder of inputs': Method(autoencoder, None, objectives.reconstruction(teacher='inputs')),
        'autoencoder of outputs': Method(autoencoder, 'autoencoder', logits),
    }


def main(config: Config) -> None:
    """Trains, measures and reports."""
    runs.run(experiment, config)


def experiment(config: Config) -> runs.Experiment:
    """Who learns what of whom, from how many inputs."""
    dataset = settings.load(config.data)
    train, test = flatten(dataset.train), flatten(dataset.test)
    shares = [round(share * len(train['labels'])) for share in config.shares]
    if not shares or shares != sorted(set(shares)) or shares[0] < 1 or shares[-1] > len(train['labels']):
        raise ValueError(f'--shares must rise from above 0 to at most 1, got {config.shares}')

    def network(module: models.MLP, classes: int = dataset.classes, features: tuple[str, ...] = LAYERS) -> networks.Network:
        return networks.from_linen(module.clone(classes=classes), features=features)

    pixels = train['inputs'].shape[-1]
    teachers = {'classifier': network(TEACHER), 'autoencoder': network(TEACHER_AUTOENCODER, pixels, ())}
    learning = {'classifier': objectives.hard_labels(), 'autoencoder': objectives.reconstruction(teacher='inputs')}
    optimizer = optax.adam(scenarios.falling(LEARNING_RATE, config.epochs, train, config.training.batch_size))
    teaching = {
        name: settings.distillation(config.training, teachers[name], None, learning[name], optimizer) for name in teachers
    }
    compared = methods(network(STUDENT), network(STUDENT_AUTOENCODER, pixels, ()))
    problems = {
        name: settings.distillation(
            config.training, method.network, teachers.get(method.taught_by), method.objective, optimizer
        )
        for name, method in compared.items()
    }

    def rows(run: runs.Run) -> list[reporting.Row]:
        # The test split waits until every network of every seed is trained.
        taught: dict[str, list[Any]] = {name: [] for name in teachers}
        students: dict[str, dict[int, list[Any]]] = {name: {examples: [] for examples in shares} for name in compared}
        for seed in range(config.training.seeds):
            for name, problem in teaching.items():
                taught[name].append(fit(run, f'seed{1000 + seed}/teacher-{name}', problem, train, 1000 + seed))
            for examples in shares:
                shown = transfer_set(train, examples, seed)
                for name, method in compared.items():
                    split = shown if method.labelled else without_labels(shown)
                    teacher = taught[method.taught_by][-1] if method.taught_by else None
                    where = f'seed{seed}/{shipping.folder_name(name)}/{examples}'
                    students[name][examples].append(fit(run, where, problems[name], split, seed, teacher))
        measured = {f'teacher: {name}': (teachers[name], {shares[-1]: taught[name]}) for name in teachers}
        measured |= {name: (compared[name].network, each) for name, each in students.items()}
        classify = training.evaluator(teachers['classifier'])
        return [
            measure(name, network, each, test, run.output, classify if 'autoencoder' in name else None, taught['classifier'])
            for name, (network, each) in measured.items()
        ]

    def fit(run: runs.Run, where: str, problem: training.Problem, split: Batch, key: int, taught_by: Any = None) -> Any:
        # Of every network the end alone is needed.
        options = {'key': jax.random.key(key), 'epochs': config.epochs, 'every': config.epochs}
        return run.fit(where, problem, split, taught_by, **options).variables

    return runs.Experiment(
        title=f'Without a label: {dataset.name}',
        dataset=dataset._replace(test=test),
        problems=[(train, [*teaching.values(), *problems.values()])],
        rows=rows,
        notes=lambda rows: conclusion(rows, shares),
        report={'table': table, 'draw': draw},
    )


def flatten(split: Batch) -> Batch:
    """Images as rows of numbers from 0 to 1, which autoencoders can reconstruct."""
    inputs = split['inputs'].reshape(len(split['inputs']), -1).astype(np.float32) / 255
    return {**split, 'inputs': inputs}


def transfer_set(train: Batch, examples: int, seed: int) -> Batch:
    """So many examples, drawn without a look at the labels and repeated to the number of all; a larger set holds a smaller."""
    everything = len(train['inputs'])
    chosen = np.random.default_rng(seed).permutation(everything)[:examples]
    return data.take(train, np.resize(chosen, everything))


def without_labels(split: Batch) -> Batch:
    """The inputs alone."""
    return {'inputs': split['inputs']}


def measure(
    name: str,
    network: networks.Network,
    trained: dict[int, list[Any]],
    test: Batch,
    output: pathlib.Path,
    classify: Callable[..., Any] | None,
    classifiers: list[Any],
) -> reporting.Row:
    """Measures the files to ship: a classifier, or an autoencoder by the teacher's classifier on what it reconstructs."""
    evaluate, extra = training.evaluator(network), {}
    for examples, each_seed in trained.items():
        shipped = [shipping.ship(output, f'{name} {examples}', seed, variables) for seed, variables in enumerate(each_seed)]
        sizes, loaded = zip(*shipped, strict=True)
        if classify is None:
            measured = [evaluate(variables, test) for variables in loaded]
        else:
            outputs = [network.apply(variables, test['inputs'])[0].logits for variables in loaded]
            errors = [float(np.sqrt(np.mean(losses.reconstruction(x, test['inputs'])) / x.shape[-1])) for x in outputs]
            extra |= reporting.mean_and_deviation(f'error_{examples}', errors)
            measured = [classify(variables, {**test, 'inputs': x}) for variables, x in zip(classifiers, outputs, strict=True)]
        accuracies = [metrics.compute(x)['accuracy'] for x in measured]
        extra |= reporting.mean_and_deviation(f'accuracy_{examples}', accuracies)
    return reporting.Row(name, accuracies, max(sizes), network, loaded[0], extra)


def conclusion(rows: Sequence[reporting.Row], shares: Sequence[int]) -> str:
    """What the table shows."""
    by_name = {row.name: row.extra for row in rows}

    def accuracy(name: str, examples: int) -> str:
        return f'{reporting.spread(by_name[name], f"accuracy_{examples}", 1, scale=100)} %'

    few, many = shares[0], shares[-1]
    return (
        f'Columns are the inputs shown. {few} inputs without labels and soft targets give {accuracy("soft targets", few)}; the '
        f'same {few} with labels {accuracy("labels", few)}; all {many} without labels {accuracy("soft targets", many)}, and '
        f'with labels {accuracy("labels", many)}. Error is the root of the mean square over pixels from 0 to 1. Parameters, '
        'bytes and latency are those of the students of all inputs.'
    )


def _examples(results: Sequence[dict[str, Any]]) -> list[int]:
    return sorted(
        {int(key.split('_')[1]) for row in results for key in row if key.startswith('accuracy_') and key[9].isdigit()}
    )


def table(results: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table, a column for each size of the transfer set."""
    shares = _examples(results)
    heads = ['network', *(f'{examples} inputs (%)' for examples in shares), 'error', 'parameters', 'bytes', 'latency (ms)']
    lines = ['| ' + ' | '.join(heads) + ' |', '|---' * len(heads) + '|']

    def cell(row: dict[str, Any], key: str, scale: float, digits: int) -> str:
        if f'{key}_mean' not in row:
            return ''
        return reporting.spread(row, key, digits, scale)

    for row in results:
        cells = [
            row['name'],
            *(cell(row, f'accuracy_{examples}', 100, 1) for examples in shares),
            cell(row, f'error_{shares[-1]}', 1, 3),
            *(f'{row[key]:,}' for key in ('parameters', 'bytes')),
            f'{row["latency_ms"]:.3f}',
        ]
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def draw(path: pathlib.Path, results: Sequence[dict[str, Any]], title: str) -> None:
    """Draws the accuracy against the number of inputs, a line for each method."""
    with figures.one_panel(path, title, (8, 5)) as axes:
        for row, marker in zip(results, figures.MARKERS, strict=False):
            points = [examples for examples in _examples(results) if f'accuracy_{examples}_mean' in row]
            means = [100 * row[f'accuracy_{x}_mean'] for x in points]
            bars = [figures.error_bar(row, f'accuracy_{x}') for x in points]
            axes.errorbar(points, means, yerr=bars, marker=marker, capsize=3, label=row['name'])
        axes.set(xscale='log', xlabel='inputs shown', ylabel='test accuracy (%)')


if __name__ == '__main__':
    runs.command_line(Config, main)
