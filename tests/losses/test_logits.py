"""Losses on logits against float64 oracles written from the papers' formulas, and the properties that the formulas promise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from logit_checks import EXTREME_ROWS

from kdjax import losses

ROWS, CLASSES = 4, 5
INF = float('inf')
EXAMPLES = settings(max_examples=25, deadline=None, derandomize=True, database=None)
LOGITS = arrays(np.float32, (ROWS, CLASSES), elements=st.floats(-8, 8, width=32))
MASKS = arrays(np.bool_, (ROWS, CLASSES))
TEMPERATURES = st.floats(0.5, 8)


def kl_oracle(p, q):
    """Σ p (log p - log q), where 0 log 0 = 0."""
    return np.sum(p[p > 0] * (np.log(p[p > 0]) - np.log(q[p > 0])))


def softmax_oracle(z, temperature):
    """exp(z / T) / Σ exp(z / T), in float64."""
    exponentials = np.exp((z - z.max()) / temperature)
    return exponentials / exponentials.sum()


def soft_targets_oracle(s, t, temperature):
    """T² · Σ p_t (log p_t - log p_s)."""
    return temperature**2 * kl_oracle(softmax_oracle(t, temperature), softmax_oracle(s, temperature))


def logit_mse_oracle(s, t, temperature):
    """The mean of (z_s - z_t)²."""
    del temperature
    return np.mean((s - t) ** 2)


def by_rows(oracle, s, t, temperature, where):
    """The oracle on the kept classes of every row; 0 for a row where none is kept."""
    values = np.zeros(len(s))
    for i, keep in enumerate(where):
        if keep.any():
            values[i] = oracle(s[i][keep], t[i][keep], temperature)
    return values


def row_gradient(function, x, step=1e-6):
    """Central differences of a function whose value in a row depends on that row of `x` alone."""
    columns = np.eye(x.shape[1]) * step
    return np.stack([(function(x + column) - function(x - column)) / (2 * step) for column in columns], axis=-1)


def same_rows(*row):
    """The same example in every row."""
    return np.tile(np.array(row, np.float32), (ROWS, 1))


def apply_loss(name, student, teacher, temperature=4.0, **options):
    """Calls a loss with the arguments that it knows."""
    if name == 'logit_mse':
        return losses.logit_mse(student, teacher, **options)
    return losses.soft_targets(student, teacher, temperature=temperature, **options)


def value_and_gradients(name, student, teacher, temperature, where=None):
    """The values [rows], and the gradients of their sum with respect to student and teacher, as numpy arrays."""
    return jax.device_get(jitted(name, student, teacher, np.float32(temperature), where))


@functools.partial(jax.jit, static_argnames='name')
def jitted(name, student, teacher, temperature, where):
    """`value_and_gradients` on the device."""
    values, pullback = jax.vjp(lambda s, t: apply_loss(name, s, t, temperature, where=where), student, teacher)
    return values, *pullback(jnp.ones_like(values))


ORACLES = {'soft_targets': soft_targets_oracle, 'logit_mse': logit_mse_oracle}
every_loss = pytest.mark.parametrize('name', list(ORACLES))


@every_loss
@EXAMPLES
@given(LOGITS, LOGITS, TEMPERATURES, MASKS)
def test_values_and_gradients_equal_the_oracle_under_any_mask(name, student, teacher, temperature, where):
    """On sequences [batch, length, classes], which give [batch, length]."""
    sequences = [x.reshape(2, 2, *x.shape[1:]) for x in (student, teacher, where)]
    values, *gradients = value_and_gradients(name, *sequences[:2], temperature, sequences[2])
    s, t, temperature = student.astype(np.float64), teacher.astype(np.float64), float(np.float32(temperature))
    oracle = functools.partial(by_rows, ORACLES[name], temperature=temperature, where=where)
    assert values.shape == (2, 2)
    np.testing.assert_allclose(values.reshape(ROWS), oracle(s, t), rtol=1e-5, atol=1e-5)
    expected = row_gradient(lambda x: oracle(x, t), s), row_gradient(lambda x: oracle(s, x), t)
    for gradient, reference in zip(gradients, expected, strict=True):
        tolerance = 1e-5 * max(1.0, np.abs(reference).max())
        np.testing.assert_allclose(gradient.reshape(ROWS, CLASSES), reference, rtol=1e-5, atol=tolerance)


def test_the_default_temperature_is_four():
    s, t = np.random.default_rng(0).normal(size=(2, ROWS, CLASSES)).astype(np.float32)
    expected = by_rows(soft_targets_oracle, s.astype(np.float64), t.astype(np.float64), 4.0, np.ones_like(s, bool))
    np.testing.assert_allclose(jax.jit(losses.soft_targets)(s, t), expected, rtol=1e-5)


@every_loss
@EXAMPLES
@given(LOGITS, TEMPERATURES)
def test_equal_logits_give_exactly_zero_and_zero_gradients(name, logits, temperature):
    for result in value_and_gradients(name, logits, logits, temperature):
        np.testing.assert_array_equal(result, 0.0)


@EXAMPLES
@given(LOGITS, LOGITS, st.floats(0.1, 1e3), st.integers(-8, 0))
def test_divergences_are_never_negative_however_close(teacher, noise, temperature, exponent):
    """Rounding alone turns the plain Σ p (log p - log q) negative near p = q."""
    student = teacher + noise * np.float32(10.0**exponent)
    values, *_ = value_and_gradients('soft_targets', student, teacher, temperature)
    assert np.all(values >= 0)


@EXAMPLES
@given(LOGITS, LOGITS, *[arrays(np.int32, (ROWS, 1), elements=st.integers(-64, 64))] * 2)
def test_a_constant_added_to_all_logits_of_an_example_changes_nothing(student, teacher, for_student, for_teacher):
    # On a grid of 1/64 the additions are exact.
    student, teacher = (np.round(x * 64) / np.float32(64) for x in (student, teacher))
    shifted = student + for_student.astype(np.float32), teacher + for_teacher.astype(np.float32)
    before = value_and_gradients('soft_targets', student, teacher, 2.0)
    after = value_and_gradients('soft_targets', *shifted, 2.0)
    for x, y in zip(before, after, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@EXAMPLES
@given(LOGITS, LOGITS)
def test_high_temperatures_give_the_squared_difference_of_centred_logits(student, teacher):
    """T²·KL -> ||(z_s - mean z_s) - (z_t - mean z_t)||² / (2 C)."""
    value = jax.jit(losses.soft_targets)(student, teacher, temperature=1e3)
    difference = student.astype(np.float64) - teacher
    limit = np.sum((difference - difference.mean(axis=1, keepdims=True)) ** 2, axis=1) / (2 * CLASSES)
    # The limit is approached like 1 / T, and a difference of 0.01 is as far as float32 sees at this temperature.
    np.testing.assert_allclose(value, limit, rtol=1e-2, atol=1e-4)


@EXAMPLES
@given(LOGITS, LOGITS, TEMPERATURES, st.integers(-3, 3))
def test_scaling_logits_and_temperature_together_scales_the_loss_by_the_square(student, teacher, temperature, power):
    scale = np.float32(2.0**power)
    values, *gradients = value_and_gradients('soft_targets', student, teacher, temperature)
    scaled, *scaled_gradients = value_and_gradients(
        'soft_targets', scale * student, scale * teacher, scale * np.float32(temperature)
    )
    np.testing.assert_allclose(scaled, scale**2 * values, rtol=1e-6)
    for x, y in zip(gradients, scaled_gradients, strict=True):
        np.testing.assert_allclose(y, scale * x, rtol=1e-6)


@every_loss
@EXAMPLES
@given(LOGITS, LOGITS, st.permutations(range(ROWS)))
def test_permuting_the_batch_permutes_the_values(name, student, teacher, order):
    order = np.array(order)
    before = value_and_gradients(name, student, teacher, 4.0)
    after = value_and_gradients(name, student[order], teacher[order], 4.0)
    for x, y in zip(before, after, strict=True):
        np.testing.assert_array_equal(x[order], y)


@every_loss
@EXAMPLES
@given(LOGITS, LOGITS, st.permutations(range(CLASSES)))
def test_renaming_the_classes_changes_nothing(name, student, teacher, order):
    order = np.array(order)
    values, *_ = value_and_gradients(name, student, teacher, 4.0)
    renamed, *_ = value_and_gradients(name, student[:, order], teacher[:, order], 4.0)
    np.testing.assert_allclose(values, renamed, rtol=1e-5, atol=1e-5)


@every_loss
@pytest.mark.parametrize('temperature', [0.5, 1.0, 4.0])
def test_values_and_gradients_are_finite_for_every_pair_of_extreme_rows(name, temperature):
    """±1e4, constant rows, and -inf in one network, in both, or in a whole row."""
    pairs = [(s, t) for s in EXTREME_ROWS for t in EXTREME_ROWS]
    student, teacher = (np.stack(x) for x in zip(*pairs, strict=True))
    values, *gradients = value_and_gradients(name, student, teacher, temperature)
    assert np.all(np.isfinite(values))
    assert np.all(values >= 0)
    for gradient in gradients:
        assert np.all(np.isfinite(gradient))


@every_loss
def test_opposite_certainty_costs_what_the_formula_says(name):
    """Logits of ±1e4 on opposite sides: KL at T = 1 is the gap between the two logits."""
    student, teacher = np.full((2, ROWS, CLASSES), -1e4, np.float32)
    student[:, 0] = teacher[:, 1] = 1e4
    values, student_gradient, _ = value_and_gradients(name, student, teacher, 1.0)
    np.testing.assert_allclose(values, np.full(ROWS, 2 * 4e8 / CLASSES if name == 'logit_mse' else 2e4), rtol=1e-6)
    slope = 4e4 / CLASSES if name == 'logit_mse' else 1.0
    np.testing.assert_allclose(student_gradient, same_rows(slope, -slope, 0, 0, 0), rtol=1e-6, atol=1e-6)


@every_loss
def test_a_class_that_both_rule_out_is_as_good_as_sliced_away(name):
    student, teacher = np.random.default_rng(1).normal(size=(2, ROWS, CLASSES)).astype(np.float32)
    sliced = value_and_gradients(name, student[:, :3], teacher[:, :3], 2.0)
    student[:, 3:] = teacher[:, 3:] = -INF
    values, *gradients = value_and_gradients(name, student, teacher, 2.0)
    np.testing.assert_allclose(values, sliced[0], rtol=1e-6)
    for gradient, expected in zip(gradients, sliced[1:], strict=True):
        np.testing.assert_array_equal(gradient[:, 3:], 0.0)
        np.testing.assert_allclose(gradient[:, :3], expected, rtol=1e-5, atol=1e-6)


def test_a_class_that_the_teacher_rules_out_has_a_target_of_zero():
    student, teacher = same_rows(1, 2, 0.5, -1, 0), same_rows(0, 1, -INF, 3, -INF)
    p, q = (softmax_oracle(x[0].astype(np.float64), 2.0) for x in (teacher, student))
    values, student_gradient, _ = value_and_gradients('soft_targets', student, teacher, 2.0)
    np.testing.assert_allclose(values, np.full(ROWS, 4 * kl_oracle(p, q)), rtol=1e-5)
    np.testing.assert_allclose(student_gradient, same_rows(*(2 * (q - p))), rtol=1e-5, atol=1e-6)


def test_a_class_that_the_student_alone_rules_out_costs_a_lot_but_not_infinity():
    student, teacher = same_rows(1, -INF, 0.5, 2, 3), same_rows(0, 0, 0, 0, 0)
    values, student_gradient, _ = value_and_gradients('soft_targets', student, teacher, 1.0)
    np.testing.assert_allclose(values, np.full(ROWS, 1e30 / CLASSES), rtol=1e-5)
    # The classes that it does not rule out still learn.
    assert np.all(student_gradient[:, [0, 2, 3, 4]] != 0)


def test_logit_mse_leaves_out_classes_that_either_rules_out():
    student, teacher = same_rows(1, -INF, 5, -INF, 2), same_rows(3, 1, -INF, -INF, 2)
    values, *gradients = value_and_gradients('logit_mse', student, teacher, 1.0)
    np.testing.assert_array_equal(values, np.full(ROWS, 2.0))
    np.testing.assert_array_equal(gradients, [same_rows(-2, 0, 0, 0, 0), same_rows(2, 0, 0, 0, 0)])


def test_logit_mse_leaves_out_what_is_ruled_out_under_masks_too():
    """The mean is over the classes that are kept and that neither rules out, here the first alone."""
    student, teacher = same_rows(1, -INF, 5, -INF, 2), same_rows(3, 1, -INF, -INF, 9)
    values, *gradients = value_and_gradients('logit_mse', student, teacher, 1.0, np.tile(np.arange(CLASSES) < 4, (ROWS, 1)))
    np.testing.assert_array_equal(values, np.full(ROWS, 4.0))
    np.testing.assert_array_equal(gradients, [same_rows(-4, 0, 0, 0, 0), same_rows(4, 0, 0, 0, 0)])


def test_a_row_of_minus_infinity_is_uniform():
    student, teacher = np.full((ROWS, CLASSES), -INF, np.float32), same_rows(1, 2, 3, 4, 5)
    p = softmax_oracle(teacher[0].astype(np.float64), 4.0)
    values, student_gradient, _ = value_and_gradients('soft_targets', student, teacher, 4.0)
    np.testing.assert_allclose(values, np.full(ROWS, 16 * kl_oracle(p, np.full(CLASSES, 0.2))), rtol=1e-5)
    np.testing.assert_array_equal(student_gradient, np.zeros((ROWS, CLASSES)))


@pytest.mark.parametrize('temperature', [0.5, 1.0, 4.0])
def test_a_row_of_minus_infinity_is_one_of_zeros_under_masks_too(temperature):
    """Uniform over the classes that are kept, at every temperature; here the mask leaves nothing but ruled-out classes."""
    rng = np.random.default_rng(3)
    student, teacher = np.full((ROWS, CLASSES), -INF, np.float32), rng.normal(size=(ROWS, CLASSES)).astype(np.float32)
    zeros = np.zeros_like(student)
    whole, *_ = value_and_gradients('soft_targets', student, teacher, temperature)
    np.testing.assert_allclose(whole, value_and_gradients('soft_targets', zeros, teacher, temperature)[0], rtol=1e-5, atol=1e-6)
    student[:, 3:] = 1.0
    where = np.broadcast_to(np.arange(CLASSES) < 3, (ROWS, CLASSES))
    sequences = [x.reshape(2, 2, *x.shape[1:]) for x in (student, teacher, where)]
    masked, *_ = value_and_gradients('soft_targets', *sequences[:2], temperature, sequences[2])
    sliced, *_ = value_and_gradients('soft_targets', zeros[:, :3], teacher[:, :3], temperature)
    np.testing.assert_allclose(masked.reshape(ROWS), sliced, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('teacher', [2.0, -INF])
def test_one_class_teaches_nothing(teacher):
    student, teacher = np.array([[5.0]], np.float32), np.array([[teacher]], np.float32)
    for result in value_and_gradients('soft_targets', student, teacher, 4.0):
        np.testing.assert_array_equal(result, np.zeros(result.shape))


@pytest.mark.parametrize('name', ['soft_targets', 'logit_mse', 'hard_targets', 'dist'])
def test_one_example_gives_a_scalar(name):
    logits = jax.ShapeDtypeStruct((CLASSES,), jnp.float32)
    assert jax.eval_shape(getattr(losses, name), logits, logits).shape == ()


@functools.partial(jax.jit, static_argnames='name')
def with_gradients(name, student, teacher, where=None, **options):
    """The value of a loss with those options, and the gradients of its sum."""
    values, pullback = jax.vjp(lambda s, t: getattr(losses, name)(s, t, where=where, **options), student, teacher)
    return values, *pullback(jnp.ones_like(values))


def random_logits(seed=0):
    return np.random.default_rng(seed).normal(size=(2, ROWS, CLASSES)).astype(np.float32)


@EXAMPLES
@given(LOGITS, LOGITS, MASKS)
def test_hard_targets_are_the_cross_entropy_with_the_choice_of_the_teacher(student, teacher, where):
    """∂/∂z_s = p_s - 1[chosen], and nothing for the teacher; the first of equal logits is chosen."""
    teacher = np.round(teacher)  # so that there are equal ones
    values, gradient, of_teacher = jax.device_get(with_gradients('hard_targets', student, teacher, where))
    expected, slopes = np.zeros(ROWS), np.zeros((ROWS, CLASSES))
    for i, keep in enumerate(where):
        if keep.any():
            chosen = max(np.flatnonzero(keep), key=lambda c, i=i: (teacher[i, c], -c))
            slopes[i, keep] = softmax_oracle(student[i][keep].astype(np.float64), 1.0)
            expected[i] = -np.log(slopes[i, chosen])
            slopes[i, chosen] -= 1
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient, slopes, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(of_teacher, np.zeros_like(teacher))


def test_hard_targets_are_the_limit_of_soft_ones_of_a_cold_teacher():
    """Soft targets at temperature 1 plus the entropy of the teacher, which vanishes as its logits grow."""
    student, teacher = random_logits()
    soft = with_gradients('soft_targets', student, 1e3 * teacher, temperature=1.0)
    for x, y in zip(with_gradients('hard_targets', student, teacher)[:2], soft[:2], strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_a_choice_among_classes_that_are_all_ruled_out_is_the_first_that_is_kept():
    student, teacher = same_rows(1, 2, 3, 4, 5), same_rows(9, -INF, -INF, -INF, 9)
    where = np.array([False, False, True, True, False])
    values = with_gradients('hard_targets', student, teacher, where)[0]
    np.testing.assert_allclose(values, np.full(ROWS, np.log(1 + np.e)), rtol=1e-6)


def pearson(x, y):
    """The correlation with the 1e-8 of the published code."""
    x, y = x - x.mean(), y - y.mean()
    return np.sum(x * y) / (np.linalg.norm(x) * np.linalg.norm(y) + 1e-8)


def dist_oracle(s, t, temperature=1.0, beta=1.0, gamma=1.0):
    """T² (β · mean_b(1 - r of rows) + γ · mean_c(1 - r of columns)) of probabilities."""
    p, q = (np.stack([softmax_oracle(row, temperature) for row in z]) for z in (s, t))
    rows, columns = (np.mean([1 - pearson(*pair) for pair in zip(a, b, strict=True)]) for a, b in ((p, q), (p.T, q.T)))
    return temperature**2 * (beta * rows + gamma * columns)


def whole_gradient(function, x, step=1e-6):
    """Central differences of a function with scalar values."""
    steps = step * np.eye(x.size).reshape(*x.shape, *x.shape)
    return np.array([[(function(x + move) - function(x - move)) / (2 * step) for move in row] for row in steps])


@settings(EXAMPLES, max_examples=8)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1.0, 4.0]), st.floats(0, 2), st.floats(0, 2))
def test_dist_equals_the_oracle(seed, temperature, beta, gamma):
    student, teacher = random_logits(seed)
    options = {'temperature': temperature, 'beta': beta, 'gamma': gamma}
    value, *gradients = jax.device_get(with_gradients('dist', student, teacher, **options))
    s, t = student.astype(np.float64), teacher.astype(np.float64)
    scale = max(1.0, temperature**2)
    np.testing.assert_allclose(value, dist_oracle(s, t, **options), rtol=1e-5, atol=1e-5 * scale)
    oracles = lambda x: dist_oracle(x, t, **options), lambda x: dist_oracle(s, x, **options)
    for gradient, oracle, x in zip(gradients, oracles, (s, t), strict=True):
        reference = whole_gradient(oracle, x)
        np.testing.assert_allclose(gradient, reference, rtol=1e-4, atol=1e-5 * scale)


def test_dist_has_the_published_defaults_and_its_epsilon():
    """Probabilities of 1e-4 make an epsilon of 1e-8 count."""
    student, teacher = random_logits() * np.float32(0.5) - np.array([0, 0, 0, 0, 9], np.float32)
    expected = dist_oracle(student.astype(np.float64), teacher.astype(np.float64))
    np.testing.assert_allclose(losses.dist(student, teacher), expected, rtol=1e-5)


@pytest.mark.parametrize('examples', [[True, False, True, True], [False, True, False, False]])
def test_dist_of_the_kept_examples_and_classes_is_that_of_the_slice(examples):
    student, teacher = random_logits()
    rows, columns = np.array(examples), np.array([True, True, False, True, False])
    masked = jax.device_get(with_gradients('dist', student, teacher, rows[:, None] & columns))
    sliced = jax.device_get(with_gradients('dist', student[rows][:, columns], teacher[rows][:, columns]))
    np.testing.assert_allclose(masked[0], sliced[0], rtol=1e-6, atol=1e-6)
    for whole, part in zip(masked[1:], sliced[1:], strict=True):
        np.testing.assert_allclose(whole[rows][:, columns], part, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(whole[~rows], 0)
        np.testing.assert_array_equal(whole[:, ~columns], 0)


def test_dist_is_zero_where_probabilities_are_linearly_related():
    """p_s = 0.3 p_t + 0.7 / C has the rows and the columns of p_t, moved and scaled."""
    teacher = random_logits()[1]
    p = np.stack([softmax_oracle(row.astype(np.float64), 1.0) for row in teacher])
    student = np.log(0.3 * p + 0.7 / CLASSES).astype(np.float32)
    for s in (student, teacher):
        value, gradient, _ = with_gradients('dist', s, teacher)
        # What is left is the epsilon.
        np.testing.assert_allclose(value, dist_oracle(s.astype(np.float64), teacher.astype(np.float64)), atol=1e-7)
        np.testing.assert_allclose(value, 0, atol=1e-5)
        np.testing.assert_allclose(gradient, np.zeros_like(teacher), atol=1e-5)


def test_dist_does_not_see_the_order_of_examples_or_classes_or_the_axes_of_examples():
    student, teacher = random_logits()
    value = losses.dist(student, teacher)
    for order in ((slice(None, None, -1),), (slice(None), slice(None, None, -1))):
        np.testing.assert_allclose(losses.dist(student[order], teacher[order]), value, rtol=1e-5)
    np.testing.assert_allclose(losses.dist(*(x.reshape(2, 2, CLASSES) for x in (student, teacher))), value, rtol=1e-6)


@pytest.mark.parametrize('temperature', [0.5, 4.0])
def test_dist_is_finite_at_extremes_and_constant_rows_teach_nothing(temperature):
    teacher = random_logits()[1][:, :4]
    batches = [EXTREME_ROWS[i : i + 4] for i in range(len(EXTREME_ROWS) - 3)] + [np.zeros((4, 4), np.float32), teacher]
    student, others = (np.stack(x) for x in zip(*[(s, t) for s in batches for t in batches], strict=True))
    for result in jax.vmap(functools.partial(with_gradients, 'dist', temperature=temperature))(student, others):
        assert np.all(np.isfinite(result))
    value, gradient, _ = with_gradients('dist', np.full((4, 4), 3.3, np.float32), teacher)
    np.testing.assert_allclose(value, 2, rtol=1e-6)
    np.testing.assert_array_equal(gradient, np.zeros_like(teacher))


def standardized_oracle(z):
    """(z - mean) / (1e-7 + std), std with C - 1 degrees of freedom."""
    return (z - z.mean()) / (1e-7 + z.std(ddof=1))


@functools.partial(jax.jit, static_argnames='axis')
def standardized(logits, where=None, axis=-1):
    """Standardized logits, and the gradient of their products with 1, 2, 3 ..."""
    result, pullback = jax.vjp(lambda z: losses.standardize_logits(z, axis=axis, where=where), logits)
    weights = jnp.broadcast_to(jnp.arange(1.0, 1.0 + CLASSES), logits.shape) if axis == -1 else jnp.ones_like(result)
    return result, pullback(weights)[0]


@EXAMPLES
@given(st.integers(0, 2**32 - 1), st.permutations(range(CLASSES)), st.integers(2, CLASSES), st.booleans())
def test_standardized_logits_equal_the_oracle_on_the_classes_that_count(seed, order, count, by_mask):
    """The others are outside the mask, where they become 0, or at -inf, where they stay."""
    logits, counted = 3 * random_logits(seed)[0], np.isin(np.arange(CLASSES), order[:count])
    if not by_mask:
        logits[:, ~counted] = -INF
    result, gradient = jax.device_get(standardized(logits, counted | (not by_mask)))
    np.testing.assert_array_equal(result[:, ~counted], 0 if by_mask else -INF)
    np.testing.assert_array_equal(gradient[:, ~counted], 0)
    weights = np.arange(1.0, 1.0 + CLASSES)[counted]
    for row, z, slopes in zip(result, logits, gradient, strict=True):
        z = z[counted].astype(np.float64)
        np.testing.assert_allclose(row[counted], standardized_oracle(z), rtol=1e-5, atol=1e-5)
        expected = row_gradient(lambda x: np.array([weights @ standardized_oracle(row) for row in x]), z[None])[0]
        np.testing.assert_allclose(slopes[counted], expected, rtol=1e-4, atol=1e-4 * max(1.0, np.abs(expected).max()))


def test_positive_scales_and_shifts_do_not_survive_standardization():
    logits = random_logits()[0]
    np.testing.assert_allclose(losses.standardize_logits(100 * logits - 7), losses.standardize_logits(logits), atol=1e-5)
    small = losses.standardize_logits(logits, epsilon=3.0)
    deviation = logits.std(axis=1, ddof=1, keepdims=True)
    np.testing.assert_allclose(small * (3 + deviation), logits - logits.mean(axis=1, keepdims=True), atol=1e-5)


@pytest.mark.parametrize('row', [[0.1] * CLASSES, [1e4] * CLASSES, [-INF] * 4 + [3], [-INF] * CLASSES])
def test_equal_logits_become_zeros_with_zero_gradient(row):
    result, gradient = standardized(same_rows(*row))
    np.testing.assert_array_equal(result, np.where(np.isneginf(same_rows(*row)), -INF, 0))
    np.testing.assert_array_equal(gradient, np.zeros((ROWS, CLASSES)))


@pytest.mark.parametrize('classes', [6, 7, 10])
def test_equal_logits_become_zeros_where_their_mean_rounds_to_another_number(classes):
    """In float32 the sum of so many 0.3, divided by their number, is not 0.3."""
    result, pullback = jax.vjp(losses.standardize_logits, np.full((1, classes), 0.3, np.float32))
    np.testing.assert_array_equal(result, np.zeros((1, classes)))
    np.testing.assert_array_equal(pullback(jnp.ones_like(result))[0], np.zeros((1, classes)))


def test_standardization_of_one_class_of_halves_of_other_axes_and_of_what_is_no_logit():
    np.testing.assert_array_equal(losses.standardize_logits(np.array([[5.0]], np.float32)), [[0.0]])
    logits = random_logits()[0]
    half = jnp.asarray(logits, jnp.bfloat16)
    assert losses.standardize_logits(half).dtype == jnp.float32
    np.testing.assert_array_equal(losses.standardize_logits(half), losses.standardize_logits(half.astype(jnp.float32)))
    np.testing.assert_array_equal(standardized(logits.T, axis=0)[0], standardized(logits)[0].T)
    for result in standardized(logits, np.zeros(CLASSES, bool)):
        np.testing.assert_array_equal(result, np.zeros_like(logits))
    assert np.all(np.isfinite(standardized(same_rows(1e4, -1e4, 0, -INF, 1))[1]))
    for bad, options in ((logits.astype(np.int32), {}), (logits, {'axis': 2}), (logits, {'epsilon': 0.0})):
        with pytest.raises(ValueError, match=r'^standardize_logits: [^\n]+$'):
            losses.standardize_logits(bad, **options)


def test_standardization_takes_classes_in_the_middle():
    logits = np.random.default_rng(0).normal(size=(2, 3, CLASSES)).astype(np.float32)
    for axis in (0, 1):
        moved = losses.standardize_logits(np.moveaxis(logits, -1, axis), axis=axis)
        np.testing.assert_allclose(moved, np.moveaxis(losses.standardize_logits(logits), -1, axis), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('masked', [-INF, 1e15, -1e15])
def test_a_logit_that_a_mask_leaves_out_of_standardization_is_zero_whatever_it_was(masked):
    logits, where = random_logits()[0], np.arange(CLASSES) > 0
    expected = jax.device_get(standardized(logits, where))
    logits[:, 0] = masked
    for result, reference in zip(standardized(logits, where), expected, strict=True):
        np.testing.assert_array_equal(result, reference)
        np.testing.assert_array_equal(result[:, 0], 0)
