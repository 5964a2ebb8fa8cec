"""Every method on one pair: alone, and with soft targets beside it.

    python -m experiments.method_table
    python -m experiments.method_table --dataset fashion_mnist --seeds 5 --epochs 8 --examples 3000 --output runs/fashion

A teacher is trained once, on all training examples; the students see `--examples` of them, with labels. A method's students, of
all seeds, alone and with 0.9 · soft targets (T = 4) added, train in one vmapped program that shares batches and the teacher's
forward pass. Weights are the published ones (`kdjax.recipes`), learning rates were chosen on the validation
split for soft targets alone, and the test split is read once, for the last epoch of each student. Images are averaged down to
at most 12 x 12, so that a CPU can do it. Methods on attention have a pair of transformers of their own.
"""

import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm.auto import tqdm

from experiments import architectures, figures, reporting, runs, settings, shipping
from experiments.settings import Count
from kdjax import data, metrics, models, networks, objectives, parallel, recipes, training
from kdjax.batches import Batch, take_examples
from kdjax.pooling import average_pool
from kdjax.recipes import RECIPES, TRANSFORMER_RECIPES, Pair, Recipe

LARGEST_IMAGE = 12
SOFT_WEIGHT = 0.9
BASELINE = 'soft_targets'


class Family(NamedTuple):
    """A pair, the methods that it is trained with, and how it is optimized.

    Attributes:
      name: as rows of the table have it.
      teacher: that is trained first.
      student: that learns.
      recipes: the methods, soft targets first.
      optimizer: from the learning rate's schedule.
      learning_rate: the largest.
    """

    name: str
    teacher: architectures.Architecture
    student: architectures.Architecture
    recipes: dict[str, Recipe]
    optimizer: Callable[[optax.Schedule], optax.GradientTransformation]
    learning_rate: float


def _sgd(rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.add_decayed_weights(5e-4), optax.sgd(rate, momentum=0.9))


