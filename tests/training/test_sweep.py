"""A sweep: every student is what it would be alone, and what they share is computed once."""

from collections.abc import Iterator
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdjax import metrics, networks, objectives, training

STUDENTS = 3
NORMAL = nn.initializers.normal(0.5)
ROWS = {
    'temperature': jnp.array([1.0, 2.0, 8.0]),
    'weight': jnp.array([0.0, 0.5, 2.0]),
    'rate': jnp.array([0.1, 0.05, 0.2]),
}
RNG = np.random.default_rng(0)
BATCH = {
    'inputs': jnp.asarray(RNG.normal(size=(8, 4)), jnp.float32),
    'labels': jnp.asarray(RNG.integers(0, 3, 8), jnp.int32),
}


class Small(nn.Module):
    """Batch norm, dropout and a head: everything that has state or draws noise."""

    width: int

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(self.width, kernel_init=NORMAL, name='hidden')(x)
        x = nn.tanh(nn.BatchNorm(use_running_average=not train, momentum=0.9, name='norm')(x))
        return nn.Dense(3, kernel_init=NORMAL, name='head')(nn.Dropout(0.25, deterministic=not train)(x))


STUDENT, TEACHER = (networks.from_linen(Small(width), features='norm') for width in (5, 13))


def make(row):
    """A student with a connector, whose temperature, weight and learning rate are the row's."""
    objective = objectives.combine(
        hard=objectives.hard_labels(),
        soft=row['weight'] * objectives.soft_targets(temperature=row['temperature']),
        hint=optax.linear_schedule(1.0, 0.5, 4) * objectives.hint('norm', 'norm'),
    )
    # Not Adam, which divides by the root of tiny second moments and so amplifies rounding.
    optimizer, helper = optax.sgd(row['rate'], momentum=0.9), optax.sgd(0.1)
    return training.distillation(STUDENT, TEACHER, objective, optimizer, objective_optimizer=helper)


@pytest.fixture(scope='module')
def students():
    """The sweep; its init is jitted, or it would compile every operation of its own in every test."""
    swept = training.sweep(make, ROWS)
    return swept._replace(init=jax.jit(swept.init))


@pytest.fixture(scope='module')
def teacher_variables():
    return jax.jit(TEACHER.init)(jax.random.key(7), BATCH['inputs'])


