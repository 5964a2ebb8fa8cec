"""Two tasks, shrunk to seconds: how pairs are made, what each student learns from, and what is measured."""

import json

import numpy as np
import pytest
from helpers import scenario

from experiments import multitask, settings, shipping
from kdjax import data, models, networks


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp('runs') / 'multitask'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multitask, 'TEACHER_WIDTH', 8)
        patch.setattr(multitask, 'STUDENT_WIDTH', 4)
        # A batch that no number of devices divides compiles for one, which is faster.
        multitask.main(scenario.config(multitask, seeds=1, epochs=1, pairs=256, batch_size=31, output=str(output)))
    return output


def test_pairs_hold_both_images_of_their_own_split():
    split = {
        'inputs': np.random.default_rng(0).integers(0, 256, (20, 4, 6, 1), np.uint8),
        'labels': np.arange(20, dtype=np.int32),
    }
    pairs = multitask.overlay(split, 7, seed=3)
    assert pairs['inputs'].shape == (7, 6, 9, 1)
    assert pairs['inputs'].dtype == np.uint8
    for image, (left, right) in zip(pairs['inputs'], pairs['labels'], strict=True):
        one, other = split['inputs'][left], split['inputs'][right]
        np.testing.assert_array_equal(image[:2], np.pad(one[:2], ((0, 0), (0, 3), (0, 0))))
        np.testing.assert_array_equal(image[4:], np.pad(other[2:], ((0, 0), (3, 0), (0, 0))))
        np.testing.assert_array_equal(image[2:4, 3:6], np.maximum(one[2:, 3:], other[:2, :3]))
        np.testing.assert_array_equal(image[:2, 6:], 0)


def test_each_student_learns_from_what_its_name_says(finished):
    lines = [json.loads(line) for line in (finished / 'metrics.jsonl').read_text().splitlines()]
    terms = {}
    for line in lines:
        terms.setdefault(line['run'], set()).update({'hard_labels', 'soft_targets'} & line.keys())
    constant = (multitask.TOGETHER, multitask.MIXED, multitask.SOFT)
    assert {name: terms[f'seed0/{shipping.folder_name(name)}'] for name in constant} == {
        multitask.TOGETHER: {'hard_labels'},
        multitask.MIXED: {'hard_labels', 'soft_targets'},
        multitask.SOFT: {'soft_targets'},
    }
    annealed = [line for line in lines if line['run'] == f'seed0/{shipping.folder_name(multitask.ANNEALED)}']
    weights = [line['soft_targets/weight'] for line in annealed]
    assert weights == sorted(weights, reverse=True)
    assert weights[0] == pytest.approx(1.0)
    assert weights[-1] == pytest.approx(1 / len(weights))
    assert [line['hard_labels/weight'] for line in annealed] == pytest.approx([1 - weight for weight in weights])


def test_accuracy_is_that_of_both_tasks_of_the_shipped_networks(finished):
    rows = {row['name']: row for row in json.loads((finished / 'report.json').read_text())['rows']}
    assert list(rows) == [
        multitask.TEACHERS,
        multitask.APART,
        multitask.TOGETHER,
        multitask.MIXED,
        multitask.ANNEALED,
        multitask.SOFT,
    ]
    dataset = settings.load(settings.Data())
    train, test = multitask.overlay(dataset.train, 256, seed=0), multitask.overlay(dataset.test, 128, seed=1)
    rescale = data.normalize(*data.channel_statistics(train['inputs']))
    _, variables = shipping.shipped(finished, multitask.MIXED, 0)
    network = networks.preprocess(networks.from_linen(models.MLP((4,), 20)), rescale)
    predicted = np.asarray(network.apply(variables, test['inputs'])[0].logits).reshape(-1, 2, 10).argmax(-1)
    correct = predicted == test['labels']
    row = rows[multitask.MIXED]
    assert row['left_mean'] == pytest.approx(correct[:, 0].mean(), abs=1e-6)
    assert row['right_mean'] == pytest.approx(correct[:, 1].mean(), abs=1e-6)
    assert row['accuracy_mean'] == pytest.approx(correct.mean(), abs=1e-6)
    assert (finished / 'figure.png').stat().st_size > 1000
