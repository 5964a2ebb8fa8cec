"""From a teacher to a student to ship: what is trained in which order, what is written, and how it is measured."""

import functools
import json
import pathlib
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import compression, figures, reporting, runs, shipping
from experiments import sections as classifiers
from experiments.compression import Compressed, Pruning
from kdjax import data, export, metrics, networks, parallel, quantization, training
from kdjax.data.augment import Augment
from kdjax.files import write_whole
from kdjax.paths import leaves_with_paths

TEACHER, ALONE, DISTILLED, PRUNED, QUANTIZED = 'teacher', 'student alone', 'distilled', 'pruned', 'int8'
CALIBRATION_BATCHES = 4
_AT_ONCE = 256


class Stage(NamedTuple):
    """A training.

    Attributes:
      network: that trains.
      problem: how.
      epochs: how long.
    """

    network: networks.Network
    problem: training.Problem
    epochs: int


class Plan(NamedTuple):
    """What is to be done.

    Attributes:
      dataset: what is learned; of the training split, examples are numbered by `'index'`.
      stages: the trainings, by the name of what they make.
      labels: number of labels that students see; None for all.
      augment: how training inputs are varied.
      pruning: how the student is pruned, if it is.
      rule: how the student is quantized, if it is.
      student: the network to ship, in floating point.
    """

    dataset: data.Dataset
    stages: Mapping[str, Stage]
    labels: int | None
    augment: Augment | None
    pruning: Pruning | None
    rule: quantization.Rule | None
    student: networks.Network


class Made(NamedTuple):
    """What was made for one seed.

    Attributes:
      shipped: the network to ship.
      best: variables of the same network where validation found them best; None where the last ones are all there is.
    """

    shipped: Compressed
    best: dict[str, Any] | None = None


def teach(run: runs.Run, plan: Plan, folder: pathlib.Path) -> Made:
    """Trains the teacher, or finds it in the folder where an earlier run has left it."""
    taught = _train(run, plan, TEACHER, TEACHER, plan.dataset.train, key=jax.random.key(1000), folder=folder)
    if taught.resumed_from:
        runs.say(f'The teacher was found in {folder}')
    return Made(Compressed(plan.stages[TEACHER].network, None, taught.variables), taught.best_variables)


def read_teacher(path: pathlib.Path, teacher: networks.Network, dataset: data.Dataset) -> Made:
    """The variables of a teacher that was trained before: of a folder of checkpoints, or a file of weights.

    Raises:
      ValueError: they are not those of the network.
    """
    variables = (
        training.restore_variables(path) if path.is_dir() else quantization.dequantize_weights(export.load_weights(path))
    )
    wanted = jax.eval_shape(teacher.init, jax.random.key(0), dataset.train['inputs'][:1])
    found, expected = ({name: leaf.shape for name, leaf in leaves_with_paths(each).items()} for each in (variables, wanted))
    for name in sorted({**found, **expected}):
        if found.get(name) != expected.get(name):
            raise ValueError(
                f'{path} holds another teacher than this one of {dataset.classes} classes: {name} is '
                f'{found.get(name, "absent")} there and {expected.get(name, "absent")} in the network'
            )
    return Made(Compressed(teacher, None, variables), variables)


def make(run: runs.Run, plan: Plan, taught_by: dict[str, Any] | None, seed: int) -> dict[str, Made]:
    """Makes all students of a seed, each from where the one before it ended."""
    labelled, partly = plan.dataset.train, plan.dataset.train
    if plan.labels is not None:
        partly = data.hide_labels(plan.dataset.train, keep=plan.labels, seed=seed)
        labelled = data.repeat_labelled(partly)

    def learn(name: str, split: Any, teacher_variables: Any, start: Any = None) -> runs.Trained:
        where = f'seed{seed}/{shipping.folder_name(name)}'
        options = {'key': jax.random.key(seed), 'student_variables': start}
        return _train(run, plan, name, where, split, teacher_variables, **options)

    made = {}
    if ALONE in plan.stages:
        learned = learn(ALONE, labelled, None)
        made[ALONE] = Made(Compressed(plan.stages[ALONE].network, None, learned.variables), learned.best_variables)
    learned = learn(DISTILLED, partly, taught_by)
    variables = learned.variables
    made[DISTILLED] = Made(Compressed(plan.stages[DISTILLED].network, None, variables), learned.best_variables)
    if plan.pruning is not None:
        variables = plan.pruning.finish(learn(PRUNED, partly, taught_by, variables).variables)
        made[PRUNED] = Made(Compressed(plan.student, None, variables))
    if plan.rule is not None:
        if plan.rule.ranges != 'dynamic':
            batches = _calibration_batches(plan.dataset.train['inputs'], run.settings.batch_size)
            variables = quantization.calibrate(plan.student, plan.rule, variables, batches)
        if QUANTIZED in plan.stages:
            variables = learn(QUANTIZED, partly, taught_by, variables).variables
        made[QUANTIZED] = Made(Compressed(plan.student, plan.rule, variables))
    return made


