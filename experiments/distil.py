r"""Your data in, your student out: distil one image classifier into another, prune it, quantize it, and get a folder to ship.

    python -m experiments.distil --dataset my_photos --image-size 64
    python -m experiments.distil --dataset my_photos --image-size 64 --student resnet8 --teacher resnet20 \
        --augment crop_flip --prune channels --quantize static --output runs/mine
    python -m experiments.distil --dataset fashion_mnist --labels 1000 --output runs/few-labels
    python -m experiments.distil --dataset cifar100 --teacher resnet32x4 --student resnet8x4 --recipe decoupled_kd \
        --epochs 240 --augment crop_flip --batch-size 64 --learning-rate 0.05 --clip-norm None

A teacher learns from labels, or is read by `--teacher-from`; the student learns by the recipe, and, to compare with, from
labels alone. Then it is pruned while it goes on learning in the same way, for half as many epochs, and quantized to int8. Every
network is written as a folder that runs with jax alone, and what the report says of it was measured with what was loaded from
there. The last one, of the seed that is best on the validation split, is the folder `student`.

SGD with momentum 0.9 and weight decay 5e-4; the learning rate falls to a tenth after 5/8, 6/8 and 7/8 of the epochs, as in
the published tables of 240 epochs, and begins at a tenth in quantization-aware training. The teacher is trained once and found
again in `--teachers`. What is shipped is the last epoch; the best on the validation split is measured beside it.
"""

import dataclasses
import itertools
import pathlib
import zlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import numpy as np
import optax
import tyro

from experiments import architectures, compression, figures, reporting, runs, scenarios, settings, stages
from experiments.architectures import ARCHITECTURES
from experiments.compression import AWARE, QUANTIZATIONS, SPARSITIES
from experiments.settings import Count, Positive, Within
from experiments.stages import ALONE, DISTILLED, PRUNED, QUANTIZED, TEACHER, Plan, Stage
from kdjax import data, networks, objectives, pruning, quantization, recipes, training
from kdjax.recipes import RECIPES

AUGMENTATIONS = {
    'none': None,
    'crop': data.augment.random_crop(padding=4),
    'crop_flip': data.augment.chain(data.augment.random_crop(padding=4), data.augment.random_flip()),
}
WHAT_RECIPES_ARE = 'What it learns:\n' + '\n'.join(
    f'{name}: {(each.__doc__ or "").splitlines()[0]}' for name, each in RECIPES.items()
)


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of a run."""

    data: settings.Data = settings.Data()
    training: settings.Training = settings.Training(batch_size=128)
    teacher: Literal[tuple(ARCHITECTURES)] = 'cnn_32_64'
    """The network that teaches."""
    teacher_from: str | None = None
    """A trained teacher of that architecture: the folder of its checkpoints, or a file of its weights, .safetensors."""
    student: Literal[tuple(ARCHITECTURES)] = 'cnn_8_16'
    """The network that learns."""
    recipe: Annotated[Literal[tuple(RECIPES)], tyro.conf.arg(help=WHAT_RECIPES_ARE)] = 'soft_targets'
    labels: Count | None = None
    """Number of labels that the students get, as many of each class; all if not given. The teacher always has all."""
    baseline: bool = True
    """Whether to train the student from labels alone too, to compare with."""
    prune: Literal['none', *SPARSITIES] = 'none'
    """What is pruned: the smallest weights, 2 of every 4 inputs, or channels, which are then removed."""
    sparsity: Annotated[float, Within(0, 1, open=True)] = 0.5
    """The share that pruning takes; 2:4 takes half."""
    quantize: Literal['none', *QUANTIZATIONS] = 'none'
    """How weights and activations become int8: by each batch's own ranges, by calibrated ones, or by training with them."""
    epochs: Count = 8
    """Epochs of the teacher and of every student; pruning and quantization-aware training take half as many."""
    learning_rate: Positive = 0.05
    """Before it falls."""
    clip_norm: Positive | None = 1.0
    """Largest norm of a gradient, None for any; unclipped, soft targets trained networks without batch norm badly at 0.05."""
    augment: Literal[tuple(AUGMENTATIONS)] = 'none'
    """How training images are varied: crop_flip for photographs."""
    teachers: settings.Folder = 'runs/teachers'
    """Folder in which trained teachers are kept and looked for."""
    output: settings.Folder = 'runs/distil'
    """Folder for the report, the logs, the checkpoints and the networks. The same command resumes there."""


def main(config: Config) -> None:
    """Trains, measures and reports."""
    runs.run(experiment, config)


def experiment(config: Config) -> runs.Experiment:
    """What learns what of whom, and what becomes of it."""
    dataset = settings.load(config.data, validation=0.1)
    dataset = dataset._replace(train={**dataset.train, 'index': np.arange(len(dataset.train['labels']), dtype=np.int32)})
    if config.labels is not None:
        data.hide_labels(dataset.train, keep=config.labels)  # complains before anything is written
    plan = plan_of(config, dataset)
    teacher = plan.stages[TEACHER].network
    given = None if config.teacher_from is None else stages.read_teacher(pathlib.Path(config.teacher_from), teacher, dataset)

    def rows(run: runs.Run) -> list[reporting.Row]:
        taught_by = given or stages.teach(run, plan, teacher_folder(config, dataset))
        made = {TEACHER: [taught_by]}
        for seed in range(config.training.seeds):
            for name, one in stages.make(run, plan, taught_by.best, seed).items():
                made.setdefault(name, []).append(one)
        stages.ship(run, dataset, made)
        return stages.measure(run, dataset, made, teacher, taught_by.best)

    return runs.Experiment(
        title=f'{config.teacher} to {config.student} on {dataset.name}: {config.recipe}',
        dataset=dataset,
        problems=[(dataset.train, [stage.problem for stage in plan.stages.values()])],
        rows=rows,
        notes=conclusion,
        report={'draw': figures.draw_accuracy},
        sections=lambda run: stages.sections(run, dataset),
    )


