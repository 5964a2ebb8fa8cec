"""Schedules of weight and temperature, shrunk to seconds: that every course goes where its name says."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import scenario

from experiments import schedules, settings
from kdjax import networks
from kdjax.metrics import compute


@pytest.fixture(scope='module')
def report(tmp_path_factory):
    output = tmp_path_factory.mktemp('runs') / 'schedules'
    # A batch that no number of devices divides compiles for one, which is faster.
    schedules.main(scenario.config(schedules, seeds=2, epochs=1, batch_size=79, output=str(output)))
    return json.loads((output / 'report.json').read_text()), output


def test_every_course_has_a_row(report):
    results, output = report
    assert [row['name'] for row in results['rows']] == ['teacher', *schedules.COURSES]
    assert all(row['runs'] == 2 and 0 <= row['accuracy_mean'] <= 1 for row in results['rows'])
    assert 'A weight that falls from 1 to 0 changes' in (output / 'report.md').read_text()
    assert (output / 'figure.png').stat().st_size > 1000


def test_a_course_moves_in_a_line_and_its_two_weights_are_one_together():
    outputs, batch = networks.Outputs(jnp.ones((4, 3))), {'labels': jnp.zeros(4, jnp.int32)}
    course = schedules.Course((1.0, 0.25), (8.0, 2.0))
    objective = schedules.objective(course, 11)
    params, state = objective.init(jax.random.key(0), outputs, outputs, batch)
    for step in (0, 5, 10):
        _, metrics, _ = objective.apply(params, state, outputs, outputs, batch, step=jnp.int32(step))
        found = compute(metrics)
        assert found['soft_targets/weight'] == pytest.approx(1.0 - 0.75 * step / 10)
        assert found['soft_targets/temperature'] == pytest.approx(8.0 - 6.0 * step / 10)
        assert found['soft_targets/weight'] + found['hard_labels/weight'] == pytest.approx(1.0)


def test_schedules_are_compared_with_constants_of_their_mean():
    for course, constant in ((schedules.FALLING, schedules.CONSTANT), (schedules.COOLING, schedules.WARM)):
        for moving, still in zip(schedules.COURSES[course], schedules.COURSES[constant], strict=True):
            assert np.mean(moving) == np.mean(still)
            assert still[0] == still[1]


def test_students_start_alike_and_read_only_what_their_course_weighs():
    train = settings.load(settings.Data(examples=32)).train
    network = networks.preprocess(networks.from_linen(schedules.models.MLP((4,))), lambda x: x.astype(jnp.float32) / 255)
    problem = schedules.students(settings.Training(), network, network, 5)
    start = schedules.same_start(network, train, 0)
    names = list(schedules.COURSES)

    def params_after(teacher_key, labels):
        state = problem.init(jax.random.key(0), train, student_variables=start)
        teacher_variables = network.init(jax.random.key(teacher_key), train['inputs'])
        state, _ = problem.step(state, teacher_variables, {**train, 'labels': labels})
        return np.concatenate([np.asarray(x).reshape(len(names), -1) for x in jax.tree.leaves(state.params)], axis=1)

    for leaf in jax.tree.leaves(start):
        np.testing.assert_array_equal(leaf, jnp.broadcast_to(leaf[:1], leaf.shape))
    one = params_after(1, train['labels'])
    another_teacher, other_labels = params_after(2, train['labels']), params_after(1, (train['labels'] + 1) % 10)
    follows_teacher = {name for name, same in zip(names, (one == another_teacher).all(1), strict=True) if not same}
    reads_labels = {name for name, same in zip(names, (one == other_labels).all(1), strict=True) if not same}
    # In the first step weights stand where their course begins.
    assert follows_teacher == {name for name in names if schedules.COURSES[name].weight[0] > 0}
    assert reads_labels == {name for name in names if schedules.COURSES[name].weight[0] < 1}
