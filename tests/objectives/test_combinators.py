"""Objectives in stages and under a constraint: whose turn it is, and what the multiplier does."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdjax import metrics, networks, objectives, training
from kdjax.networks import Outputs
from kdjax.objectives._objective import Objective, Term

NOTHING = Outputs(None)
STEPS = 8


def constant(name, value):
    """A term of one value for each of four examples."""
    return objectives.from_function(name, lambda student, teacher, batch: jnp.full(4, value, jnp.float32))


one, ten, hundred = (constant(name, value) for name, value in (('one', 1.0), ('ten', 10.0), ('hundred', 100.0)))
output = objectives.from_function('output', lambda student, teacher, batch: student.logits)


def over_steps(objective):
    """Loss and metrics, as numbers, of an objective without parameters at steps 0, 1, ..., which are traced."""
    empty = {name: {} for name in objective.names}

    def at(step):
        return objective.apply(empty, empty, NOTHING, NOTHING, {}, step=step)[:2]

    losses, values = jax.jit(jax.vmap(at))(jnp.arange(STEPS))
    return losses, {name: np.asarray(metric.total / metric.count) for name, metric in values.items()}


@pytest.mark.parametrize('boundaries', [(3, 5), (0, 7), (2, 2), (8, 9), (1, 2)])
def test_exactly_one_stage_weighs_1_at_every_step(boundaries):
    staged = objectives.in_stages([one, ten, hundred], boundaries)
    losses, values = over_steps(staged)
    turn = np.searchsorted(boundaries, np.arange(STEPS), side='right')
    np.testing.assert_array_equal(losses, 10.0**turn)
    for i, name in enumerate(staged.names):
        np.testing.assert_array_equal(values[f'{name}/weight'], turn == i)
        np.testing.assert_array_equal(values[name], np.full(STEPS, 10.0**i))


def test_the_step_may_also_be_a_number():
    staged = objectives.in_stages([one, ten], [3])
    empty = {name: {} for name in staged.names}
    for step in (2, np.int64(2), 3, np.int32(3)):
        loss, _, _ = staged.apply(empty, empty, NOTHING, NOTHING, {}, step=step)
        assert loss == (10 if step == 3 else 1)


def test_weights_and_schedules_within_stages_count_and_run_on_the_same_steps():
    rising = optax.linear_schedule(0.0, 7.0, 7)
    staged = 2.0 * objectives.in_stages([0.5 * one + rising * ten, rising * hundred], [4])
    losses, values = over_steps(staged)
    steps = np.arange(STEPS)
    np.testing.assert_allclose(losses, np.where(steps < 4, 2 * (0.5 + 10 * steps), 2 * 100 * steps), rtol=1e-6)
    np.testing.assert_allclose(values['hundred/weight'], np.where(steps < 4, 0, 2 * steps), rtol=1e-6)


def test_stages_within_stages():
    inner = objectives.in_stages([one, ten], [2])
    losses, _ = over_steps(objectives.in_stages([inner, hundred], [5]))
    np.testing.assert_array_equal(losses, [1, 1, 10, 10, 10, 100, 100, 100])


def test_one_stage_is_the_objective_itself():
    np.testing.assert_array_equal(over_steps(objectives.in_stages([ten], []))[0], np.full(STEPS, 10.0))


def test_a_name_may_stand_in_several_stages():
    assert objectives.in_stages([one, one + ten], [3]).names == ('one', 'one_2', 'ten')


def test_only_the_stage_whose_turn_it_is_gives_a_gradient():
    squared = objectives.from_function('squared', lambda student, teacher, batch: student.logits**2)
    staged = objectives.in_stages([output, squared], [1])
    empty = {name: {} for name in staged.names}

    def loss(logits, step):
        return staged.apply(empty, empty, Outputs(logits), NOTHING, {}, step=step)[0]

    logits = jnp.array([3.0, 5.0])
    gradients = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(logits, jnp.arange(2))
    np.testing.assert_allclose(gradients, [[0.5, 0.5], [3.0, 5.0]])


@pytest.mark.parametrize(
    'stages, boundaries', [([one, ten], []), ([one, ten], [1, 2]), ([one], [1]), ([one, ten, hundred], [5, 3])]
)
def test_boundaries_that_do_not_fit_are_errors(stages, boundaries):
    with pytest.raises(ValueError, match=r'^in_stages: [^\n]*$') as error:
        objectives.in_stages(stages, boundaries)
    assert f'{len(stages)} stages need {len(stages) - 1} rising boundaries, got {boundaries}' in str(error.value)


def after(constrained, losses, limit_metrics=('multiplier', 'excess')):
    """What a constrained output reports when it takes these values one after the other, in a jitted scan."""

    @jax.jit
    def run(state):
        def step(state, now):
            i, value = now
            loss, values, state = constrained.apply(
                {'constraint': {'output': {}}}, state, Outputs(value[None]), NOTHING, {}, step=i
            )
            return state, [loss, *(values[f'constraint/{name}'].total for name in limit_metrics)]

        return jax.lax.scan(step, state, (jnp.arange(len(losses)), jnp.asarray(losses, jnp.float32)))

    _, state = constrained.init(jax.random.key(0), Outputs(jnp.ones(1)), NOTHING, {})
    return jax.device_get(run(state))


def multipliers(excess, learning_rate, start=0.0):
    """λ before each step, and after the last."""
    result = [start]
    for e in excess:
        result.append(max(0.0, result[-1] + learning_rate * e))
    return np.array(result)


LOSSES = np.array([2.0, 3.0, 1.0, 0.5, 0.0, -1.0, -9.0, 0.0, 2.0])


def test_the_multiplier_climbs_above_the_limit_and_falls_below_it_but_not_below_0():
    state, (values, multiplier, excess) = after(objectives.constraint(output, 0.5, learning_rate=0.2), LOSSES)
    expected = multipliers(LOSSES - 0.5, 0.2)
    np.testing.assert_allclose(multiplier, expected[:-1], rtol=1e-5)
    np.testing.assert_allclose(state['constraint']['multiplier'], expected[-1], rtol=1e-5)
    np.testing.assert_allclose(excess, LOSSES - 0.5)
    np.testing.assert_allclose(values, expected[:-1] * (LOSSES - 0.5), rtol=1e-5)
    changes = np.diff(multiplier)
    assert np.all(changes[:3] > 0)
    assert changes[3] == 0
    assert np.all(changes[4:6] < 0)
    assert multiplier[7] == multiplier[8] == 0


def test_the_multiplier_may_begin_above_0_and_not_below():
    _, (values, multiplier, _) = after(objectives.constraint(output, 0.5, learning_rate=0.2, multiplier=1.5), LOSSES)
    expected = multipliers(LOSSES - 0.5, 0.2, start=1.5)[:-1]
    np.testing.assert_allclose(multiplier, expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(values, expected * (LOSSES - 0.5), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match='constraint: multiplier must be at least 0, got -1'):
        objectives.constraint(output, 0.5, multiplier=-1.0)


def test_the_limit_may_be_a_schedule():
    state, (_, _, excess) = after(objectives.constraint(output, optax.linear_schedule(4.0, 0.0, 8)), LOSSES)
    expected = LOSSES - (4 - np.arange(9) / 2)
    np.testing.assert_allclose(excess, expected, rtol=1e-6)
    np.testing.assert_allclose(state['constraint']['multiplier'], multipliers(expected, 0.1)[-1], rtol=1e-5)


def test_the_gradient_is_the_multiplier_times_the_objective_s_and_weights_scale_it():
    constrained = 3.0 * objectives.constraint(objectives.from_function('squared', lambda s, t, b: s.logits**2), 0.5)
    state = {'constraint': {'objective': {'squared': {}}, 'multiplier': jnp.float32(0.7)}}

    def loss(logits):
        return constrained.apply({'constraint': {'squared': {}}}, state, Outputs(logits), NOTHING, {}, step=0)[0]

    logits = jnp.array([1.0, -2.0])
    value, gradient = jax.value_and_grad(loss)(logits)
    np.testing.assert_allclose(value, 3 * 0.7 * (2.5 - 0.5), rtol=1e-6)
    np.testing.assert_allclose(gradient, 3 * 0.7 * logits, rtol=1e-6)


def counting():
    """A term with a parameter, that counts its calls."""

    def init(key, student, teacher, batch):
        return jax.random.normal(key, ()), jnp.int32(0)

    def apply(params, state, student, teacher, batch, *, step):
        return metrics.mean(params * student.logits), {'calls': metrics.mean(state)}, state + 1

    return Objective((Term('counting', init, apply),))


def test_parameters_state_metrics_and_weights_of_what_is_constrained_are_kept(key):
    constrained = objectives.constraint(2.0 * counting() + one, 0.0, learning_rate=1.0)
    student = Outputs(jnp.ones(3))
    params, state = constrained.init(key, student, NOTHING, {})
    assert jax.tree.map(jnp.shape, params) == {'constraint': {'counting': (), 'one': {}}}
    excess = 2 * float(params['constraint']['counting']) + 1

    def loss(params, state):
        value, values, state = constrained.apply(params, state, student, NOTHING, {}, step=0)
        return value, (values, state)

    step = jax.jit(jax.grad(loss, has_aux=True))
    for calls in range(2):
        gradient, (values, state) = step(params, state)
        assert metrics.compute(values)['constraint/counting/calls'] == calls
        assert state['constraint']['objective']['counting'] == calls + 1
    np.testing.assert_allclose(gradient['constraint']['counting'], 2 * max(0.0, excess), rtol=1e-5)
    np.testing.assert_allclose(metrics.compute(values)['constraint/loss'], excess, rtol=1e-5)


@pytest.mark.parametrize('limit, point, multiplier', [(1.0, 1.0, 1.0), (9.0, 0.0, 0.0), (0.25, 1.5, 3.0)])
def test_gradient_descent_ends_in_the_constrained_optimum(limit, point, multiplier):
    """Of x² under (x - 2)² <= limit, where 2x + λ·2(x - 2) = 0: the constraint is active, or not, with λ = 0."""
    square, distance = (
        objectives.from_function(name, lambda student, teacher, batch, to=to: (student.logits - to) ** 2)
        for name, to in (('square', 0.0), ('distance', 2.0))
    )
    objective = square + objectives.constraint(distance, limit, learning_rate=0.05)
    params, state = objective.init(jax.random.key(0), Outputs(jnp.ones(1)), NOTHING, {})

    def loss(x, state):
        value, _, state = objective.apply(params, state, Outputs(x), NOTHING, {}, step=0)
        return value, state

    def step(carry, _):
        x, state = carry
        gradient, state = jax.grad(loss, has_aux=True)(x, state)
        return (x - 0.05 * gradient, state), None

    (x, state), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=3000))((jnp.array([-1.0]), state))
    np.testing.assert_allclose(x, [point], atol=1e-3)
    np.testing.assert_allclose(state['constraint']['multiplier'], multiplier, atol=1e-2)


def test_a_student_is_trained_until_the_constraint_is_met():
    """The teacher knows nothing, and would draw the student's logits to 0, if the labels' cross-entropy were not limited."""
    network = networks.from_linen(nn.Dense(3))
    batch = {'inputs': jnp.eye(3), 'labels': jnp.arange(3)}
    objective = objectives.logit_mse() + objectives.constraint(objectives.hard_labels(), 0.3)
    problem = training.distillation(network, network, objective, optax.sgd(0.5))
    state = problem.init(jax.random.key(0), batch)
    nothing_known = jax.tree.map(jnp.zeros_like, state.variables)

    @jax.jit
    def train(state):
        return jax.lax.scan(lambda state, _: problem.step(state, nothing_known, batch), state, length=400)

    state, measured = train(state)
    last = metrics.compute(jax.tree.map(lambda x: x[-1], measured))
    np.testing.assert_allclose(last['constraint/hard_labels'], 0.3, atol=0.01)
    np.testing.assert_allclose(last['constraint/excess'], 0.0, atol=0.01)
    # The symmetric optimum by hand: logits z (2, -1, -1) / 3 for each class, with exp(-0.3) = 1 / (1 + 2 exp(-z)).
    z = -np.log((np.exp(0.3) - 1) / 2)
    np.testing.assert_allclose(last['logit_mse'], z**2 * 6 / 9 / 3, rtol=0.05)
    slope = 2 * np.exp(-z) / (1 + 2 * np.exp(-z))
    np.testing.assert_allclose(last['constraint/multiplier'], 2 * z * 6 / 9 / 3 / slope, rtol=0.1)
