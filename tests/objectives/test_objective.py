"""The algebra of objectives: weights, sums, names, schedules, metrics and masks, on terms that are easy to compute by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdjax import metrics, objectives
from kdjax.networks import Outputs
from kdjax.objectives._objective import Objective, Term

EXAMPLES = settings(max_examples=25, deadline=None, derandomize=True, database=None)
WEIGHTS = st.floats(-10, 10, width=32)
STEPS = 6
STUDENT = Outputs(jnp.array([[1.0, 5.0], [2.0, 7.0], [6.0, 0.0], [3.0, 4.0]]))
TEACHER = Outputs(jnp.array([[2.0, 0.0], [2.0, 3.0], [1.0, 0.0], [5.0, 1.0]]))
MEANS = {'first': 3.0, 'second': 4.0}


def column(name):
    """A term whose value for an example is one column of the student's logits."""
    index = list(MEANS).index(name)
    return objectives.from_function(name, lambda student, teacher, batch: student.logits[:, index])


first, second = column('first'), column('second')


def apply(objective, batch=None, step=0, student=STUDENT, teacher=TEACHER):
    """Loss and metrics of an objective whose terms train nothing."""
    empty = {name: {} for name in objective.names}
    loss, values, _ = objective.apply(empty, empty, student, teacher, batch or {}, step=step)
    return loss, values


def divided(values):
    """Metrics as numbers."""
    return {name: float(metric.total) / float(metric.count) for name, metric in values.items()}


@EXAMPLES
@given(WEIGHTS, WEIGHTS)
def test_a_weighted_sum_is_the_arithmetic_by_hand(a, b):
    loss, values = apply(a * first + b * second)
    np.testing.assert_allclose(loss, a * 3.0 + b * 4.0, rtol=1e-6, atol=1e-6)
    expected = {'loss': float(loss), 'first': 3.0, 'first/weighted': a * 3.0, 'second': 4.0, 'second/weighted': b * 4.0}
    assert divided(values) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_hintons_weights():
    np.testing.assert_allclose(apply(0.9 * first + 0.1 * second)[0], 0.9 * 3 + 0.1 * 4, rtol=1e-6)


@pytest.mark.parametrize(
    'weight',
    [
        2,
        2.0,
        np.float32(2),
        np.float64(2),
        np.int64(2),
        np.array(2.0),
        jnp.float32(2),
        jnp.asarray(2.0),
        jnp.asarray(2, jnp.bfloat16),
        jnp.int32(2),
        lambda step: 2.0,
        lambda step: jnp.float32(2),
    ],
    ids=lambda weight: type(weight).__name__,
)
def test_numbers_scalars_and_schedules_are_weights_on_either_side(weight):
    for objective in (weight * first, first * weight):
        assert isinstance(objective, Objective)
        loss, values = apply(objective)
        assert loss.dtype == jnp.float32
        np.testing.assert_array_equal(loss, 6.0)
        assert divided(values)['first/weighted'] == 6.0


@pytest.mark.parametrize(
    'operation',
    [
        lambda: first * first,
        lambda: first * 'second',
        lambda: 'second' * first,
        lambda: first * None,
        lambda: first * [1.0],
        lambda: first * np.ones(2),
        lambda: np.ones(2) * first,
        lambda: jnp.ones(2) * first,
        lambda: first * 1j,
        lambda: first + 1,
        lambda: 1 + first,
        lambda: first + 'second',
        lambda: 'second' + first,
        lambda: first + None,
        lambda: objectives.combine(hard=0.5),
        lambda: objectives.combine(hard=first, soft='second'),
    ],
)
def test_other_operands_are_type_errors(operation):
    with pytest.raises(TypeError):
        operation()


@EXAMPLES
@given(WEIGHTS, WEIGHTS)
def test_weights_multiply_and_leave_the_original_alone(a, b):
    loss, values = apply(a * (b * first))
    np.testing.assert_allclose(loss, np.float32(a) * np.float32(b) * 3, rtol=1e-6)
    np.testing.assert_array_equal(apply(first)[0], 3.0)
    assert divided(values)['first'] == 3.0


@EXAMPLES
@given(WEIGHTS)
def test_multiplication_distributes_over_addition(weight):
    """The same loss, the same metrics under the same names."""
    assert_same(apply(weight * (first + second)), apply(weight * first + weight * second))


