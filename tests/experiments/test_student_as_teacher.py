"""Teachers of another family, shrunk to seconds: who teaches whom."""

import pytest
from helpers import scenario

from experiments import shipping, student_as_teacher
from kdjax import models


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp('runs') / 'student_as_teacher'
    config = scenario.config(student_as_teacher, examples=70, seeds=1, epochs=2, batch_size=35, output=str(output))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(student_as_teacher, 'LARGE', models.CNN((4,), (16,)))
        patch.setattr(student_as_teacher, 'SMALL', models.MLP((8,)))
        return scenario.run(student_as_teacher, config)


@pytest.mark.parametrize(
    'student,teacher',
    [
        (student_as_teacher.SMALL_OF_LARGE, student_as_teacher.LARGE_ALONE),
        (student_as_teacher.LARGE_OF_SMALL, student_as_teacher.SMALL_ALONE),
        (student_as_teacher.LARGE_OF_POOR, student_as_teacher.POOR),
        (student_as_teacher.SMOOTHED, None),
    ],
)
def test_each_learns_from_whom_its_name_says(finished, student, teacher):
    rows, trained = finished
    learned = trained[f'seed0/{shipping.folder_name(student)}']
    if teacher is None:
        assert learned.teacher is None
    else:
        assert scenario.equal(learned.teacher, trained[f'seed0/{shipping.folder_name(teacher)}'].variables)
        families = [set(tree['params']) for tree in (learned.teacher, learned.variables)]
        assert families[0] != families[1]
    alone = student_as_teacher.SMALL_ALONE if student.startswith('small') else student_as_teacher.LARGE_ALONE
    assert rows[student]['parameters'] == rows[alone]['parameters']


def test_the_bad_teacher_had_one_epoch(finished):
    _, trained = finished
    epochs = {name: run.epochs for name, run in trained.items()}
    assert epochs.pop(f'seed0/{shipping.folder_name(student_as_teacher.POOR)}') == 1
    assert set(epochs.values()) == {2}
