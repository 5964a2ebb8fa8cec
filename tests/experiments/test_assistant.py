"""Teacher, assistant and student, shrunk to seconds: who teaches whom."""

import pytest
from helpers import scenario

from experiments import assistant, shipping
from kdjax import models


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp('runs') / 'assistant'
    config = scenario.config(assistant, examples=70, seeds=1, epochs=1, batch_size=35, output=str(output))
    with pytest.MonkeyPatch.context() as patch:
        for name, width in {'TEACHER': 16, 'ASSISTANT': 8, 'STUDENT': 4}.items():
            patch.setattr(assistant, name, models.MLP((width,)))
        return scenario.run(assistant, config)


@pytest.mark.parametrize(
    'student,teacher',
    [
        (assistant.BOSS, None),
        (assistant.UNTAUGHT, None),
        (assistant.ALONE, None),
        (assistant.TAUGHT, assistant.BOSS),
        (assistant.DIRECT, assistant.BOSS),
        (assistant.ASSISTED, assistant.TAUGHT),
        (assistant.OF_UNTAUGHT, assistant.UNTAUGHT),
    ],
)
def test_each_learns_from_whom_its_name_says(finished, student, teacher):
    _, trained = finished
    learned = trained[f'seed0/{shipping.folder_name(student)}']
    if teacher is None:
        assert learned.teacher is None
    else:
        assert scenario.equal(learned.teacher, trained[f'seed0/{shipping.folder_name(teacher)}'].variables)


def test_sizes_fall_from_teacher_to_assistant_to_student(finished):
    rows, _ = finished
    assert len(rows) == 7
    sizes = {name: row['parameters'] for name, row in rows.items()}
    assert sizes[assistant.BOSS] > sizes[assistant.TAUGHT] == sizes[assistant.UNTAUGHT] > sizes[assistant.ALONE]
    assert {sizes[name] for name in (assistant.DIRECT, assistant.ASSISTED, assistant.OF_UNTAUGHT)} == {sizes[assistant.ALONE]}
