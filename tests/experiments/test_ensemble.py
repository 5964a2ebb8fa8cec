"""Many teachers into one student, shrunk to seconds: who sees which labels, and who teaches whom."""

import numpy as np
import pytest
from helpers import scenario

from experiments import ensemble, settings, shipping
from kdjax import export, models, networks


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp('runs') / 'ensemble'
    config = scenario.config(
        ensemble, dataset='digits', examples=70, labels=20, teachers=3, seeds=1, epochs=1, batch_size=35, output=str(output)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ensemble, 'MEMBER', models.MLP((8,)))
        return config, *scenario.run(ensemble, config)


def labelled(split):
    return {image.tobytes() for image, label in zip(split['inputs'], split['labels'], strict=True) if label >= 0}


def test_teachers_see_their_own_labels_and_the_student_those_of_the_first(finished):
    _, rows, trained = finished
    assert list(rows) == ['one teacher', 'ensemble', 'student alone', 'student of one teacher', 'student of the ensemble']
    each = [labelled(trained[f'seed0/teacher{i}'].split) for i in range(3)]
    assert all(len(own) == 20 for own in each)
    assert len(set.union(*each)) > 40
    for name in ('student-of-one-teacher', 'student-of-the-ensemble'):
        split = trained[f'seed0/{name}'].split
        assert labelled(split) == each[0]
        assert np.sum(split['labels'] >= 0) == 20
        assert len(split['labels']) == 70
    assert labelled(trained['seed0/student-alone'].split) == each[0]


def test_the_ensemble_is_of_all_teachers_and_teaches(finished):
    config, rows, trained = finished
    teachers = [trained[f'seed0/teacher{i}'].variables for i in range(3)]
    assert scenario.equal(trained['seed0/student-of-the-ensemble'].teacher, networks.ensemble_variables(teachers))
    assert scenario.equal(trained['seed0/student-of-one-teacher'].teacher, teachers[0])
    assert trained['seed0/student-alone'].teacher is None
    assert len({trained[f'seed0/teacher{i}'].seed for i in range(3)}) == 3
    assert rows['ensemble']['parameters'] == 3 * rows['one teacher']['parameters']
    shipped = export.load_weights(f'{config.output}/networks/seed0/{shipping.file_name("student of the ensemble")}')
    assert scenario.equal(dict(shipped), trained['seed0/student-of-the-ensemble'].variables)


@pytest.mark.parametrize(
    'changes,message',
    [
        ({'examples': 2000}, '--examples must be between 1 and 1150, got 2000'),
        ({'examples': 70, 'labels': 71, 'batch_size': 35}, 'keep must be between 1 and 70'),
        ({'examples': 70, 'labels': 20}, 'fewer than one batch of 128'),
        ({'teachers': 0}, '--teachers must be at least 1, got 0'),
    ],
)
def test_bad_flags_are_refused_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        ensemble.main(scenario.config(ensemble, dataset='digits', output=str(tmp_path / 'run'), **changes))
    assert not (tmp_path / 'run').exists()


def test_a_part_of_a_data_set_is_the_same_in_every_run():
    parts = [settings.load(settings.Data(examples=50)) for _ in range(2)]
    assert scenario.equal(parts[0].train, parts[1].train)
    assert scenario.equal(parts[0].test, settings.load(settings.Data()).test)
    assert len(parts[0].train['labels']) == 50
