"""Steps that come out infinite or NaN: left out, counted, and too many of them an error."""

import json

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.toy_problem import make

from kdjax import networks, objectives, training


@pytest.fixture(scope='module')
def problem():
    return make()


@pytest.fixture(scope='module')
def skipping(problem):
    return training.skip_nonfinite(problem.distillation)


def host(state):
    return jax.device_get(state._replace(key=jax.random.key_data(state.key)))


def batches(data, size, number):
    return [{name: jnp.asarray(x[i * size : (i + 1) * size]) for name, x in data.items()} for i in range(number)]


def poisoned(batch, value=np.nan):
    return {**batch, 'inputs': batch['inputs'].at[3].set(value)}


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_a_skipped_step_is_one_that_was_left_out(problem, skipping, value):
    """Bit for bit the run in which that step did not take place, but for its number."""
    state, expected = problem.start(), problem.start()
    for number, batch in enumerate(batches(problem.data, 16, 4)):
        if number == 2:
            state, measured = skipping.step(state, problem.teacher_variables, poisoned(batch, value))
            expected = expected._replace(step=expected.step + 1)
            assert {name: (float(x.total), float(x.count)) for name, x in measured.items() if name != 'skipped'} == {
                name: (0.0, 0.0) for name in measured if name != 'skipped'
            }
        else:
            state, measured = skipping.step(state, problem.teacher_variables, batch)
            expected, reference = problem.distillation.step(expected, problem.teacher_variables, batch)
            chex.assert_trees_all_equal({name: measured[name] for name in reference}, reference)
        assert (float(measured['skipped'].total), float(measured['skipped'].count)) == (float(number == 2), 1.0)
    chex.assert_trees_all_equal(host(state), host(expected))


def test_a_memory_bank_is_not_poisoned():
    network = networks.from_linen(nn.Sequential([nn.Dense(4), nn.Dense(3)]), features='layers_0')
    rng = np.random.default_rng(0)
    data = {
        'inputs': rng.normal(size=(32, 5)).astype(np.float32),
        'labels': np.arange(32, dtype=np.int32) % 3,
        'index': np.arange(32, dtype=np.int32),
    }
    objective = objectives.crd('layers_0', 'layers_0', data['labels'], negatives=4, width=4)
    problem = training.skip_nonfinite(training.distillation(network, network, objective, optax.adam(1e-2)))
    first, second = batches(data, 16, 2)
    teacher_variables = network.init(jax.random.key(1), first['inputs'])
    state, _ = problem.step(problem.init(jax.random.key(0), first), teacher_variables, first)
    before = host(state)
    assert jax.tree.leaves(before.objective_state)
    state, measured = problem.step(state, teacher_variables, poisoned(second))
    assert float(measured['skipped'].total) == 1.0
    chex.assert_trees_all_equal(host(state), before._replace(step=before.step + 1))
    state, measured = problem.step(state, teacher_variables, second)
    assert float(measured['skipped'].total) == 0.0


def test_a_finite_loss_with_an_infinite_gradient_is_skipped_too():
    network = networks.from_linen(nn.Dense(2, use_bias=False))
    root = objectives.from_function('root', lambda student, teacher, batch: jnp.sqrt(jnp.sum(student.logits**2, axis=-1)))
    problem = training.skip_nonfinite(training.distillation(network, None, root, optax.sgd(0.1)))
    zeros = {'inputs': jnp.zeros((4, 3))}
    state = problem.init(jax.random.key(0), zeros)
    before = host(state)
    state, measured = problem.step(state, {}, zeros)
    assert float(measured['skipped'].total) == 1.0
    chex.assert_trees_all_equal(host(state), before._replace(step=before.step + 1))


def test_infinities_that_a_state_holds_on_purpose_stop_nothing():
    network = networks.from_linen(nn.Dense(2))
    smallest = optax.GradientTransformation(
        lambda params: jax.tree.map(lambda x: jnp.full_like(x, jnp.inf), params),
        lambda updates, state, params: (
            updates,
            jax.tree.map(lambda x, y: x.at[0].set(jnp.minimum(x[0], y[0])), state, updates),
        ),
    )
    problem = training.skip_nonfinite(
        training.distillation(network, None, objectives.hard_labels(), optax.chain(smallest, optax.sgd(0.1)))
    )
    batch = {'inputs': jnp.ones((4, 3)), 'labels': jnp.zeros(4, jnp.int32)}
    state, measured = problem.step(problem.init(jax.random.key(0), batch), {}, batch)
    assert float(measured['skipped'].total) == 0.0
    assert np.isinf(host(state).opt_state[0]['kernel'][1:]).all()
    assert np.isfinite(host(state).opt_state[0]['kernel'][0]).all()


