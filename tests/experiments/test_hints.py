"""Hints, shrunk to seconds: what the first stage trains, and what the second starts from."""

import jax
import numpy as np
import pytest
from helpers import scenario

from experiments import hints, shipping
from kdjax import models


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp('runs') / 'hints'
    config = scenario.config(hints, examples=70, seeds=1, epochs=1, batch_size=35, output=str(output))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hints, 'TEACHER', models.MLP((16, 16)))
        patch.setattr(hints, 'STUDENT', models.MLP((8,) * 4))
        patch.setattr(hints, 'GUIDED', 'Dropout_1')
        rows, trained = scenario.run(hints, config)
    return rows, {name.removeprefix('seed0/'): run for name, run in trained.items()}


def test_the_hint_trains_the_layers_up_to_the_guided_one(finished):
    _, trained = finished
    module = models.MLP((8,) * 4)
    # The run's key is split as `distillation` says: the student's is the first of three.
    before = module.lazy_init(jax.random.split(jax.random.key(0), 3)[0], jax.ShapeDtypeStruct((1, 8, 8, 1), np.float32))[
        'params'
    ]
    after = trained['hint'].variables['params']
    for name, layer in before.items():
        assert scenario.equal(jax.device_get(layer), after[name]) == (name not in ('hidden0', 'hidden1'))


def test_the_second_stage_starts_from_the_first_with_as_many_steps_in_all(finished):
    rows, trained = finished
    assert list(rows) == [hints.TAUGHT_BY, hints.ALONE, hints.SOFT, hints.HINTED, hints.HINTED_SOFT]
    first = trained['hint']
    for name in (hints.HINTED, hints.HINTED_SOFT):
        second = trained[shipping.folder_name(name)]
        assert scenario.equal(second.student, first.variables)
        assert scenario.equal(second.teacher, trained[hints.TAUGHT_BY].variables)
        assert first.epochs + second.epochs == trained[shipping.folder_name(hints.ALONE)].epochs
    assert trained[shipping.folder_name(hints.SOFT)].student is None


def test_the_regressor_is_not_shipped(finished):
    rows, _ = finished
    assert rows[hints.HINTED]['parameters'] == rows[hints.ALONE]['parameters']