def assert_same(one, other):
    """Compares losses and metrics exactly."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(x, y)


def test_addition_is_associative_and_commutative():
    """Names included, also repeated ones."""
    third = objectives.from_function('third', lambda student, teacher, batch: student.logits.max(axis=1))
    assert_same(apply((first + second) + third), apply(first + (second + third)))
    assert_same(apply(first + second), apply(second + first))
    assert ((first + first) + (first + first)).names == (first + first + first + first).names


def test_gradients_are_the_weighted_sum_of_gradients():
    def loss(logits, objective):
        return apply(objective, student=Outputs(logits))[0]

    squared = objectives.from_function('squared', lambda student, teacher, batch: jnp.sum(student.logits**2, axis=1))
    gradient = jax.grad(loss)(STUDENT.logits, 3.0 * first + 0.5 * squared)
    np.testing.assert_allclose(gradient, np.array([3.0 / 4, 0.0]) + 0.5 * 2 * np.asarray(STUDENT.logits) / 4, rtol=1e-6)


def test_weights_may_be_traced_and_differentiated():
    """A weight that is learnt: its gradient is the term's value."""
    gradients = jax.jit(jax.grad(lambda w: apply(w[0] * first + second * w[1])[0]))(jnp.array([0.3, 0.7]))
    np.testing.assert_allclose(gradients, [3.0, 4.0], rtol=1e-6)


def test_sum_adds_objectives():
    """`sum` begins with 0."""
    assert sum([first, second]).names == ('first', 'second')
    np.testing.assert_array_equal(apply(sum([first, second, 2.0 * first]))[0], 13.0)


def test_a_name_that_is_taken_gets_a_number():
    objective = first + 2.0 * first + 4.0 * first
    assert objective.names == ('first', 'first_2', 'first_3')
    loss, values = apply(objective)
    np.testing.assert_array_equal(loss, 21.0)
    assert [divided(values)[f'{name}/weighted'] for name in objective.names] == [3.0, 6.0, 12.0]


def test_a_number_that_is_taken_is_passed_over():
    names = (objectives.combine(first_2=first) + first + first + first).names
    assert names == ('first_2', 'first', 'first_3', 'first_4')


def test_combine_names_its_terms():
    objective = objectives.combine(hard=0.1 * first, soft=0.9 * second)
    assert objective.names == ('hard', 'soft')
    loss, values = apply(objective)
    np.testing.assert_allclose(loss, 0.1 * 3 + 0.9 * 4, rtol=1e-6)
    assert set(values) == {'loss', 'hard', 'hard/weighted', 'soft', 'soft/weighted'}


def test_nested_combinations_have_nested_names():
    inner = objectives.combine(hard=first, soft=2.0 * second)
    objective = objectives.combine(all=0.5 * inner, rest=objectives.combine(only=first))
    assert objective.names == ('all/hard', 'all/soft', 'rest')
    loss, values = apply(objective)
    np.testing.assert_array_equal(loss, 0.5 * (3 + 2 * 4) + 3)
    assert divided(values)['all/soft/weighted'] == 4.0
    assert objectives.combine(sum=first + first).names == ('sum/first', 'sum/first_2')


def test_no_term_may_hide_the_loss_in_the_metrics():
    with pytest.raises(ValueError, match="a term cannot be named 'loss'"):
        objectives.combine(loss=first)


def test_nothing_combined_is_zero():
    loss, values = apply(objectives.combine())
    np.testing.assert_array_equal(loss, 0.0)
    assert set(values) == {'loss'}


def counted(objective):
    """A jitted apply with the step as an argument, and the list that grows by one each time it is traced."""
    traces = []

    @jax.jit
    def run(step):
        traces.append(step)
        return apply(objective, step=step)

    return run, traces


def test_scheduled_weights_follow_the_step_within_one_compilation():
    run, traces = counted(optax.linear_schedule(1.0, 0.0, 5) * first + 2.0 * second)
    for step in range(STEPS):
        loss, values = run(jnp.int32(step))
        weight = 1 - step / 5
        np.testing.assert_allclose(loss, 3 * weight + 8, rtol=1e-6)
        expected = {
            'loss': 3 * weight + 8,
            'first': 3,
            'first/weight': weight,
            'first/weighted': 3 * weight,
            'second': 4,
            'second/weighted': 8,
        }
        assert divided(values) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert len(traces) == 1


