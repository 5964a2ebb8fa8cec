"""Networks that learn together, shrunk to seconds."""

import pytest
from helpers import scenario

from experiments import mutual, shipping
from kdjax import export, models, networks


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp('runs') / 'mutual'
    config = scenario.config(mutual, dataset='digits', examples=70, seeds=1, epochs=1, batch_size=35, output=str(output))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mutual, 'STUDENT', models.MLP((8,)))
        patch.setattr(mutual, 'TEACHER', models.MLP((16,)))
        return config, *scenario.run(mutual, config)


def test_nobody_teaches_but_the_teacher_trained_before(finished):
    _, rows, trained = finished
    assert len(rows) == 7
    distilled = trained[f'seed0/{shipping.folder_name(mutual.DISTILLED)}']
    assert scenario.equal(distilled.teacher, trained[f'seed0/{shipping.folder_name(mutual.BEFORE)}'].variables)
    assert all(run.teacher is None for run in trained.values() if run is not distilled)
    assert len({run.epochs for run in trained.values()}) == 1


def test_what_is_shipped_are_the_members(finished):
    config, rows, trained = finished
    for name, run, member in (
        (mutual.PEER, 'mutual', 0),
        (mutual.OTHER, 'mutual', 1),
        (mutual.JOINT_TEACHER, 'joint', 0),
        (mutual.JOINT, 'joint', 1),
    ):
        shipped = export.load_weights(f'{config.output}/networks/seed0/{shipping.file_name(name)}')
        assert scenario.equal(dict(shipped), networks.member_variables(trained[f'seed0/{run}'].variables, member))
    assert rows[mutual.PEER]['parameters'] == rows[mutual.JOINT]['parameters'] == rows[mutual.ALONE]['parameters']
    assert rows[mutual.JOINT_TEACHER]['parameters'] == rows[mutual.BEFORE]['parameters']
