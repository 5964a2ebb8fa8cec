"""Distil one image classifier into another: any data set, teacher, student and recipe.

    python -m experiments.classification --dataset fashion_mnist --labels 1000
    python -m experiments.classification --dataset cifar100 --teacher resnet32x4 --student resnet8x4 --recipe decoupled_kd \
        --epochs 240 --augment crop_flip --batch-size 64 --learning-rate 0.05 --clip-norm None

SGD with momentum 0.9 and weight decay 5e-4; the learning rate falls to a tenth after 5/8, 6/8 and 7/8 of the epochs, as in
the published tables of 240 epochs. The teacher is trained once and found again in `--teachers`. The best epoch is the best
on the validation split; both it and the last are measured on the test split.
"""

import dataclasses
import functools
import pathlib
import time
import zlib
from collections.abc import Callable
from typing import Annotated, Any, Literal

import jax
import numpy as np
import optax
import tyro

from experiments import architectures, figures, reporting, runs, shipping
from experiments.architectures import ARCHITECTURES
from kdjax import data, metrics, networks, objectives, training
from kdjax.recipes import RECIPES

AUGMENTATIONS = {
    'none': None,
    'crop': data.augment.random_crop(padding=4),
    'crop_flip': data.augment.chain(data.augment.random_crop(padding=4), data.augment.random_flip()),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of a run."""

    dataset: str = 'digits'
    """'digits', which is embedded, or the name of an image data set of TensorFlow Datasets."""
    data_dir: str | None = None
    """Where TensorFlow Datasets keeps its data; its own default if not given."""
    teacher: Literal[tuple(ARCHITECTURES)] = 'cnn_32_64'
    """The network that teaches."""
    student: Literal[tuple(ARCHITECTURES)] = 'cnn_8_16'
    """The network that learns."""
    recipe: Literal[tuple(RECIPES)] = 'soft_targets'
    """What it learns; see `kdjax.recipes`."""
    seeds: int = 3
    """Number of students, all of one teacher."""
    labels: int | None = None
    """Number of labels that the students get, as many of each class; all if not given. The teacher always has all."""
    epochs: int = 8
    """Epochs of the teacher and of every student."""
    batch_size: int = 128
    """Examples a step."""
    learning_rate: float = 0.05
    """Before it falls."""
    clip_norm: float | None = 1.0
    """Largest norm of a gradient, None for any; unclipped, soft targets trained networks without batch norm badly at 0.05."""
    augment: Literal[tuple(AUGMENTATIONS)] = 'none'
    """How training images are varied: crop_flip for photographs."""
    fsdp: int = 1
    """Devices that share one copy of large parameters, teacher's and optimizer's too; 1 for a copy on each."""
    skip_nonfinite: int = 0
    """Steps of each network that may come out infinite or NaN and are then skipped; at the first one above it the run stops."""
    teachers: Annotated[str, tyro.conf.arg(metavar='FOLDER')] = 'runs/teachers'
    """Folder in which trained teachers are kept and looked for."""
    output: Annotated[str, tyro.conf.arg(metavar='FOLDER')] = 'runs/classification'
    """Folder for the report, the logs, the checkpoints and the students. The same command resumes there."""


def main(config: Config) -> None:
    """Trains, measures and reports."""
    started = time.time()
    runs.check_at_least(1, epochs=config.epochs, seeds=config.seeds, batch_size=config.batch_size)
    runs.check_at_least(0, skip_nonfinite=config.skip_nonfinite)
    dataset = data.load(config.dataset, data_dir=config.data_dir)
    index = np.arange(len(dataset.train['labels']), dtype=np.int32)
    dataset = dataset._replace(train={**dataset.train, 'index': index})
    steps = training.steps_per_epoch(dataset.train, config.batch_size)
    if config.labels is not None:
        data.hide_labels(dataset.train, keep=config.labels)  # complains before anything is written
    normalize = data.normalize(*data.channel_statistics(dataset.train['inputs']))

    def network(name: str) -> networks.Network:
        made = architectures.network(ARCHITECTURES[name], dataset.classes, recipe=config.recipe)
        return networks.preprocess(made, normalize)

    def optimizer() -> optax.GradientTransformation:
        drops = {int(config.epochs * steps * share): 0.1 for share in (5 / 8, 6 / 8, 7 / 8)}
        rate = optax.piecewise_constant_schedule(config.learning_rate, drops)
        clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
        return optax.chain(clip, optax.add_decayed_weights(5e-4), optax.sgd(rate, momentum=0.9))

    teacher, student = network(config.teacher), network(config.student)
    # Where only some have labels, which they are differs from seed to seed: contrastive recipes then go by the example alone.
    train_labels = dataset.train['labels'] if config.labels is None else np.full_like(dataset.train['labels'], -1)
    pair = architectures.pair(ARCHITECTURES[config.student], ARCHITECTURES[config.teacher], steps, config.epochs, train_labels)
    labels = objectives.hard_labels()
    teaching = training.distillation(teacher, None, labels, optimizer())
    alone = training.distillation(student, None, labels, optimizer())
    distilling = training.distillation(student, teacher, RECIPES[config.recipe](pair), optimizer())
    runs.check(dataset.train, config.batch_size, teaching, alone, distilling)
    mesh = runs.mesh(config.batch_size, fsdp=config.fsdp)
    output = runs.open_output(config)
    if output is None:
        return

    fit = functools.partial(
        training.fit,
        batch_size=config.batch_size,
        epochs=config.epochs,
        mesh=mesh,
        augment=AUGMENTATIONS[config.augment],
        skip_nonfinite=config.skip_nonfinite,
    )

    def validation(network: networks.Network) -> Callable[[Any], dict[str, metrics.Average]]:
        evaluate = training.evaluator(network)
        return lambda variables: evaluate(variables, dataset.validation)

    fingerprint = zlib.crc32(dataset.train['inputs'].tobytes() + dataset.train['labels'].tobytes())
    settings = f'{config.epochs}-{config.batch_size}-{config.learning_rate}-{config.clip_norm}-{config.augment}'
    folder = pathlib.Path(config.teachers) / f'{config.teacher}-{settings}-{fingerprint:08x}'
    folder.mkdir(parents=True, exist_ok=True)
    saved = runs.saved(folder, 'teacher')
    taught_by = fit(teaching, dataset.train, key=jax.random.key(1000), validate=validation(teacher), **saved)
    if taught_by.resumed_from == config.epochs * steps:
        print(f'The teacher was found in {folder}')
    fitted: dict[str, list[training.Fitted]] = {'teacher': [taught_by]}
    teacher_variables = taught_by.best_variables
    validate = validation(student)
    for seed in range(config.seeds):
        labelled, partly = dataset.train, dataset.train
        if config.labels is not None:
            partly = data.hide_labels(dataset.train, keep=config.labels, seed=seed)
            labelled = data.repeat_labelled(partly)
        settings = {'key': jax.random.key(seed), 'validate': validate}
        learned = fit(alone, labelled, **settings, **runs.saved(output, f'seed{seed}/alone'))
        fitted.setdefault('student alone', []).append(learned)
        learned = fit(distilling, partly, teacher_variables, **settings, **runs.saved(output, f'seed{seed}/distilled'))
        fitted.setdefault('distilled', []).append(learned)
    rows = [
        measure(name, teacher if name == 'teacher' else student, each, teacher, teacher_variables, dataset.test, output)
        for name, each in fitted.items()
    ]
    reporting.write_report(
        output,
        rows,
        title=f'{config.teacher} to {config.student} on {dataset.name}: {config.recipe}',
        dataset=dataset,
        started=started,
        devices=runs.devices_used(config.batch_size),
        notes=conclusion(rows),
        draw=figures.draw_accuracy,
    )


def measure(
    name: str,
    network: networks.Network,
    fitted: list[training.Fitted],
    teacher: networks.Network,
    teacher_variables: Any,
    test: objectives.Batch,
    output: pathlib.Path,
) -> reporting.Row:
    """Measures the last and the best epoch of every seed on the test split; the last is the file to ship."""
    evaluate = training.evaluator(network, teacher=teacher)
    shipped = [shipping.ship(output, name, seed, each.variables) for seed, each in enumerate(fitted)]
    last = [metrics.compute(evaluate(loaded, test, teacher_variables)) for _, loaded in shipped]
    best = [metrics.compute(evaluate(each.best_variables, test, teacher_variables)) for each in fitted]
    extra = reporting.mean_and_deviation('best_accuracy', [each['accuracy'] for each in best])
    for key in ('nll', 'calibration_error', 'agreement'):
        extra |= reporting.mean_and_deviation(key, [each[key] for each in last])
    size, loaded = shipped[0]
    return reporting.Row(name, [each['accuracy'] for each in last], size, network, loaded, extra)


def conclusion(rows: list[reporting.Row]) -> str:
    """What the table shows, with the standard error of the difference."""
    _, alone, distilled = rows
    gain = reporting.in_points(*reporting.difference(distilled, alone))
    return (
        f'Distilling changes the accuracy of the student by {gain}, last epoch '
        ' against last epoch; all students had the best epoch of one teacher. Best accuracy: of the epoch that is best on '
        'the validation split. Agreement: share of test examples on which network and teacher prefer the same class. Negative '
        'log likelihood (nll) in nats.'
    )


if __name__ == '__main__':
    runs.command_line(Config, main)
