"""The class that the student never saw, shrunk to seconds: what the student is shown, and what the shift changes."""

import numpy as np
import pytest
from helpers import scenario

from experiments import missing_class, shipping
from kdjax import data, export, models

MISSING = 3
NAMES = ['teacher', 'distilled, all classes', 'alone', 'alone + bias', 'distilled', 'distilled + bias']


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp('runs') / 'missing_class'
    config = scenario.config(
        missing_class, dataset='digits', seeds=1, epochs=6, examples=800, batch_size=35, output=str(output)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(missing_class, 'TEACHER', models.MLP((64, 64), dropout=0.1))
        patch.setattr(missing_class, 'STUDENT', models.MLP((32, 32)))
        patch.setattr(missing_class, 'LEARNING_RATE', 5e-3)
        return output, *scenario.run(missing_class, config)


@pytest.fixture(scope='module')
def rows(finished):
    return finished[1]


def weights(output, name):
    return export.load_weights(output / 'networks' / 'seed0' / shipping.file_name(name))['params']


def logits(params, inputs):
    x = inputs.reshape(len(inputs), -1) / 255.0
    for layer in ('hidden0', 'hidden1'):
        x = np.maximum(x @ np.float64(params[layer]['kernel']) + np.float64(params[layer]['bias']), 0)
    return x @ np.float64(params['head']['kernel']) + np.float64(params['head']['bias'])


def test_the_student_is_never_shown_the_class(finished):
    shown = {name: run.split for name, run in finished[2].items()}
    assert sorted(shown) == ['seed0/alone', 'seed0/distilled', 'seed0/distilled-all-classes', 'seed0/teacher']
    everything = shown['seed0/teacher']
    assert len(everything['labels']) == 800
    for name in ('alone', 'distilled'):
        split = shown[f'seed0/{name}']
        np.testing.assert_array_equal(np.unique(split['labels']), [x for x in range(10) if x != MISSING])
        kept = everything['labels'] != MISSING
        np.testing.assert_array_equal(split['inputs'], everything['inputs'][kept])


def test_the_shift_changes_one_number(finished, rows):
    for name in ('alone', 'distilled'):
        before, after = (weights(finished[0], x) for x in (name, name + missing_class.SHIFTED))
        change = np.float64(after['head']['bias']) - np.float64(before['head']['bias'])
        expected = np.where(np.arange(10) == MISSING, rows[name + missing_class.SHIFTED]['shift_mean'], 0.0)
        np.testing.assert_allclose(change, expected, atol=1e-5)
        np.testing.assert_array_equal(before['head']['kernel'], after['head']['kernel'])
        for layer in ('hidden0', 'hidden1'):
            np.testing.assert_array_equal(before[layer]['kernel'], after[layer]['kernel'])
    assert rows['distilled' + missing_class.SHIFTED]['shift_mean'] > 0


def test_the_shift_is_the_best_on_the_validation_split(finished):
    validation = data.load('digits', validation=0.2).validation
    z = logits(weights(finished[0], 'distilled'), validation['inputs'])

    def right(by):
        return np.sum((z + np.where(np.arange(10) == MISSING, by, 0.0)).argmax(-1) == validation['labels'])

    # Predictions change where the class draws level with the best of the others, so one shift between each two such places.
    level = np.sort(np.delete(z, MISSING, axis=1).max(-1) - z[:, MISSING])
    tried = [level[0] - 1, *(level[:-1] + level[1:]) / 2, level[-1] + 1]
    shifted = logits(weights(finished[0], 'distilled + bias'), validation['inputs'])
    assert np.sum(shifted.argmax(-1) == validation['labels']) == max(map(right, tried))


def test_rows_hold_the_accuracies_of_the_files(finished, rows):
    assert list(rows) == NAMES
    test = data.load('digits', validation=0.2).test
    threes = test['labels'] == MISSING
    for name, row in rows.items():
        right = logits(weights(finished[0], name), test['inputs']).argmax(-1) == test['labels']
        assert row['accuracy_mean'] == pytest.approx(right.mean(), abs=1e-6)
        assert row['missing_class_(%)_mean'] == pytest.approx(100 * right[threes].mean(), abs=1e-4)
    assert rows['alone']['missing_class_(%)_mean'] == 0
    shifted, before = rows['distilled + bias'], rows['distilled']
    assert shifted['missing_class_(%)_mean'] > before['missing_class_(%)_mean']
    assert 'The student never saw a 3.' in (finished[0] / 'report.md').read_text()


@pytest.mark.parametrize(
    'changes,message',
    [
        ({'missing': 10}, '--missing must be a class from 0 to 9, got 10'),
        ({'examples': 5000}, '--examples must be between 1 and 1150, got 5000'),
        ({'seeds': 0}, '--seeds must be at least 1, got 0'),
    ],
)
def test_bad_flags_are_refused_before_anything_is_written(tmp_path, changes, message):
    config = {'dataset': 'digits', 'examples': 800, **changes}
    with pytest.raises(ValueError, match=message):
        missing_class.main(scenario.config(missing_class, output=str(tmp_path / 'run'), **config))
    assert not (tmp_path / 'run').exists()