def test_the_weight_in_the_metrics_is_the_product_of_all_factors():
    decaying = optax.exponential_decay(1.0, transition_steps=1, decay_rate=0.5)
    run, traces = counted(10.0 * (optax.linear_schedule(1.0, 6.0, 5) * (decaying * first)))
    for step in range(STEPS):
        expected = 10 * (step + 1) * 0.5**step
        loss, values = run(jnp.int32(step))
        np.testing.assert_allclose(loss, 3 * expected, rtol=1e-6)
        assert divided(values)['first/weight'] == pytest.approx(expected, rel=1e-6)
    assert len(traces) == 1


def test_scheduled_hyperparameters_follow_the_step_within_one_compilation():
    """The function sees their value; the metrics hold those that are scheduled, and no others."""

    def power(student, teacher, batch, *, base, offset):
        assert offset == 2.0
        return student.logits[:, 0] * base + offset

    objective = objectives.from_function('power', power, base=optax.linear_schedule(1.0, 6.0, 5), offset=2.0)
    run, traces = counted(objective)
    for step in range(STEPS):
        loss, values = run(jnp.int32(step))
        np.testing.assert_allclose(loss, 3 * (step + 1) + 2, rtol=1e-6)
        np.testing.assert_allclose(divided(values)['power/base'], step + 1, rtol=1e-6)
        assert set(values) == {'loss', 'power', 'power/weighted', 'power/base'}
    assert len(traces) == 1


def test_hyperparameters_keep_their_term_s_name_in_combinations():
    objective = objectives.from_function('scaled', lambda s, t, b, *, by: s.logits[:, 0] * by, by=lambda step: 2.0)
    _, values = apply(objectives.combine(inner=objectives.combine(a=objective, b=first)))
    assert divided(values)['inner/a/by'] == 2.0


def test_metrics_are_sums_and_counts_whose_division_is_the_term():
    mask = jnp.array([True, False, True, False])
    loss, values = apply(0.5 * first + 2.0 * second, {'mask': mask})
    assert values['first'] == metrics.Average(7.0, 2.0)
    assert values['first/weighted'] == metrics.Average(3.5, 2.0)
    assert values['second/weighted'] == metrics.Average(10.0, 2.0)
    np.testing.assert_array_equal(loss, 0.5 * 3.5 + 2.0 * 2.5)
    assert divided(values)['loss'] == loss


def test_metrics_of_uneven_batches_add_up_to_those_of_all_examples():
    """Three examples, and then one with three of padding."""
    batches = [{'mask': jnp.array([True, True, True, False])}, {'mask': jnp.array([False, False, False, True])}]
    added = metrics.compute(metrics.add(*(apply(2.0 * second, batch)[1] for batch in batches)))
    assert added['second'] == 4.0
    assert added['second/weighted'] == 8.0


@EXAMPLES
@given(st.lists(st.booleans(), min_size=4, max_size=4))
def test_a_mask_equals_slicing_the_batch(mask):
    mask = np.array(mask)
    for values in (np.asarray(STUDENT.logits[:, 0]), np.arange(12, dtype=np.float32).reshape(4, 3) ** 2):
        objective = objectives.from_function('values', lambda s, t, b, values=values: jnp.asarray(values))
        loss, _ = apply(objective, {'mask': jnp.asarray(mask)})
        np.testing.assert_allclose(loss, values[mask].mean() if mask.any() else 0.0, rtol=1e-6)


@pytest.mark.parametrize(
    'mask', [np.ones(3, bool), np.ones(1, bool), np.ones((), bool), np.ones((3, 4), bool), np.ones(4, np.int32)], ids=repr
)
def test_masks_that_do_not_fit_are_refused(mask):
    with pytest.raises(ValueError, match=r"^batch\['mask'\] must be boolean, \[batch\] or [^\n]+$") as error:
        apply(first, {'mask': mask})
    assert str(error.value).endswith(f'got {mask.dtype} {mask.shape}')


def test_a_mask_of_tokens_picks_tokens_or_the_examples_that_have_any():
    """Values [batch, length, ...] by token; values [batch] where any token of the example counts."""
    mask = jnp.array([[True, False, False], [False, False, False], [True, True, True], [False, True, False]])
    tokens = np.arange(24, dtype=np.float32).reshape(4, 3, 2) ** 2
    objective = objectives.from_function('tokens', lambda s, t, b: jnp.asarray(tokens))
    np.testing.assert_allclose(apply(objective, {'mask': mask})[0], tokens[np.asarray(mask)].mean(), rtol=1e-6)
    np.testing.assert_allclose(apply(first, {'mask': mask})[0], (1 + 6 + 3) / 3, rtol=1e-6)