FAMILIES = (
    Family(
        'convolutional',
        architectures.resnet(8, (16, 16, 32, 64)),
        architectures.resnet(8, (4, 4, 8, 16), models.im2col_convolution),
        RECIPES,
        _sgd,
        0.1,
    ),
    Family(
        'transformer',
        architectures.transformer(depth=4, width=32, heads=4),
        architectures.transformer(depth=2, width=8, heads=4),
        TRANSFORMER_RECIPES,
        lambda rate: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=1e-4)),
        2e-2,
    ),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of a run."""

    data: settings.Data = settings.Data(examples=320)
    training: settings.Training = settings.Training()
    epochs: Count = 40
    """Epochs of every student and of the teacher, which sees all training examples."""
    methods: tuple[str, ...] = ()
    """Which methods; all if not given."""
    output: settings.Folder = 'runs/method_table'
    """Folder for the report and the students. The same command resumes there, after the last finished method."""


def main(config: Config) -> None:
    """Trains, measures and reports."""
    runs.run(experiment, config)


def experiment(config: Config) -> runs.Experiment:
    """Which methods on which pairs."""
    settings.refuse(
        config.training,
        "a method's students train in one program",
        *('average', 'fsdp', 'skip_nonfinite', 'profile', 'tensorboard'),
    )
    known = {name for family in FAMILIES for name in family.recipes}
    if unknown := sorted(set(config.methods) - known):
        raise ValueError(f'--methods: there is no {unknown[0]!r}; there are: {", ".join(sorted(known))}')
    dataset = settings.load(settings.with_flags(config.data, examples=None))
    transfer = settings.part_in_order(dataset.train, config.data.examples)
    examples = len(transfer['labels'])
    transfer = {**transfer, 'index': np.arange(examples, dtype=np.int32)}
    families = [family for family in FAMILIES if not config.methods or set(config.methods) & set(family.recipes)]
    series = {'accuracy': 'the method', 'with_soft_targets': 'with soft targets'}
    return runs.Experiment(
        title=f'Distillation methods on {dataset.name}',
        dataset=dataset,
        problems=[(transfer, [])],
        rows=lambda run: [row for family in families for row in compare(family, config, dataset, transfer, run)],
        notes=lambda rows: f'{examples} training examples, {config.epochs} epochs. {NOTES}',
        report={'table': table, 'draw': functools.partial(figures.draw_rows, series=series)},
    )


NOTES = (
    'Gains are over the student that learns alone, and over soft targets, in points with their standard error. Time is that of '
    'a step of all students of a method, relative to soft targets.'
)


def compare(family: Family, config: Config, dataset: data.Dataset, transfer: Batch, run: runs.Run) -> list[reporting.Row]:
    """Trains a teacher and the students of every method of a family, and returns the rows of the table."""
    prepared, batch_size, seeds = _preparation(dataset), config.training.batch_size, config.training.seeds

    def network(architecture: architectures.Architecture, method: str = BASELINE) -> networks.Network:
        return networks.preprocess(architectures.network(architecture, dataset.classes, recipe=method), prepared)

    def optimizer(steps: int) -> optax.GradientTransformation:
        return family.optimizer(optax.cosine_decay_schedule(family.learning_rate, config.epochs * steps))

    teacher, student = network(family.teacher), network(family.student)
    steps = training.steps_per_epoch(dataset.train, batch_size)
    teaching = settings.distillation(config.training, teacher, None, objectives.hard_labels(), optimizer(steps))
    options = {'key': jax.random.key(1000), 'epochs': config.epochs, 'every': 10}
    taught_by = run.fit(f'{family.name}-teacher', teaching, dataset.train, **options).variables
    size, loaded = shipping.ship(run.output, f'{family.name} teacher', 0, taught_by)
    accuracy = metrics.compute(training.evaluator(teacher)(loaded, dataset.test))['accuracy']
    rows = [reporting.Row(f'{family.name} teacher', [accuracy], size, teacher, loaded)]

    evaluate = training.evaluator(student)
    steps = training.steps_per_epoch(transfer, batch_size)
    some, labels = transfer['inputs'][:batch_size], transfer['labels']
    pair = recipes.pair(student, teacher, some, steps_per_epoch=steps, epochs=config.epochs, labels=labels)
    baseline = None
    for method in family.recipes:
        if config.methods and method not in (BASELINE, *config.methods):
            continue
        name = f'{family.name} {method}'
        record = run.output / 'methods' / f'{family.name}-{method}.json'
        if not record.exists():
            pair_of_networks = network(family.student, method), network(family.teacher, method)
            problem = students(family.recipes[method], pair, pair_of_networks, optimizer(steps), config.training)
            seconds = train(problem, taught_by, transfer, config, run, name)
            reporting.write_json(record, {'step_ms': 1000 * seconds / steps})
        trained = measure(run.output, name, seeds, lambda loaded: evaluate(loaded, dataset.test))
        trained = trained._replace(step_ms=json.loads(record.read_text())['step_ms'])
        baseline = baseline or trained
        rows += _rows(name, student, trained, baseline)
    return rows


def students(
    recipe: Recipe,
    pair: Pair,
    pair_of_networks: tuple[networks.Network, networks.Network],
    optimizer: optax.GradientTransformation,
    computed: settings.Training,
) -> training.Problem:
    """The students of a method as one problem: one of each seed that learn by it alone, and one with soft targets added."""
    soft = SOFT_WEIGHT * objectives.soft_targets(temperature=4.0)

    def make(together: jax.Array) -> training.Problem:
        if recipe is RECIPES[BASELINE]:
            objective = (1 - SOFT_WEIGHT * together) * objectives.hard_labels() + together * soft
        else:
            objective = recipe(pair) + together * soft
        return settings.distillation(computed, *pair_of_networks, objective, optimizer)

    return training.sweep(make, jnp.repeat(jnp.array([0.0, 1.0]), computed.seeds))


def train(
    problem: training.Problem,
    teacher_variables: Any,
    transfer: Batch,
    config: Config,
    run: runs.Run,
    name: str,
) -> float:
    """Trains a method's students and ships them; returns the median time of an epoch in seconds."""
    batch_size, seeds = config.training.batch_size, config.training.seeds
    epoch = training.in_memory_epoch(problem, batch_size=batch_size, mesh=run.mesh)
    state = problem.init(jax.random.key(0), take_examples(transfer, slice(0, batch_size)))
    state, teacher_variables, transfer = parallel.replicate(run.mesh, (state, teacher_variables, transfer))
    taken = []
    for number in tqdm(range(config.epochs), desc=name, leave=False, disable=None):
        started = time.perf_counter()
        state, measured = epoch(state, teacher_variables, transfer)
        if not np.isfinite(jax.device_get(measured[-1]['loss'].total)).all():
            raise training.NonFiniteLossError(f'{name}: the loss is not finite in epoch {number + 1}')
        taken.append(time.perf_counter() - started)
    for i in range(2 * seeds):
        together, seed = divmod(i, seeds)
        shipping.ship(run.output, _file(name, together), seed, jax.tree.map(lambda x, i=i: x[i], state.variables))
    return float(np.median(taken))