def teacher_folder(config: Config, dataset: data.Dataset) -> pathlib.Path:
    """Where a teacher of these data and settings is kept."""
    labels = dataset.train['labels']
    some = np.unique(np.linspace(0, len(labels) - 1, 1000).astype(int))
    digest = zlib.crc32(np.ascontiguousarray(dataset.train['inputs'][some]).tobytes() + labels.tobytes())
    computed = dataclasses.replace(config.training, seeds=1, fsdp=1, **settings.without_consequence())
    learned = repr((config.epochs, config.learning_rate, config.clip_norm, config.augment, computed))
    return pathlib.Path(config.teachers) / f'{config.teacher}-{digest:08x}-{zlib.crc32(learned.encode()):08x}'


def plan_of(config: Config, dataset: data.Dataset) -> Plan:
    """What the flags ask for."""
    steps = training.steps_per_epoch(dataset.train, config.training.batch_size)
    inputs = dataset.train['inputs'][: config.training.batch_size]
    normalize = data.normalize(*data.channel_statistics(dataset.train['inputs']))
    later = max(1, config.epochs // 2)

    def network(name: str, module: nn.Module | None = None) -> networks.Network:
        module = ARCHITECTURES[name].make(dataset.classes) if module is None else module
        tapped = architectures.network(ARCHITECTURES[name]._replace(make=lambda classes: module), 0, recipe=config.recipe)
        return networks.preprocess(tapped, normalize)

    def sgd(epochs: int, share: float = 1.0) -> optax.GradientTransformation:
        drops = {int(epochs * steps * part): 0.1 for part in (5 / 8, 6 / 8, 7 / 8)}
        rate = optax.piecewise_constant_schedule(share * config.learning_rate, drops)
        clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
        return optax.chain(clip, optax.add_decayed_weights(5e-4), optax.sgd(rate, momentum=0.9))

    def stage(learner: networks.Network, taught_by: Any, optimizer: optax.GradientTransformation, epochs: int) -> Stage:
        objective = objectives.hard_labels() if taught_by is None else recipe_for(epochs)
        return Stage(learner, settings.distillation(config.training, learner, taught_by, objective, optimizer), epochs)

    def recipe_for(epochs: int) -> objectives.Objective:
        # Where only some have labels, which they are differs from seed to seed: contrastive recipes go by the example alone.
        labels = dataset.train['labels'] if config.labels is None else np.full_like(dataset.train['labels'], -1)
        pair = recipes.pair(student, teacher, inputs, steps_per_epoch=steps, epochs=epochs, labels=labels)
        return RECIPES[config.recipe](pair)

    teacher, student = network(config.teacher), network(config.student)
    made = {TEACHER: stage(teacher, None, sgd(config.epochs), config.epochs)}
    if config.baseline:
        made[ALONE] = stage(student, None, sgd(config.epochs), config.epochs)
    made[DISTILLED] = stage(student, teacher, sgd(config.epochs), config.epochs)
    module, pruned, end = ARCHITECTURES[config.student].make(dataset.classes), None, optax.identity()
    if config.prune != 'none':
        pruned = compression.way_to_prune(config.prune, config.sparsity, module, normalize, inputs)
        # Half the steps to prune, half to recover.
        schedule = pruning.cubic(pruned.sparsity, begin=0, end=max(1, later * steps // 2), every=5)
        made[PRUNED] = stage(student, teacher, pruning.prune(sgd(later), schedule, **pruned.chosen), later)
        module, end = pruned.module, compression.keep_zeros()
    rule = QUANTIZATIONS.get(config.quantize)
    if rule is not None:
        aware = quantization.fake_quantize_network(network(config.student, module), rule)
        jax.eval_shape(aware.init, jax.random.key(0), inputs)  # complains before anything is written
    if config.quantize == AWARE:
        made[QUANTIZED] = stage(aware, teacher, optax.chain(sgd(later, 0.1), end), later)
    small = compression.network_of(module, normalize)
    return Plan(dataset, made, config.labels, AUGMENTATIONS[config.augment], pruned, rule, small)


def conclusion(rows: Sequence[reporting.Row]) -> str:
    """What the table shows, with the standard error of differences."""
    found, names = {row.name: row for row in rows}, [row.name for row in rows]
    told = []
    if ALONE in found:
        told.append(
            f'Distilling changes the accuracy of the student by {scenarios.gain(rows, DISTILLED, ALONE)}, last epoch '
            'against last epoch; all students had the best epoch of one teacher.'
        )
    for before, after in itertools.pairwise(names[names.index(DISTILLED) :]):
        told.append(f'{after} against {before}: {scenarios.gain(rows, after, before)}.')
    last, largest = rows[-1], found[TEACHER]
    told.append(
        f'The weights to ship shrink from {largest.size:,} bytes for the teacher to {last.size:,}, '
        f'{largest.size / last.size:.1f} times.'
    )
    told.append(
        'Best accuracy: of the epoch that is best on the validation split. Agreement: share of test examples on which network '
        'and teacher prefer the same class. Negative log likelihood (nll) in nats.'
    )
    return ' '.join(told)


if __name__ == '__main__':
    runs.command_line(Config, main)
