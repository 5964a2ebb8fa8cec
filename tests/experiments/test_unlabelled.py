"""Students without labels, shrunk to seconds: what they are shown, and what the report says."""

import numpy as np
import pytest
from helpers import scenario

from experiments import shipping, unlabelled
from kdjax import data, export, models, networks

SHARES = (0.1, 1.0)
EXAMPLES = (115, 1150)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp('runs') / 'unlabelled'
    config = scenario.config(unlabelled, seeds=1, epochs=2, shares=SHARES, batch_size=35, output=str(output))
    methods = unlabelled.methods

    def few_methods(*students):
        # Nearly all the time goes into compiling; the others are made, but not trained.
        kept = ('labels', 'soft targets', 'autoencoder of outputs')
        return {name: method for name, method in methods(*students).items() if name in kept}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unlabelled, 'TEACHER', models.MLP((32, 32)))
        patch.setattr(unlabelled, 'STUDENT', models.MLP((8, 8)))
        patch.setattr(unlabelled, 'TEACHER_AUTOENCODER', models.MLP((32,)))
        patch.setattr(unlabelled, 'STUDENT_AUTOENCODER', models.MLP((8,)))
        patch.setattr(unlabelled, 'methods', few_methods)
        rows, trained = scenario.run(unlabelled, config)
    return output, rows, {name: run.split for name, run in trained.items()}


@pytest.fixture(scope='module')
def rows(finished):
    return finished[1]


def test_students_see_inputs_and_nothing_else(finished):
    shown = finished[2]
    students = [name for name in shown if 'teacher' not in name]
    assert len(students) == 3 * len(SHARES)
    for name in students:
        assert set(shown[name]) == ({'inputs', 'labels'} if '/labels/' in name else {'inputs'})


def test_a_share_is_all_that_a_student_sees(finished):
    shown = finished[2]
    train = unlabelled.flatten(data.load('digits', validation=0.2).train)['inputs']
    few, many = ({row.tobytes() for row in shown[f'seed0/soft-targets/{examples}']['inputs']} for examples in EXAMPLES)
    assert len(few) <= EXAMPLES[0]
    assert few < many == {row.tobytes() for row in train}
    assert all(len(split['inputs']) == len(train) for split in shown.values())


def test_transfer_sets_are_drawn_without_a_look_at_the_labels():
    train = {'inputs': np.arange(50.0)[:, None], 'labels': np.arange(50)}
    small, large = (unlabelled.transfer_set(train, examples, seed=3) for examples in (5, 20))
    assert set(small['labels']) < set(large['labels'])
    assert (len(set(small['labels'])), len(set(large['labels']))) == (5, 20)
    other = unlabelled.transfer_set({**train, 'labels': np.zeros(50)}, 20, seed=3)
    np.testing.assert_array_equal(large['inputs'], other['inputs'])
    assert not np.array_equal(large['inputs'], unlabelled.transfer_set(train, 20, seed=4)['inputs'])


def test_every_method_but_the_comparison_is_without_labels():
    network = networks.from_linen(models.MLP((8,), classes=2))
    made = unlabelled.methods(network, network)
    assert [name for name, method in made.items() if method.labelled] == ['labels']
    assert {name for name, method in made.items() if method.taught_by is None} == {'labels', 'autoencoder of inputs'}
    terms = {term.name for name, method in made.items() if name != 'labels' for term in method.objective.terms}
    assert terms == {'soft_targets', 'attention_distillation', 'diversity', 'reconstruction'}


def test_rows_hold_what_the_files_give(finished, rows):
    assert list(rows) == [
        'teacher: classifier',
        'teacher: autoencoder',
        'labels',
        'soft targets',
        'autoencoder of outputs',
    ]
    test = unlabelled.flatten(data.load('digits', validation=0.2).test)

    def logits(name, inputs):
        x = np.float64(inputs)
        params = export.load_weights(finished[0] / 'networks' / 'seed0' / shipping.file_name(name))['params']
        for layer in sorted(params.keys() - {'head'}):
            x = np.maximum(x @ np.float64(params[layer]['kernel']) + np.float64(params[layer]['bias']), 0)
        return x @ np.float64(params['head']['kernel']) + np.float64(params['head']['bias'])

    for examples in EXAMPLES:
        expected = np.mean(logits(f'soft targets {examples}', test['inputs']).argmax(-1) == test['labels'])
        assert rows['soft targets'][f'accuracy_{examples}_mean'] == pytest.approx(expected, abs=1e-6)
        rebuilt = logits(f'autoencoder of outputs {examples}', test['inputs'])
        row = rows['autoencoder of outputs']
        error = np.sqrt(np.mean(np.square(rebuilt - test['inputs'])))
        assert row[f'error_{examples}_mean'] == pytest.approx(error, rel=1e-4)
        classified = logits(f'teacher: classifier {EXAMPLES[-1]}', rebuilt).argmax(-1)
        assert row[f'accuracy_{examples}_mean'] == pytest.approx(np.mean(classified == test['labels']), abs=0.01)
    assert rows['soft targets']['accuracy_mean'] == rows['soft targets']['accuracy_1150_mean']
    text = (finished[0] / 'report.md').read_text()
    assert '| network | 115 inputs (%) | 1150 inputs (%) | error |' in text


@pytest.mark.parametrize(
    'changes,message',
    [
        ({'shares': (0.5, 0.1)}, r'--shares must rise from above 0 to at most 1, got \(0.5, 0.1\)'),
        ({'shares': (0.5, 1.5)}, '--shares must be from 0 to 1, got 1.5'),
        ({'shares': (0.0,)}, '--shares must rise'),
        ({'shares': ()}, '--shares must rise'),
        ({'epochs': 0}, '--epochs must be at least 1, got 0'),
    ],
)
def test_bad_flags_are_refused_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        unlabelled.main(scenario.config(unlabelled, output=str(tmp_path / 'run'), **changes))
    assert not (tmp_path / 'run').exists()
