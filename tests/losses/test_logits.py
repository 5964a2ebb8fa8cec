"""Losses on logits against float64 oracles written from the papers' formulas, and the properties that the formulas promise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import gradient_checks
from helpers.logit_checks import (
    CLASSES,
    EXTREME_ROWS,
    ROWS,
    random_logits,
    row_gradient,
    same_rows,
)
from helpers.oracles import kl, log_softmax, softmax
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kdjax import losses

INF = float('inf')
EXAMPLES = settings(max_examples=25, deadline=None, derandomize=True, database=None)
LOGITS = arrays(np.float32, (ROWS, CLASSES), elements=st.floats(-8, 8, width=32))
MASKS = arrays(np.bool_, (ROWS, CLASSES))
TEMPERATURES = st.floats(0.5, 8)


def soft_targets_oracle(s, t, temperature):
    """T² · Σ p_t (log p_t - log p_s)."""
    return temperature**2 * kl(log_softmax(t, temperature), log_softmax(s, temperature))


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


def apply_loss(name, student, teacher, temperature=4.0, **options):
    """Calls a loss with the arguments that it knows."""
    if name == 'logit_mse':
        return losses.logit_mse(student, teacher, **options)
    return losses.soft_targets(student, teacher, temperature=temperature, **options)


def value_and_gradients(name, student, teacher, temperature, where=None):
    """The values [rows], and the gradients of their sum with respect to student and teacher, as numpy arrays."""
    options = {} if name == 'logit_mse' else {'temperature': np.float32(temperature)}
    return gradient_checks.value_and_gradients(name, student, teacher, where=where, **options)


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
    p, q = (log_softmax(x[0], 2.0) for x in (teacher, student))
    values, student_gradient, _ = value_and_gradients('soft_targets', student, teacher, 2.0)
    np.testing.assert_allclose(values, np.full(ROWS, 4 * kl(p, q)), rtol=1e-5)
    np.testing.assert_allclose(student_gradient, same_rows(*(2 * (np.exp(q) - np.exp(p)))), rtol=1e-5, atol=1e-6)


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
    p = log_softmax(teacher[0], 4.0)
    values, student_gradient, _ = value_and_gradients('soft_targets', student, teacher, 4.0)
    np.testing.assert_allclose(values, np.full(ROWS, 16 * kl(p, np.full(CLASSES, -np.log(CLASSES)))), rtol=1e-5)
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


@pytest.mark.parametrize('name', ['soft_targets', 'logit_mse', 'hard_targets', 'dist'])
def test_one_example_gives_a_scalar(name):
    logits = jax.ShapeDtypeStruct((CLASSES,), jnp.float32)
    assert jax.eval_shape(getattr(losses, name), logits, logits).shape == ()


@EXAMPLES
@given(LOGITS, LOGITS, MASKS)
def test_hard_targets_are_the_cross_entropy_with_the_choice_of_the_teacher(student, teacher, where):
    """∂/∂z_s = p_s - 1[chosen], and nothing for the teacher; the first of equal logits is chosen."""
    teacher = np.round(teacher)  # so that there are equal ones
    values, gradient, of_teacher = jax.device_get(gradient_checks.with_gradients('hard_targets', student, teacher, where=where))
    expected, slopes = np.zeros(ROWS), np.zeros((ROWS, CLASSES))
    for i, keep in enumerate(where):
        if keep.any():
            chosen = max(np.flatnonzero(keep), key=lambda c, i=i: (teacher[i, c], -c))
            slopes[i, keep] = softmax(student[i][keep])
            expected[i] = -np.log(slopes[i, chosen])
            slopes[i, chosen] -= 1
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient, slopes, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(of_teacher, np.zeros_like(teacher))


def test_hard_targets_are_the_limit_of_soft_ones_of_a_cold_teacher():
    """Soft targets at temperature 1 plus the entropy of the teacher, which vanishes as its logits grow."""
    student, teacher = random_logits()
    soft = gradient_checks.with_gradients('soft_targets', student, 1e3 * teacher, temperature=1.0)
    for x, y in zip(gradient_checks.with_gradients('hard_targets', student, teacher)[:2], soft[:2], strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_a_choice_among_classes_that_are_all_ruled_out_is_the_first_that_is_kept():
    student, teacher = same_rows(1, 2, 3, 4, 5), same_rows(9, -INF, -INF, -INF, 9)
    where = np.array([False, False, True, True, False])
    values = gradient_checks.with_gradients('hard_targets', student, teacher, where=where)[0]
    np.testing.assert_allclose(values, np.full(ROWS, np.log(1 + np.e)), rtol=1e-6)
