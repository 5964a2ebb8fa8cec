"""Two label sets into one student, shrunk to seconds: no label reaches it, and no teacher sees the other's images."""

import numpy as np
import pytest
from helpers import scenario

from experiments import label_union
from kdjax import data, models, networks

LOAD = data.load


def two_sets(name, **options):
    """Digits, and their negatives."""
    digits = LOAD('digits', **options)

    def negative(split):
        return {**split, 'inputs': 255 - split['inputs']}

    if name == 'negatives':
        splits = {split: negative(getattr(digits, split)) for split in ('train', 'validation', 'test')}
        return digits._replace(name=name, **splits)
    return digits


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp('runs') / 'label_union'
    config = scenario.config(
        label_union, dataset='digits', second='negatives', examples=35, seeds=1, epochs=1, batch_size=35, output=str(output)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(label_union, 'TEACHER', models.MLP((8,), dropout=0.3))
        patch.setattr(label_union, 'STUDENT', models.MLP((8,)))
        patch.setattr(data, 'load', two_sets)
        return scenario.run(label_union, config)


def test_students_see_images_of_both_and_no_label(finished):
    rows, trained = finished
    students = [name for name in rows if name.startswith('student of')]
    assert len(students) == 3
    joined = networks.ensemble_variables([trained[f'seed0/teacher-of-{name}'].variables for name in ('digits', 'negatives')])
    for name in students:
        run = trained[f'seed0/{label_union.shipping.folder_name(name)}']
        assert set(run.split) == {'inputs'}
        assert len(run.split['inputs']) == 70
        assert scenario.equal(run.teacher, joined)


def test_teachers_see_their_own_data_set(finished):
    _, trained = finished
    digits, negatives = (trained[f'seed0/teacher-of-{name}'].split for name in ('digits', 'negatives'))
    np.testing.assert_array_equal(digits['inputs'], 255 - negatives['inputs'])
    for split in (digits, negatives):
        assert split['labels'].max() < 10
    both = trained['seed0/student-with-all-labels'].split
    np.testing.assert_array_equal(both['labels'], np.concatenate([digits['labels'], 10 + negatives['labels']]))


def test_to_know_the_data_set_never_hurts(finished):
    rows, _ = finished
    for row in rows.values():
        assert row['accuracy_where_the_data_set_is_known_mean'] >= row['accuracy_mean']
    # Both unions have the same teachers, whose own classes neither average reorders.
    known = [rows[name]['accuracy_where_the_data_set_is_known_mean'] for name in label_union.UNIONS.values()]
    assert known[0] == pytest.approx(known[1], abs=1e-6)


def test_images_of_different_sizes_are_refused():
    digits = LOAD('digits')
    wide = digits._replace(name='wide', train={**digits.train, 'inputs': np.zeros((1150, 9, 9, 1), np.uint8)})
    with pytest.raises(ValueError, match=r'digits and wide have images of different sizes, \(8, 8, 1\) and \(9, 9, 1\)'):
        label_union.unite(digits, wide)