def row_of(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


def assert_is_row(state, i, alone):
    """The student i of a sweep is this one: parameters, statistics, optimizer, connector and all."""
    assert state.step == alone.step
    ours = row_of(state._replace(step=jnp.zeros(STUDENTS), key=jnp.zeros(STUDENTS)), i)
    chex.assert_trees_all_close(ours, alone._replace(step=jnp.zeros(()), key=jnp.zeros(())), rtol=1e-5, atol=1e-5)


def test_each_student_is_the_one_that_is_trained_alone(students, teacher_variables):
    """From its own split of the key, with the noise that all share; rows of a weight of 0 too."""
    key = jax.random.key(0)
    state = students.init(key, BATCH)
    start, run_key = jax.device_get(state._replace(key=0)), jnp.copy(state.key)
    for _ in range(4):
        state, measured = students.step(state, teacher_variables, BATCH)

    begin = jax.jit(lambda row, key: make(row).init(key, BATCH))
    alone_step = jax.jit(lambda row, alone: make(row).step(alone, teacher_variables, BATCH))
    for i, own_key in enumerate(jax.random.split(key, STUDENTS)):
        alone = begin(row_of(ROWS, i), own_key)
        assert i > 0 or alone.key == run_key
        alone = alone._replace(key=run_key)
        assert_is_row(start._replace(key=run_key), i, alone)
        for _ in range(4):
            alone, alone_measured = alone_step(row_of(ROWS, i), alone)
        assert_is_row(state, i, alone)
        chex.assert_trees_all_close(row_of(measured, i), alone_measured, rtol=1e-5, atol=1e-5)


def test_all_but_the_step_and_the_key_has_an_axis_of_students(students, teacher_variables):
    state, measured = students.step(students.init(jax.random.key(0), BATCH), teacher_variables, BATCH)
    assert state.step.shape == state.key.shape == ()
    for leaf in jax.tree.leaves((state._replace(step=None, key=None), measured)):
        assert leaf.shape[0] == STUDENTS
    assert state.params['head']['kernel'].shape == (STUDENTS, 5, 3)
    np.testing.assert_allclose(measured['soft/weighted'].total, ROWS['weight'] * measured['soft'].total, rtol=1e-6)


def products(jaxpr: Any) -> Iterator[tuple]:
    """The shapes that matrix products take, of all programs within a program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == 'dot_general':
            yield tuple(x.aval.shape for x in equation.invars)
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr')):
            inner = getattr(inner, 'jaxpr', inner)
            if hasattr(inner, 'eqns'):
                yield from products(inner)


def test_the_teacher_runs_once_for_all_students(students, teacher_variables):
    """Its products, whose width of 13 no weight of a student has, have no axis of students."""
    state = students.init(jax.random.key(0), BATCH)
    shapes = list(products(jax.make_jaxpr(students.step)(state, teacher_variables, BATCH).jaxpr))
    assert [pair for pair in shapes if (4, 13) in pair] == [((8, 4), (4, 13))]
    assert [pair for pair in shapes if (13, 3) in pair] == [((8, 13), (13, 3))]
    # The students' own are batched.
    assert any((STUDENTS, 4, 5) in pair for pair in shapes)


def test_students_can_start_from_given_variables(students, teacher_variables):
    """Which have the axis of students, and survive donation."""
    given = jax.jit(jax.vmap(lambda key: STUDENT.init(key, BATCH['inputs'])))(jax.random.split(jax.random.key(3), STUDENTS))
    state = students.init(jax.random.key(0), BATCH, student_variables=given)
    chex.assert_trees_all_equal(state.variables, given)
    students.step(state, teacher_variables, BATCH)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(given))


def linear(row):
    """A linear student with all that its row says."""
    network = networks.from_linen(nn.Dense(3))
    objective = row['weight'] * objectives.soft_targets(temperature=row['temperature'])
    return training.distillation(network, network, objective, optax.sgd(row['rate']))


def test_equal_rows_are_seeds():
    """Which begin from parameters of their own."""
    state = training.sweep(linear, jax.tree.map(lambda x: x[:1].repeat(2), ROWS)).init(jax.random.key(0), BATCH)
    assert not np.any(state.params['kernel'][0] == state.params['kernel'][1])


def test_it_goes_through_an_epoch(key):
    """All students see the batches that a run alone with their key sees; a scan of steps is part of it."""
    students = training.sweep(linear, ROWS)
    teacher = networks.from_linen(nn.Dense(3)).init(jax.random.key(1), BATCH['inputs'])
    state = students.init(key, BATCH)
    alone = row_of(state._replace(step=jnp.zeros(STUDENTS, jnp.int32), key=None), 2)._replace(key=jnp.copy(state.key))
    epochs = [
        training.in_memory_epoch(each, batch_size=2, steps_per_dispatch=2) for each in (students, linear(row_of(ROWS, 2)))
    ]
    for _ in range(2):
        state, measured = epochs[0](state, teacher, BATCH)
        alone, alone_measured = epochs[1](alone, teacher, BATCH)
    assert state.step == 8
    assert [some['loss'].total.shape for some in measured] == [(2, STUDENTS), (2, STUDENTS)]
    assert_is_row(state, 2, alone)
    np.testing.assert_allclose(measured[1]['loss'].total[:, 2], alone_measured[1]['loss'].total, rtol=1e-5)


def test_every_student_meets_a_limit_of_its_own():
    """A sweep along the trade-off of two objectives: state of the objective, a multiplier, is each student's own."""
    network = networks.from_linen(nn.Dense(3))
    size = objectives.from_function('size', lambda student, teacher, batch: jnp.mean(student.logits**2, axis=-1))
    limits = jnp.array([0.3, 0.5, 0.8])
    batch = {'inputs': jnp.eye(3), 'labels': jnp.arange(3)}

    def make(limit):
        return training.distillation(
            network, None, size + objectives.constraint(objectives.hard_labels(), limit), optax.sgd(0.5)
        )

    students = training.sweep(make, limits)
    train = jax.jit(lambda state: jax.lax.scan(lambda state, _: students.step(state, {}, batch), state, length=400))
    state, measured = train(students.init(jax.random.key(0), batch))
    last = metrics.compute(row_of(row_of(measured, -1), 1))
    np.testing.assert_allclose(measured['constraint/hard_labels'].total[-1] / 3, limits, atol=0.01)
    np.testing.assert_allclose(last['constraint/excess'], 0.0, atol=0.01)
    assert np.all(np.diff(measured['size'].total[-1]) < 0)
    assert np.all(state.objective_state['constraint']['multiplier'] > 0)


@pytest.mark.parametrize(
    'rows, axes',
    [
        ({'a': np.ones(3), 'b': np.ones(2)}, '[(2,), (3,)]'),
        ({'a': np.ones(3), 'b': np.ones(())}, '[(), (3,)]'),
        (np.ones(()), '[()]'),
        ([1.0, 2.0], '[()]'),
        ({}, '[]'),
    ],
)
def test_rows_that_are_no_arrays_with_one_number_of_students_are_errors(rows, axes):
    with pytest.raises(ValueError, match=r'^sweep: [^\n]*$') as error:
        training.sweep(make, rows)
    assert str(error.value) == f'sweep: hyperparameters must be arrays with one number of students, got leading axes {axes}'


def test_fit_trains_a_sweep_as_its_epochs_do_and_logs_each_student(students, teacher_variables, tmp_path):
    data = {name: jnp.concatenate([x, x]) for name, x in BATCH.items()}
    teacher = teacher_variables
    records = []
    options = {'batch_size': 8, 'epochs': 3, 'every': 1, 'on_record': records.append, 'progress': False}
    fitted = training.fit(students, data, teacher, key=jax.random.key(1), directory=tmp_path, **options)
    state = students.init(jax.random.key(1), BATCH)
    epoch = training.in_memory_epoch(students, batch_size=8)
    for _ in range(3):
        state, _ = epoch(state, teacher, data)
    chex.assert_trees_all_equal(fitted.variables, state.variables)
    assert [len(record['loss']) for record in records] == [STUDENTS] * 3
    assert len(set(records[-1]['loss'])) == STUDENTS
    # Found again in its folder, with nothing left to do.
    again = training.fit(students, data, teacher, key=jax.random.key(1), directory=tmp_path, **options)
    chex.assert_trees_all_equal(again.variables, state.variables)
    assert again.resumed_from == 6


def test_a_loss_that_is_not_finite_for_one_student_ends_the_run(students, teacher_variables):
    data = {**BATCH, 'inputs': BATCH['inputs'].at[3].set(jnp.nan)}
    with pytest.raises(training.NonFiniteLossError, match='the loss is not finite at step 0, from term'):
        training.fit(students, data, teacher_variables, key=jax.random.key(0), batch_size=8, epochs=1)