def test_one_student_of_a_sweep_is_skipped_alone():
    network = networks.from_linen(nn.Dense(2))
    problem = training.sweep(
        lambda rate: training.skip_nonfinite(training.distillation(network, None, objectives.hard_labels(), optax.sgd(rate))),
        jnp.array([0.1, jnp.inf]),
    )
    batch = {'inputs': jnp.ones((4, 3)), 'labels': jnp.zeros(4, jnp.int32)}
    state = problem.init(jax.random.key(0), batch)
    before = host(state)
    state, measured = problem.step(state, {}, batch)
    assert measured['skipped'].total.tolist() == [0.0, 1.0]
    after = host(state)
    assert not np.array_equal(after.params['kernel'][0], before.params['kernel'][0])
    assert np.array_equal(after.params['kernel'][1], before.params['kernel'][1])


def small():
    """A problem with one NaN among its examples, met once in each epoch of four steps."""
    network = networks.from_linen(nn.Dense(2))
    problem = training.distillation(network, None, objectives.hard_labels(), optax.sgd(0.1))
    inputs = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
    inputs[5] = np.nan
    data = {'inputs': inputs, 'labels': np.zeros(16, np.int32)}
    return problem, data


def fit(problem, data, **more):
    return training.fit(problem, data, key=jax.random.key(0), batch_size=4, progress=False, **more)


def test_fit_tolerates_as_many_skipped_steps_as_it_is_told(tmp_path):
    problem, data = small()
    log = tmp_path / 'log.jsonl'
    fitted = fit(problem, data, epochs=3, skip_nonfinite=3, log=log)
    assert np.isfinite(host(fitted.state).params['kernel']).all()
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [record['skipped'] for record in records] == [0.25, 0.25, 0.25]
    assert all(np.isfinite(record['loss']) for record in records)


def test_one_more_is_an_error_that_names_the_step_and_keeps_the_last_good_checkpoint(tmp_path):
    problem, data = small()
    message = r'step 1?[0-9] is not finite, and no more steps may be skipped; the last good checkpoint is in'
    with pytest.raises(training.NonFiniteLossError, match=message) as raised:
        fit(problem, data, epochs=4, skip_nonfinite=2, directory=tmp_path)
    assert 8 <= int(str(raised.value).split()[1]) < 12
    assert max(int(path.name) for path in tmp_path.iterdir()) == 8
    with training.checkpoint_manager(tmp_path) as manager:
        like = problem.init(jax.random.key(0), data)
        step, kept = training.restore_newest(manager, like, {'examples': 16, 'batch_size': 4})
    assert step == 8
    assert np.isfinite(host(kept).params['kernel']).all()


def test_a_gradient_and_parameters_that_are_not_finite_stop_a_run_whose_loss_is():
    network = networks.from_linen(nn.Dense(2))
    data = {'inputs': np.ones((8, 3), np.float32), 'labels': np.zeros(8, np.int32)}
    rooted = objectives.from_function('rooted', lambda student, teacher, batch: jnp.sqrt(0.0 * student.logits[:, 0]))
    with pytest.raises(training.NonFiniteLossError, match=r'the gradient is not finite at step 0, though the loss is; no'):
        fit(training.distillation(network, None, rooted, optax.sgd(0.1)), data, epochs=1)
    leaping = optax.sgd(lambda step: jnp.where(step < 1, 0.1, jnp.inf))
    problem = training.distillation(network, None, objectives.hard_labels(), leaping)
    with pytest.raises(training.NonFiniteLossError, match=r'a parameter is not finite after step 2; no checkpoints are kept'):
        fit(problem, data, epochs=1)


@pytest.mark.parametrize('objective', [objectives.dist(), objectives.similarity_preserving('layers_0', 'layers_0')])
def test_one_nan_among_the_inputs_stops_a_run_whatever_the_loss(objective, tmp_path):
    """A loss that swallows it would go on, and write parameters that are all NaN."""
    network = networks.from_linen(nn.Sequential([nn.Dense(4), nn.Dense(3)]), features='layers_0')
    teacher = networks.preprocess(network, jnp.nan_to_num)
    data = {'inputs': np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)}
    data['inputs'][5, 1] = np.nan
    problem = training.distillation(network, teacher, objective, optax.sgd(0.1))
    variables = network.init(jax.random.key(1), data['inputs'])
    with pytest.raises(
        training.NonFiniteLossError, match=f'not finite at step [0-3], from term {objective.names[0]}; the last'
    ):
        training.fit(
            problem, data, variables, key=jax.random.key(0), batch_size=4, epochs=1, directory=tmp_path, progress=False
        )
    assert list(tmp_path.iterdir()) == []
