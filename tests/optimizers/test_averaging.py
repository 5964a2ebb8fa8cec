"""Averages of parameters, and accumulated gradients: transformations of optimizers that the step knows nothing of."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import toy_problem

from kdjax import networks, objectives, optimizers, pruning, training
from kdjax.metrics import Average


def trained(optimizer, steps=6):
    problem = toy_problem.make(optimizer=optimizer)
    state, seen = problem.start(), []
    for i in range(steps):
        batch = {name: jnp.asarray(x[8 * i : 8 * i + 8]) for name, x in problem.data.items()}
        state, _ = problem.distillation.step(state, problem.teacher_variables, batch)
        seen.append(jax.device_get(state.params))
    return problem, state, seen


def test_the_average_is_that_of_the_formula_and_training_goes_on_as_before():
    decay = 0.7
    problem, state, seen = trained(optimizers.average_parameters(optax.adam(1e-2), decay))
    _, plain, _ = trained(optax.adam(1e-2))
    jax.tree.map(np.testing.assert_array_equal, state.params, plain.params)
    average = jax.tree.map(np.float64, jax.device_get(problem.start().params))
    for t, params in enumerate(seen, start=1):
        d = min(decay, (1 + t) / (10 + t))
        average = jax.tree.map(lambda a, p, d=d: d * a + (1 - d) * p, average, params)
    got = optimizers.averaged_variables(state)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), got['params'], average)
    assert got['batch_stats'] is state.variables['batch_stats']
    assert not np.allclose(got['params']['head']['kernel'], state.params['head']['kernel'], atol=1e-4)


def test_it_is_found_inside_a_chain_and_around_pruning():
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optimizers.average_parameters(pruning.prune(optax.sgd(0.1), 0.5), 0.0)
    )
    _, state, _ = trained(optimizer)
    average = optimizers.averaged_variables(state)['params']
    # Without memory the average is the pruned network itself.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), average, state.params)
    assert np.mean(np.asarray(average['head']['kernel']) == 0) > 0


def test_the_average_of_what_was_pruned_is_zero():
    _, state, _ = trained(optimizers.average_parameters(pruning.prune(optax.sgd(0.1), 0.5), 0.9))
    (kept,) = jax.tree.leaves(state.opt_state, is_leaf=lambda x: isinstance(x, optimizers.AverageState))
    average = optimizers.averaged_variables(state)['params']['head']['kernel']
    pruned = np.asarray(state.params['head']['kernel']) == 0
    assert 0 < pruned.mean() < 1
    assert np.all(np.asarray(kept.average['head']['kernel'])[pruned] != 0)
    np.testing.assert_array_equal(np.asarray(average) == 0, pruned)
    np.testing.assert_array_equal(np.asarray(average)[~pruned], np.asarray(kept.average['head']['kernel'])[~pruned])


def test_what_is_wrong_is_said():
    with pytest.raises(ValueError, match='decay must be from 0 to below 1, got 1'):
        optimizers.average_parameters(optax.sgd(0.1), 1)
    with pytest.raises(ValueError, match=r'keeps no averages; wrap it in optimizers\.average_parameters'):
        optimizers.averaged_variables(toy_problem.make().start())
    optimizer = optimizers.average_parameters(optax.sgd(0.1))
    params = {'w': jnp.ones(2)}
    with pytest.raises(ValueError, match='update needs the parameters'):
        optimizer.update(params, optimizer.init(params))


def test_accumulated_gradients_are_those_of_the_large_batch():
    """optax.MultiSteps does it: four batches of 8 are one of 32, where losses are means over examples."""
    network = networks.from_linen(toy_problem.nn.Dense(3))
    data = toy_problem.make().data
    data = {'inputs': jnp.asarray(data['inputs'].reshape(-1, 16)), 'labels': jnp.asarray(data['labels'])}

    def run(optimizer, size):
        objective = 0.5 * objectives.hard_labels() + 0.5 * objectives.soft_targets()
        problem = training.distillation(network, network, objective, optimizer)
        parts = [{name: x[start : start + size] for name, x in data.items()} for start in range(0, 64, size)]
        state = problem.init(jax.random.key(0), parts[0])
        teacher_variables = network.init(jax.random.key(1), parts[0]['inputs'])
        for part in parts:
            state, _ = problem.step(state, teacher_variables, part)
        return state

    accumulated = run(optax.MultiSteps(pruning.prune(optax.adam(1e-2), 0.5), 4), 8)
    large = run(pruning.prune(optax.adam(1e-2), 0.5), 32)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), accumulated.params, large.params)
    assert int(accumulated.step) == 8


def test_fit_validates_and_keeps_the_averages():
    problem = toy_problem.make(optimizer=optimizers.average_parameters(optax.adam(1e-2), 0.9))
    seen = []

    def validate(variables):
        seen.append(jax.device_get(variables['params']))
        return {'accuracy': Average(float(len(seen)), 1.0)}

    fitted = training.fit(
        problem.distillation,
        problem.data,
        problem.teacher_variables,
        key=jax.random.key(0),
        batch_size=24,
        epochs=2,
        validate=validate,
        variables_of=optimizers.averaged_variables,
    )
    average = optimizers.averaged_variables(fitted.state)['params']
    for each in (seen[-1], fitted.best_variables['params']):
        jax.tree.map(np.testing.assert_array_equal, each, average)
    assert not np.array_equal(average['head']['kernel'], fitted.state.params['head']['kernel'])
