"""The step: what changes, what must not, and that devices do not matter."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.toy_problem import make

from kdjax import metrics, networks, objectives, parallel, pruning, training


@pytest.fixture(scope='module')
def problem():
    return make()


def batch_of(problem, size=16):
    return {name: jnp.asarray(x[:size]) for name, x in problem.data.items()}


def run(problem, steps, state=None):
    state = problem.start() if state is None else state
    for _ in range(steps):
        state, measured = problem.distillation.step(state, problem.teacher_variables, batch_of(problem))
    return state, measured


def test_teacher_is_bitwise_unchanged_after_20_steps(problem):
    before = jax.device_get(problem.teacher_variables)
    run(problem, 20)
    chex.assert_trees_all_equal(before, jax.device_get(problem.teacher_variables))


def test_gradient_with_respect_to_the_teacher_is_zero(problem):
    state, batch = problem.start(), batch_of(problem)

    def loss(teacher_variables):
        # A closed-over copy of the step's loss: the state's buffers are donated by the step itself.
        _, measured = problem.distillation.step(jax.tree.map(jnp.copy, state), teacher_variables, batch)
        return metrics.divide(measured['loss'])

    gradient = jax.grad(loss)(problem.teacher_variables)
    chex.assert_trees_all_equal(gradient, jax.tree.map(jnp.zeros_like, problem.teacher_variables))


def test_everything_that_should_learn_changes(problem):
    start = jax.device_get(problem.start())
    end = jax.device_get(run(problem, 3)[0])
    for name in ('params', 'model_state', 'objective_params'):
        for before, after in zip(jax.tree.leaves(getattr(start, name)), jax.tree.leaves(getattr(end, name)), strict=True):
            assert not np.array_equal(before, after), name
    assert end.step == 3


def test_training_lowers_the_loss(problem):
    first = metrics.compute(run(problem, 1)[1])['loss']
    last = metrics.compute(run(problem, 40)[1])['loss']
    assert last < 0.7 * first


def test_one_device_equals_eight(problem):
    mesh = parallel.data_parallel()
    assert mesh.shape['data'] == 8
    states = []
    for place in (False, True):
        state, teacher_variables, batch = problem.start(), problem.teacher_variables, batch_of(problem)
        if place:
            state, teacher_variables = parallel.replicate(mesh, (state, teacher_variables))
            batch = parallel.shard_batch(mesh, batch)
        losses = []
        for _ in range(5):
            state, measured = problem.distillation.step(state, teacher_variables, batch)
            losses.append(metrics.compute(measured)['loss'])
        states.append((jax.device_get(state._replace(key=0)), losses))
    # Adam divides by the root of tiny second moments, so its parameters amplify rounding; SGD's are compared below.
    np.testing.assert_allclose(states[0][1], states[1][1], rtol=1e-5)


def test_one_device_equals_eight_in_every_array():
    problem = make(optimizer=optax.sgd(0.05, momentum=0.9))
    mesh = parallel.data_parallel()
    ends = []
    for place in (lambda tree: tree, lambda tree: parallel.replicate(mesh, tree)):
        state, teacher_variables = place((problem.start(), problem.teacher_variables))
        batch = batch_of(problem) if not ends else parallel.shard_batch(mesh, batch_of(problem))
        for _ in range(5):
            state, _ = problem.distillation.step(state, teacher_variables, batch)
        ends.append(jax.device_get(state._replace(key=0, objective_params=0, objective_opt_state=0)))
    chex.assert_trees_all_close(*ends, rtol=1e-5, atol=1e-5)


def test_step_compiles_once_and_takes_schedules(problem):
    run(problem, 2)
    compiled = problem.distillation.step._cache_size()
    _, measured = run(problem, 10)
    assert problem.distillation.step._cache_size() == compiled
    # The schedule of the term at step 9.
    np.testing.assert_allclose(metrics.compute(measured)['soft/weight'], 1.0 - 0.9 * 9 / 20, rtol=1e-6)


def test_same_seed_gives_the_same_run_bit_for_bit(problem):
    one, other = (jax.device_get(run(problem, 5)[0]._replace(key=0)) for _ in range(2))
    chex.assert_trees_all_equal(one, other)


def test_step_composes_with_scan_and_vmap(problem):
    batch = batch_of(problem)
    looped = jax.device_get(run(problem, 4)[0])

    @jax.jit
    def scanned(state):
        return jax.lax.scan(lambda s, _: problem.distillation.step(s, problem.teacher_variables, batch), state, length=4)[0]

    chex.assert_trees_all_close(looped.params, jax.device_get(scanned(problem.start())).params, rtol=2e-5, atol=2e-5)
    keys = jax.random.split(jax.random.key(0), 2)
    states = jax.vmap(lambda key: problem.distillation.init(key, batch))(keys)
    stepped, _ = jax.vmap(problem.distillation.step, in_axes=(0, None, None))(states, problem.teacher_variables, batch)
    alone, _ = problem.distillation.step(problem.distillation.init(keys[1], batch), problem.teacher_variables, batch)
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[1], stepped.params), alone.params, rtol=2e-5, atol=2e-5)


def test_student_can_start_from_given_variables_which_survive_donation(problem):
    batch = batch_of(problem)
    given = problem.student.init(jax.random.key(5), batch['inputs'])
    state = problem.distillation.init(jax.random.key(0), batch, student_variables=given)
    chex.assert_trees_all_equal(state.variables, given)
    problem.distillation.step(state, problem.teacher_variables, batch)
    assert all(np.isfinite(leaf).all() for leaf in jax.device_get(jax.tree.leaves(given)))


def test_pruned_zeros_stay_zero_and_connectors_are_not_pruned():
    problem = make(optimizer=pruning.prune(optax.adamw(1e-2, weight_decay=0.1), pruning.cubic(0.5, begin=0, end=5)))
    state, _ = run(problem, 10)
    kernels = [np.asarray(leaf) for leaf in jax.tree.leaves(state.params) if leaf.ndim > 1]
    weights = sum(kernel.size for kernel in kernels)
    assert sum(np.count_nonzero(kernel) for kernel in kernels) == weights - round(weights / 2)
    assert all(np.count_nonzero(leaf) == leaf.size for leaf in jax.tree.leaves(state.objective_params) if leaf.ndim > 1)


def test_masked_examples_do_not_count():
    student = networks.from_linen(nn.Dense(3))
    objective = objectives.hard_labels() + objectives.soft_targets()
    problem = training.distillation(student, student, objective, optax.sgd(0.1))
    key = jax.random.key(0)
    inputs, labels = jax.random.normal(key, (8, 5)), jnp.arange(8) % 3
    full = {'inputs': inputs, 'labels': labels, 'mask': jnp.arange(8) < 5}
    sliced = {'inputs': inputs[:5], 'labels': labels[:5]}
    teacher_variables = student.init(jax.random.key(1), inputs)
    ends = [problem.step(problem.init(key, batch), teacher_variables, batch)[0].params for batch in (full, sliced)]
    chex.assert_trees_all_close(*ends, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    'batch', [{'labels': np.zeros(4, np.int32)}, [1, 2], {'inputs': np.ones((4, 2)), 'labels': np.zeros(3)}]
)
def test_malformed_batches_are_refused(problem, batch):
    with pytest.raises(ValueError, match='batch'):
        problem.distillation.init(jax.random.key(0), batch)


def test_class_mismatch_is_found_at_init():
    student, teacher = (networks.from_linen(nn.Dense(classes)) for classes in (10, 100))
    problem = training.distillation(student, teacher, objectives.soft_targets(), optax.sgd(0.1))
    with pytest.raises(ValueError, match=r'the student has 10 and the teacher 100'):
        problem.init(jax.random.key(0), {'inputs': jnp.ones((4, 5))})


def test_batch_that_does_not_divide_over_devices_is_refused():
    with pytest.raises(ValueError, match='a batch of 12 does not divide over 8 devices: use 8 or 16'):
        parallel.shard_batch(parallel.data_parallel(), {'inputs': jnp.ones((12, 2))})


def test_supervised_training_needs_no_teacher():
    network = networks.from_linen(nn.Dense(3))
    problem = training.distillation(network, None, objectives.hard_labels(), optax.sgd(0.5))
    batch = {'inputs': jnp.eye(3), 'labels': jnp.arange(3)}
    state = problem.init(jax.random.key(0), batch)
    for _ in range(20):
        state, measured = problem.step(state, {}, batch)
    assert metrics.compute(measured)['loss'] < 0.5


def test_optimizers_that_remember_the_first_parameters_can_be_used():
    """Their state holds the parameters themselves, and no buffer may be donated twice."""
    network = networks.from_linen(nn.Dense(3))
    batch = {'inputs': jnp.eye(3), 'labels': jnp.arange(3)}
    remember = optax.GradientTransformation(lambda params: params, lambda updates, state, params=None: (updates, state))
    problem = training.distillation(network, None, objectives.hard_labels(), optax.chain(remember, optax.sgd(0.1)))
    state, _ = problem.step(problem.init(jax.random.key(0), batch), {}, batch)
    assert int(state.step) == 1
