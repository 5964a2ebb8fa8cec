"""The CIFAR-10 pair, shrunk to seconds on images that stand in for CIFAR's."""

import json

import numpy as np
import pytest
from helpers import scenario

from experiments import cifar10
from kdjax import data, models, training

# The run below replaces them by smaller ones.
PAIR = cifar10.TEACHER, cifar10.STUDENT


def images(examples: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, examples).astype(np.int32)
    return {'inputs': rng.integers(0, 256, (examples, 8, 8, 3)).astype(np.uint8), 'labels': labels}


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """A run, the splits that its trainings saw, and its config."""
    output = tmp_path_factory.mktemp('runs') / 'cifar10'
    flags = {'examples': 32, 'teacher_epochs': 2, 'epochs': 1, 'batch_size': 16}
    config = scenario.config(cifar10, seeds=2, output=str(output), **flags)
    fit, seen = training.fit, []

    def remember(problem, split, taught_by, **more):
        seen.append((more['name'], more['epochs'], split, taught_by))
        return fit(problem, split, taught_by, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, 'load', lambda name, **_: data.Dataset(name, 10, images(48, 0), images(8, 1), images(16, 2)))
        patch.setattr(training, 'fit', remember)
        patch.setattr(cifar10, 'TEACHER', models.CNN((4,), (8,)))
        patch.setattr(cifar10, 'STUDENT', models.CNN((3,), (6,)))
        cifar10.main(config)
        yield output, seen, config


def test_report_has_the_pair_and_its_baseline(finished):
    output, _, _ = finished
    report = json.loads((output / 'report.json').read_text())
    assert [row['name'] for row in report['rows']] == ['teacher', 'student alone', 'distilled']
    teacher, *students = report['rows']
    assert (teacher['runs'], teacher['agreement_mean']) == (1, 1.0)
    assert all(row['runs'] == 2 and row['parameters'] < teacher['parameters'] for row in students)
    text = (output / 'report.md').read_text()
    assert 'Trained on 32 images, the one teacher for 2 epochs and every student for 1.' in text
    assert (output / 'figure.png').exists()


def test_all_networks_see_the_same_part_of_the_training_split(finished):
    _, seen, _ = finished
    assert [(name, epochs) for name, epochs, _, _ in seen] == [
        ('teacher', 2),
        ('seed0/alone', 1),
        ('seed1/alone', 1),
        ('seed0/distilled', 1),
        ('seed1/distilled', 1),
    ]
    full = images(48, 0)['inputs']
    for _, _, split, _ in seen:
        assert split is seen[0][2]
        assert len(split['labels']) == 32
        assert all(any(np.array_equal(image, one) for one in full) for image in split['inputs'])
    assert [taught_by is not None for *_, taught_by in seen] == [False, False, False, True, True]


def test_a_finished_run_is_left_alone(finished, capsys):
    output, seen, config = finished
    before, trainings = (output / 'report.json').stat().st_mtime_ns, len(seen)
    cifar10.main(config)
    assert 'finished already' in capsys.readouterr().out
    assert (len(seen), (output / 'report.json').stat().st_mtime_ns) == (trainings, before)


def test_the_recipe_is_that_of_the_pair():
    teacher, student = PAIR
    assert (teacher.channels, teacher.hidden) == ((64, 128), (512,))
    assert (student.channels, student.hidden) == ((32, 64), (256,))
    assert (cifar10.TEMPERATURE, cifar10.ALPHA) == (3.0, 0.5)
