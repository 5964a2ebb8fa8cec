"""Generations, shrunk to seconds: each learns from the one before it and starts afresh."""

import itertools

import pytest
from helpers import scenario

from experiments import born_again
from kdjax import models


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp('runs') / 'born_again'
    config = scenario.config(
        born_again, dataset='digits', examples=70, generations=2, seeds=1, epochs=1, batch_size=35, output=str(output)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(born_again, 'MODULE', models.MLP((8,)))
        return scenario.run(born_again, config)


def test_each_generation_learns_from_its_parent_and_starts_afresh(finished):
    rows, trained = finished
    assert list(rows) == [*(f'generation {i}' for i in range(3)), born_again.GENERATIONS, born_again.STRANGERS]
    line = [trained[f'seed0/generation-{i}'] for i in range(3)]
    assert line[0].teacher is None
    for parent, child in itertools.pairwise(line):
        assert scenario.equal(child.teacher, parent.variables)
        assert not scenario.equal(child.variables, parent.variables)
    assert all(run.student is None for run in line)
    assert len({run.seed for run in line}) == 3


def test_ensembles_are_of_as_many_networks(finished):
    rows, trained = finished
    assert all(rows[name]['parameters'] == 3 * rows['generation 0']['parameters'] for name in list(rows)[3:])
    assert all(trained[f'seed0/alone-{i}'].teacher is None for i in (1, 2))
    # What tells a stranger from the generation beside it is the teacher alone.
    assert all(trained[f'seed0/alone-{i}'].seed == trained[f'seed0/generation-{i}'].seed for i in (1, 2))
