"""The strategies, shrunk to seconds: starts, priors, the bound of expectation maximization, and the limit that is kept."""

import json
import math

import jax
import numpy as np
import pytest
from helpers import scenario

from experiments import shipping, strategies
from kdjax import data, export, models

NAMES = [
    'teacher',
    'start',
    'from scratch',
    'copied',
    'prior',
    'prior, warmed up',
    'size, constrained',
    'EM, student',
    'EM, teacher',
]


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp('runs') / 'strategies'
    config = scenario.config(strategies, seeds=1, epochs=12, labels=60, batch_size=115, output=str(output))
    ways = strategies.strategies

    def few_ways(steps):
        # Nearly all the time goes into compiling.
        return {name: way for name, way in ways(steps).items() if name != 'size penalty'}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strategies, 'strategies', few_ways)
        patch.setattr(strategies, 'MODULE', models.MLP((16, 12)))
        patch.setattr(strategies, 'LAST', 'hidden1')
        patch.setattr(strategies, 'MEMBERS', 2)
        patch.setattr(strategies, 'LEARNING_RATE', 2e-2)
        patch.setattr(strategies, 'PRECISION', 0.1)
        patch.setattr(strategies, 'SIZE', 1e-2)
        patch.setattr(strategies, 'LIMIT', 0.5)
        patch.setattr(strategies, 'TOLERANCE', 1e-2)
        found, trained = scenario.run(strategies, config)
    return output, found, trained


@pytest.fixture(scope='module')
def rows(finished):
    return finished[1]


def params(output, name):
    return export.load_weights(output / 'networks' / 'seed0' / shipping.file_name(name))['params']


def distance(output, name):
    one, other = (jax.tree.leaves(params(output, x)) for x in (name, 'start'))
    return np.sqrt(sum(np.sum(np.square(np.float64(a) - np.float64(b))) for a, b in zip(one, other, strict=True)))


def test_students_see_no_labels_and_the_source_no_more_than_it_has(finished):
    for name, fitted in finished[2].items():
        if 'member' in name:
            assert len(np.unique(fitted.split['inputs'], axis=0)) <= 60
        else:
            assert set(fitted.split) == {'inputs'}


def test_a_copied_student_starts_from_the_parameters_of_the_teacher(finished):
    output, _, trained = finished
    start = params(output, 'start')
    jax.tree.map(np.testing.assert_array_equal, start, params(output, 'teacher')['0'])
    for name, way in strategies.strategies(1).items():
        if name == 'size penalty':
            continue
        given = trained[f'seed0/{shipping.folder_name(name)}'].student
        if way.copied:
            jax.tree.map(np.testing.assert_array_equal, given['params'], start)
        else:
            assert given is None
            assert name == 'from scratch'


def test_the_prior_keeps_the_student_near_its_start(finished):
    output = finished[0]
    free, held, warmed = (distance(output, name) for name in ('copied', 'prior', 'prior, warmed up'))
    assert 0 < held < 0.8 * free
    assert 0 < warmed < 0.8 * free
    assert held != warmed


def test_the_bound_does_not_go_down(finished, rows):
    (bounds,) = json.loads((finished[0] / 'bounds.json').read_text())
    assert len(bounds) >= 4
    assert np.diff(bounds).min() > -1e-5
    assert bounds[-1] > bounds[0] + 0.01
    assert bounds[-1] - bounds[-3] < 1e-2
    assert distance(finished[0], 'EM, student') > 0


def test_the_limit_is_kept_by_a_smaller_network(rows):
    loss, size = ({name: row[f'{key}_mean'] for name, row in rows.items()} for key in ('soft_target_loss', 'size'))
    assert loss['size, constrained'] <= 0.5 < loss['start']
    assert size['size, constrained'] < 0.5 * min(size['copied'], size['start'])


def test_rows_hold_what_the_files_give(finished, rows):
    assert list(rows) == NAMES
    test = data.load('digits', validation=0.2).test
    for name in NAMES[1:]:
        own = params(finished[0], name)
        x = test['inputs'].reshape(len(test['inputs']), -1) / 255.0
        for layer in ('hidden0', 'hidden1'):
            before = np.maximum(x, 0) @ np.float64(own[layer]['kernel']) + np.float64(own[layer]['bias'])
            x = before
        logits = np.maximum(x, 0) @ np.float64(own['head']['kernel']) + np.float64(own['head']['bias'])
        assert rows[name]['accuracy_mean'] == pytest.approx(np.mean(logits.argmax(-1) == test['labels']), abs=3e-3)
        assert rows[name]['size_mean'] == pytest.approx(np.mean(np.sum(np.square(before), axis=-1)), rel=1e-4)
        assert math.isfinite(rows[name]['latency_ms'])
    assert rows['teacher']['soft_target_loss_mean'] == pytest.approx(0.0, abs=1e-5)
    assert 'the least change of its bound' in (finished[0] / 'report.md').read_text()
    assert (finished[0] / 'figure.png').stat().st_size > 1000


@pytest.mark.parametrize('changes', [{'labels': 0}, {'epochs': 0}, {'seeds': 0}, {'batch_size': 0}])
def test_bad_flags_are_refused_before_anything_is_written(tmp_path, changes):
    (name,) = changes
    with pytest.raises(ValueError, match=f'--{name.replace("_", "-")} must be at least 1, got 0'):
        strategies.main(scenario.config(strategies, output=str(tmp_path / 'run'), **changes))
    assert not (tmp_path / 'run').exists()