def ship(run: runs.Run, dataset: data.Dataset, made: Mapping[str, Sequence[Made]]) -> int:
    """Writes a folder for every network of every seed, and the last of the best seed as `student`; returns that seed."""
    metadata, inputs = {'classes': list(dataset.class_names), 'dataset': dataset.name}, dataset.test['inputs'][:1]
    for name, each in made.items():
        for seed, one in enumerate(each):
            folder = _folder(run.output, name, seed)
            write = functools.partial(compression.ship, folder, jax.device_get(one.shipped), inputs, metadata)
            parallel.on_first_host(write, str(folder))
    last = list(made)[-1]
    folders = [_folder(run.output, last, seed) for seed in range(len(made[last]))]
    artefacts = [export.load(folder) for folder in folders]
    evaluate = training.evaluator(shipping.as_network(artefacts[0]))
    accuracies = [metrics.compute(evaluate(artefact.weights, dataset.validation))['accuracy'] for artefact in artefacts]
    best = int(np.argmax(accuracies))
    copy = functools.partial(shutil.copytree, folders[best], run.output / 'student', dirs_exist_ok=True)
    parallel.on_first_host(copy, 'student')
    return best


def measure(
    run: runs.Run,
    dataset: data.Dataset,
    made: Mapping[str, Sequence[Made]],
    teacher: networks.Network,
    taught_by: dict[str, Any] | None,
) -> list[reporting.Row]:
    """Loads what was shipped, and measures it on the test split; the best epoch too, where nothing was changed after it."""
    rows = []
    for name, each in made.items():
        artefacts = [export.load(_folder(run.output, name, seed)) for seed in range(len(each))]
        network = shipping.as_network(artefacts[0])
        evaluate = training.evaluator(network, teacher=teacher)
        last = [metrics.compute(evaluate(artefact.weights, dataset.test, taught_by)) for artefact in artefacts]
        extra = {}
        for key in ('nll', 'calibration_error', 'agreement'):
            extra |= reporting.mean_and_deviation(key, [measured[key] for measured in last])
        if all(one.best is not None for one in each):
            best = [metrics.compute(_evaluator(one.shipped.network)(one.best, dataset.test)) for one in each]
            extra |= reporting.mean_and_deviation('best_accuracy', [measured['accuracy'] for measured in best])
        size = max(artefact.manifest['files']['weights.safetensors']['bytes'] for artefact in artefacts)
        accuracies = [measured['accuracy'] for measured in last]
        rows.append(reporting.Row(name, accuracies, size, network, artefacts[0].weights, extra))
    return rows


def sections(run: runs.Run, dataset: data.Dataset) -> list[reporting.Section]:
    """What else there is to say of the teacher and of the student to ship, and what the stages cost."""
    logits = {}
    for name, folder in ((TEACHER, _folder(run.output, TEACHER, 0)), ('the student to ship', run.output / 'student')):
        artefact = export.load(folder)
        pieces = range(0, len(dataset.test['labels']), _AT_ONCE)
        logits[name] = np.concatenate([artefact(dataset.test['inputs'][i : i + _AT_ONCE]) for i in pieces])
    records = [json.loads(line) for line in (run.output / 'metrics.jsonl').read_text().splitlines()]
    lines = ['| training | seconds |', '|---|---|', *(f'| {name} | {spent:.1f} |' for name, spent in costs(run).items())]
    told = classifiers.of_classifiers(run.output, dataset.test['labels'], logits, dataset.class_names)
    figures.draw_curves(run.output / 'curves.png', records, 'How they learned')
    curves = reporting.Section('Learning curves', 'Means over seeds, and their range.', 'curves.png')
    return [curves, *told, reporting.Section('What each training cost', '\n'.join(lines))]


def costs(run: runs.Run) -> dict[str, float]:
    """The seconds that every training took, over all the times that it was taken up, by its name."""
    file = run.output / 'seconds.json'
    return json.loads(file.read_text()) if file.exists() else {}


def _train(run: runs.Run, plan: Plan, name: str, where: str, split: Any, taught_by: Any = None, **more: Any) -> runs.Trained:
    """Trains one stage, validated after each epoch, and notes what it cost."""
    stage, started = plan.stages[name], time.monotonic()
    # One evaluator for a network, so that each compiles once.
    evaluate = _evaluator(stage.network)
    validate = lambda variables: evaluate(variables, plan.dataset.validation)  # noqa: E731
    options = {'epochs': stage.epochs, 'validate': validate, 'augment': plan.augment}
    trained = run.fit(where, stage.problem, split, taught_by, **options, **more)
    if trained.resumed_from < stage.epochs * training.steps_per_epoch(split, run.settings.batch_size):
        spent = costs(run)
        spent[where] = spent.get(where, 0.0) + time.monotonic() - started
        parallel.on_first_host(lambda: write_whole(run.output / 'seconds.json', json.dumps(spent)), f'cost of {where}')
    return trained


_evaluator = functools.lru_cache(maxsize=16)(training.evaluator)


def _calibration_batches(inputs: Any, size: int) -> list[Any]:
    """The first batches of the training split."""
    return [inputs[i : i + size] for i in range(0, len(inputs) - size + 1, size)[:CALIBRATION_BATCHES]]


def _folder(output: pathlib.Path, name: str, seed: int) -> pathlib.Path:
    """Of a network to ship."""
    return output / 'networks' / (TEACHER if name == TEACHER else f'seed{seed}/{shipping.folder_name(name)}')