def test_a_batch_that_is_masked_out_gives_zero_and_zero_gradients():
    def loss(logits):
        return apply(first + 2.0 * second, {'mask': jnp.zeros(4, jnp.bool_)}, student=Outputs(logits))[0]

    value, gradient = jax.value_and_grad(loss)(STUDENT.logits)
    np.testing.assert_array_equal(value, 0.0)
    np.testing.assert_array_equal(gradient, np.zeros((4, 2)))


def test_scalars_are_taken_as_they_are_and_means_too():
    batch = {'mask': jnp.array([True, False, False, False])}
    scalar = objectives.from_function('scalar', lambda s, t, b: jnp.float32(7.0))
    assert apply(scalar, batch)[1]['scalar'] == metrics.Average(7.0, 1.0)
    mean = objectives.from_function('mean', lambda s, t, b: metrics.Average(jnp.float32(6.0), jnp.float32(4.0)))
    loss, values = apply(2.0 * mean, batch)
    assert values['mean'] == metrics.Average(6.0, 4.0)
    np.testing.assert_array_equal(loss, 3.0)


def test_no_gradient_reaches_the_teacher():
    def loss(student, teacher):
        return apply(gap, student=student, teacher=teacher)[0]

    gap = objectives.from_function('gap', lambda s, t, b: jnp.sum((s.logits - t.logits) ** 2, axis=1))
    student, teacher = jax.grad(loss, argnums=(0, 1))(STUDENT, TEACHER)
    np.testing.assert_allclose(student.logits, (STUDENT.logits - TEACHER.logits) / 2, rtol=1e-6)
    np.testing.assert_array_equal(teacher.logits, np.zeros((4, 2)))


def shapes(tree):
    """The shapes of a tree, without its numbers."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def test_init_needs_shapes_only_and_computes_no_term(key):
    seen = []

    def function(student, teacher, batch):
        seen.append(student.logits)
        return student.logits[:, 0] - teacher.logits[:, 0]

    objective = objectives.from_function('gap', function)
    batch = {'mask': jax.ShapeDtypeStruct((4,), jnp.bool_)}
    params, state = objective.init(key, shapes(STUDENT), shapes(TEACHER), batch)
    assert params == state == {'gap': {}}
    objective.init(key, STUDENT, TEACHER, {})
    assert seen
    assert all(isinstance(logits, jax.core.Tracer) for logits in seen)


def trained(name='trained'):
    """A term with a random parameter and a count of its calls, which is an extra metric too."""

    def init(key, student, teacher, batch):
        return jax.random.normal(key, student.logits.shape[1:]), jnp.int32(0)

    def apply(params, state, student, teacher, batch, *, step):
        values = jnp.dot(student.logits, params)
        return objectives.batch_mean(values, batch), {'calls': metrics.mean(state)}, state + 1

    return Objective((Term(name, init, apply),))


def test_parameters_and_state_are_kept_by_term(key):
    """Every term draws its own, trains its own, and gets back its own state."""
    objective = objectives.combine(a=trained(), b=2.0 * trained(), c=first)
    params, state = objective.init(key, shapes(STUDENT), shapes(TEACHER), {})
    assert set(params) == set(state) == {'a', 'b', 'c'}
    assert not np.array_equal(params['a'], params['b'])

    def loss(params, state):
        value, values, state = objective.apply(params, state, STUDENT, TEACHER, {}, step=0)
        return value, (values, state)

    means = jnp.mean(STUDENT.logits, axis=0)
    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    for calls in range(2):
        (value, (values, state)), gradients = step(params, state)
        np.testing.assert_allclose(value, jnp.dot(means, params['a']) + 2 * jnp.dot(means, params['b']) + 3, rtol=1e-5)
        np.testing.assert_allclose(gradients['a'], means, rtol=1e-6)
        np.testing.assert_allclose(gradients['b'], 2 * means, rtol=1e-6)
        assert divided(values)['a/calls'] == divided(values)['b/calls'] == calls
        assert (state['a'], state['b'], state['c']) == (calls + 1, calls + 1, {})


def test_init_is_a_pure_function_of_the_key(key):
    objective = trained() + trained()
    one, other = (objective.init(k, STUDENT, TEACHER, {})[0] for k in (key, jax.random.fold_in(key, 1)))
    again, _ = objective.init(key, STUDENT, TEACHER, {})
    assert_same(one, again)
    assert not np.array_equal(one['trained'], other['trained'])