class Trained(NamedTuple):
    """A method's students, as shipped: those that learned by it alone, and those with soft targets.

    Attributes:
      accuracies: test accuracies of both, of every seed.
      sizes: of a file of each, in bytes.
      variables: of the first seed of each.
      step_ms: time of a training step of all of them.
    """

    accuracies: list[list[float]]
    sizes: list[int]
    variables: list[Any]
    step_ms: float = 0.0


def measure(output: pathlib.Path, name: str, seeds: int, evaluate: Callable[[Any], Any]) -> Trained:
    """Loads a method's students, and measures them."""
    trained = Trained([], [], [])
    for together in (False, True):
        files = [shipping.shipped(output, _file(name, together), seed) for seed in range(seeds)]
        trained.accuracies.append([metrics.compute(evaluate(loaded))['accuracy'] for _, loaded in files])
        trained.sizes.append(files[0][0])
        trained.variables.append(files[0][1])
    return trained


def _rows(name: str, student: networks.Network, trained: Trained, baseline: Trained) -> list[reporting.Row]:
    (alone, together), (nothing, soft) = trained.accuracies, baseline.accuracies
    if trained is baseline:
        names = f'{name.split()[0]} alone', name
        extras = {'relative_time': 1.0}, {**_gain('alone', soft, nothing), 'relative_time': 1.0}
        columns = zip(names, *trained[:2], strict=True)
        return [
            reporting.Row(*column, student, variables, extra)
            for column, variables, extra in zip(columns, trained.variables, extras, strict=True)
        ]
    extra = {
        **reporting.mean_and_deviation('with_soft_targets', together),
        **_gain('alone', alone, nothing),
        **_gain('soft_targets', together, soft),
        'relative_time': trained.step_ms / baseline.step_ms,
    }
    return [reporting.Row(name, alone, trained.sizes[0], student, trained.variables[0], extra)]


def _preparation(dataset: data.Dataset) -> Callable[[jax.Array], jax.Array]:
    """Normalises images, and averages large ones down."""
    normalize = data.normalize(*data.channel_statistics(dataset.train['inputs']))
    height, width = dataset.train['inputs'].shape[1:3]
    size = min(height, LARGEST_IMAGE), min(width, LARGEST_IMAGE)
    return lambda images: average_pool(normalize(images), size)


def _file(name: str, together: bool) -> str:
    return f'{name} with soft targets' if together else name


def _gain(over: str, accuracies: Sequence[float], baseline: Sequence[float]) -> dict[str, float | None]:
    gain, error = reporting.difference_of_means(accuracies, baseline)
    return {f'gain_over_{over}': gain, f'gain_over_{over}_error': error}


def table(results: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    heads = ('method', 'test accuracy (%)', 'gain', 'with soft targets (%)', 'gain over soft targets', 'time')
    lines = ['| ' + ' | '.join(heads) + ' |', '|---' * len(heads) + '|']
    for row in results:
        together = ''
        if 'with_soft_targets_mean' in row:
            together = reporting.spread(row, 'with_soft_targets', 1, scale=100)
        cells = [
            row['name'],
            reporting.spread(row, 'accuracy', 1, scale=100),
            _signed(row, 'gain_over_alone'),
            together,
            _signed(row, 'gain_over_soft_targets'),
            f'{row["relative_time"]:.2f}' if 'relative_time' in row else '',
        ]
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def _signed(row: dict[str, Any], key: str) -> str:
    if key not in row:
        return ''
    error = row[f'{key}_error']
    return f'{100 * row[key]:+.1f}' + ('' if error is None else f' ({100 * error:.1f})')


if __name__ == '__main__':
    runs.command_line(Config, main)
