"""Losses on logits against float64 oracles written from the papers' formulas, and the properties that the formulas promise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kdjax import losses

ROWS, CLASSES = 4, 5
INF = float('inf')
EXAMPLES = settings(max_examples=25, deadline=None, derandomize=True, database=None)
LOGITS = arrays(np.float32, (ROWS, CLASSES), elements=st.floats(-8, 8, width=32))
LABELS = arrays(np.int32, (ROWS,), elements=st.integers(0, CLASSES - 1))
MASKS = arrays(np.bool_, (ROWS, CLASSES))
NO_LABELS = np.zeros(ROWS, np.int32)
TEMPERATURES = st.floats(0.5, 8)


def kl_oracle(p, q):
    """Σ p (log p - log q), where 0 log 0 = 0."""
    return np.sum(p[p > 0] * (np.log(p[p > 0]) - np.log(q[p > 0])))


def softmax_oracle(z, temperature):
    """exp(z / T) / Σ exp(z / T), in float64."""
    exponentials = np.exp((z - z.max()) / temperature)
    return exponentials / exponentials.sum()


def soft_targets_oracle(s, t, label, temperature):
    """T² · Σ p_t (log p_t - log p_s)."""
    del label
    return temperature**2 * kl_oracle(softmax_oracle(t, temperature), softmax_oracle(s, temperature))


def logit_mse_oracle(s, t, label, temperature):
    """The mean of (z_s - z_t)²."""
    del label, temperature
    return np.mean((s - t) ** 2)


def decoupled_kd_oracle(s, t, label, temperature, *, alpha=1.0, beta=1.0):
    """T² (α·TCKD + β·NCKD), with the pairs [p(y), Σ_{c≠y} p(c)] and the renormalised others."""
    pairs, others = [], []
    for z in (t, s):
        p = softmax_oracle(z, temperature)
        rest = np.delete(p, label)
        pairs.append(np.array([p[label], rest.sum()]))
        others.append(rest / rest.sum() if rest.size else rest)
    return temperature**2 * (alpha * kl_oracle(*pairs) + beta * kl_oracle(*others))


def by_rows(oracle, s, t, labels, temperature, where):
    """The oracle on the kept classes of every row; 0 for a row where none is kept."""
    values = np.zeros(len(s))
    for i, keep in enumerate(where):
        if keep.any():
            label = np.flatnonzero(keep).tolist().index(labels[i]) if keep[labels[i]] else 0
            values[i] = oracle(s[i][keep], t[i][keep], label, temperature)
    return values


def row_gradient(function, x, step=1e-6):
    """Central differences of a function whose value in a row depends on that row of `x` alone."""
    columns = np.eye(x.shape[1]) * step
    return np.stack([(function(x + column) - function(x - column)) / (2 * step) for column in columns], axis=-1)


def same_rows(*row):
    """The same example in every row."""
    return np.tile(np.array(row, np.float32), (ROWS, 1))


def apply_loss(name, student, teacher, labels, temperature=4.0, **options):
    """Calls any of the three losses with the arguments that it knows."""
    if name == 'logit_mse':
        return losses.logit_mse(student, teacher, **options)
    if name == 'soft_targets':
        return losses.soft_targets(student, teacher, temperature=temperature, **options)
    return losses.decoupled_kd(student, teacher, labels, temperature=temperature, **{'alpha': 1.0, 'beta': 1.0, **options})


def value_and_gradients(name, student, teacher, labels, temperature, where=None):
    """The values [rows], and the gradients of their sum with respect to student and teacher, as numpy arrays."""
    return jax.device_get(jitted(name, student, teacher, labels, np.float32(temperature), where))


@functools.partial(jax.jit, static_argnames='name')
def jitted(name, student, teacher, labels, temperature, where):
    """`value_and_gradients` on the device."""
    values, pullback = jax.vjp(lambda s, t: apply_loss(name, s, t, labels, temperature, where=where), student, teacher)
    return values, *pullback(jnp.ones_like(values))


ORACLES = {'soft_targets': soft_targets_oracle, 'logit_mse': logit_mse_oracle, 'decoupled_kd': decoupled_kd_oracle}
every_loss = pytest.mark.parametrize('name', list(ORACLES))
on_distributions = pytest.mark.parametrize('name', ['soft_targets', 'decoupled_kd'])


@every_loss
@EXAMPLES
@given(LOGITS, LOGITS, LABELS, TEMPERATURES, MASKS)
def test_values_and_gradients_equal_the_oracle_under_any_mask(name, student, teacher, labels, temperature, where):
    """On sequences [batch, length, classes], which give [batch, length]."""
    if name == 'decoupled_kd':
        where[np.arange(ROWS), labels] = True
    sequences = [x.reshape(2, 2, *x.shape[1:]) for x in (student, teacher, labels, where)]
    values, *gradients = value_and_gradients(name, *sequences[:3], temperature, sequences[3])
    s, t, temperature = student.astype(np.float64), teacher.astype(np.float64), float(np.float32(temperature))
    oracle = functools.partial(by_rows, ORACLES[name], labels=labels, temperature=temperature, where=where)
    assert values.shape == (2, 2)
    np.testing.assert_allclose(values.reshape(ROWS), oracle(s, t), rtol=1e-5, atol=1e-5)
    expected = row_gradient(lambda x: oracle(x, t), s), row_gradient(lambda x: oracle(s, x), t)
    for gradient, reference in zip(gradients, expected, strict=True):
        tolerance = 1e-5 * max(1.0, np.abs(reference).max())
        np.testing.assert_allclose(gradient.reshape(ROWS, CLASSES), reference, rtol=1e-5, atol=tolerance)


@EXAMPLES
@given(LOGITS, LOGITS, LABELS, st.floats(0, 2), st.floats(0, 8))
def test_decoupled_kd_weighs_its_two_parts(student, teacher, labels, alpha, beta):
    """With the default temperature of 4."""
    values = jax.jit(losses.decoupled_kd)(student, teacher, labels, alpha=jnp.float32(alpha), beta=jnp.float32(beta))
    oracle = functools.partial(decoupled_kd_oracle, alpha=alpha, beta=beta)
    s, t = student.astype(np.float64), teacher.astype(np.float64)
    expected = by_rows(oracle, s, t, labels, 4.0, np.ones_like(student, bool))
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-5 * max(1.0, alpha, beta))


def test_defaults_are_the_published_ones():
    s, t = np.random.default_rng(0).normal(size=(2, ROWS, CLASSES)).astype(np.float32)
    labels = np.array([0, 1, 2, 4])
    where = np.ones_like(s, bool)
    soft = by_rows(soft_targets_oracle, s.astype(np.float64), t.astype(np.float64), labels, 4.0, where)
    np.testing.assert_allclose(jax.jit(losses.soft_targets)(s, t), soft, rtol=1e-5)
    oracle = functools.partial(decoupled_kd_oracle, alpha=1.0, beta=8.0)
    decoupled = by_rows(oracle, s.astype(np.float64), t.astype(np.float64), labels, 4.0, where)
    np.testing.assert_allclose(jax.jit(losses.decoupled_kd)(s, t, labels), decoupled, rtol=1e-5)


@every_loss
@EXAMPLES
@given(LOGITS, LABELS, TEMPERATURES)
def test_equal_logits_give_exactly_zero_and_zero_gradients(name, logits, labels, temperature):
    for result in value_and_gradients(name, logits, logits, labels, temperature):
        np.testing.assert_array_equal(result, 0.0)


@on_distributions
@EXAMPLES
@given(LOGITS, LOGITS, LABELS, st.floats(0.1, 1e3), st.integers(-8, 0))
def test_divergences_are_never_negative_however_close(name, teacher, noise, labels, temperature, exponent):
    """Rounding alone turns the plain Σ p (log p - log q) negative near p = q."""
    student = teacher + noise * np.float32(10.0**exponent)
    values, *_ = value_and_gradients(name, student, teacher, labels, temperature)
    assert np.all(values >= 0)


@on_distributions
@EXAMPLES
@given(LOGITS, LOGITS, LABELS, *[arrays(np.int32, (ROWS, 1), elements=st.integers(-64, 64))] * 2)
def test_a_constant_added_to_all_logits_of_an_example_changes_nothing(name, student, teacher, labels, for_student, for_teacher):
    # On a grid of 1/64 the additions are exact.
    student, teacher = (np.round(x * 64) / np.float32(64) for x in (student, teacher))
    shifted = student + for_student.astype(np.float32), teacher + for_teacher.astype(np.float32)
    before = value_and_gradients(name, student, teacher, labels, 2.0)
    after = value_and_gradients(name, *shifted, labels, 2.0)
    for x, y in zip(before, after, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@EXAMPLES
@given(LOGITS, LOGITS, LABELS, TEMPERATURES)
def test_soft_targets_is_target_class_plus_non_target_class_divergence(student, teacher, labels, temperature):
    """KD = TCKD + (1 - p_t(y))·NCKD."""
    decoupled = jax.jit(losses.decoupled_kd)
    target = decoupled(student, teacher, labels, alpha=1.0, beta=0.0, temperature=temperature)
    others = decoupled(student, teacher, labels, alpha=0.0, beta=1.0, temperature=temperature)
    rest = [1 - softmax_oracle(t.astype(np.float64), temperature)[y] for t, y in zip(teacher, labels, strict=True)]
    whole = jax.jit(losses.soft_targets)(student, teacher, temperature=temperature)
    np.testing.assert_allclose(whole, target + np.array(rest) * others, rtol=1e-5, atol=1e-5)


@EXAMPLES
@given(LOGITS, LOGITS, LABELS)
def test_non_target_part_is_soft_targets_with_the_labelled_class_deleted(student, teacher, labels):
    part = jax.jit(losses.decoupled_kd)(student, teacher, labels, alpha=0.0, beta=1.0)
    keep = np.arange(CLASSES) != labels[:, None]
    deleted = (x[keep].reshape(ROWS, CLASSES - 1) for x in (student, teacher))
    np.testing.assert_allclose(part, jax.jit(losses.soft_targets)(*deleted), rtol=1e-5, atol=1e-5)


@EXAMPLES
@given(LOGITS, LOGITS, LABELS)
def test_confident_networks_keep_the_non_target_part(student, teacher, labels):
    """Where p(y) rounds to 1, log(1 - p(y)) would be -inf; the divergence of the others must not notice."""
    others = np.arange(CLASSES) != labels[:, None]
    confident = (np.where(others, x, np.float32(1e4)) for x in (student, teacher))
    values, *_ = value_and_gradients('decoupled_kd', *confident, labels, 4.0)
    deleted = (x[others].reshape(ROWS, CLASSES - 1) for x in (student, teacher))
    np.testing.assert_allclose(values, jax.jit(losses.soft_targets)(*deleted), rtol=1e-5, atol=1e-5)


@EXAMPLES
@given(LOGITS, LOGITS)
def test_high_temperatures_give_the_squared_difference_of_centred_logits(student, teacher):
    """T²·KL -> ||(z_s - mean z_s) - (z_t - mean z_t)||² / (2 C)."""
    value = jax.jit(losses.soft_targets)(student, teacher, temperature=1e3)
    difference = student.astype(np.float64) - teacher
    limit = np.sum((difference - difference.mean(axis=1, keepdims=True)) ** 2, axis=1) / (2 * CLASSES)
    # The limit is approached like 1 / T, and a difference of 0.01 is as far as float32 sees at this temperature.
    np.testing.assert_allclose(value, limit, rtol=1e-2, atol=1e-4)


@on_distributions
@EXAMPLES
@given(LOGITS, LOGITS, LABELS, TEMPERATURES, st.integers(-3, 3))
def test_scaling_logits_and_temperature_together_scales_the_loss_by_the_square(
    name, student, teacher, labels, temperature, power
):
    scale = np.float32(2.0**power)
    values, *gradients = value_and_gradients(name, student, teacher, labels, temperature)
    scaled, *scaled_gradients = value_and_gradients(
        name, scale * student, scale * teacher, labels, scale * np.float32(temperature)
    )
    np.testing.assert_allclose(scaled, scale**2 * values, rtol=1e-6)
    for x, y in zip(gradients, scaled_gradients, strict=True):
        np.testing.assert_allclose(y, scale * x, rtol=1e-6)


@every_loss
@EXAMPLES
@given(LOGITS, LOGITS, LABELS, st.permutations(range(ROWS)))
def test_permuting_the_batch_permutes_the_values(name, student, teacher, labels, order):
    order = np.array(order)
    before = value_and_gradients(name, student, teacher, labels, 4.0)
    after = value_and_gradients(name, student[order], teacher[order], labels[order], 4.0)
    for x, y in zip(before, after, strict=True):
        np.testing.assert_array_equal(x[order], y)


@every_loss
@EXAMPLES
@given(LOGITS, LOGITS, LABELS, st.permutations(range(CLASSES)))
def test_renaming_the_classes_changes_nothing(name, student, teacher, labels, order):
    order = np.array(order)
    values, *_ = value_and_gradients(name, student, teacher, labels, 4.0)
    renamed, *_ = value_and_gradients(name, student[:, order], teacher[:, order], np.argsort(order)[labels], 4.0)
    np.testing.assert_allclose(values, renamed, rtol=1e-5, atol=1e-5)


EXTREME_ROWS = np.array(
    [
        [0.0, 0.0, 0.0, 0.0],
        [7.0, 7.0, 7.0, 7.0],
        [1e4, -1e4, 0.0, 1.0],
        [-1e4, 1e4, 1e4, -1e4],
        [-1e4, -1e4, -1e4, -1e4],
        [0.0, 1.0, -INF, 2.0],
        [-INF, 1.0, 2.0, 3.0],
        [-INF, -INF, -INF, 3.0],
        [3.0, -INF, -INF, -INF],
        [1e4, -INF, -1e4, -INF],
        [-INF, -INF, -INF, -INF],
    ],
    np.float32,
)


@every_loss
@pytest.mark.parametrize('temperature', [0.5, 1.0, 4.0])
def test_values_and_gradients_are_finite_for_every_pair_of_extreme_rows(name, temperature):
    """±1e4, constant rows, and -inf in one network, in both, or in a whole row; the label may be ruled out too."""
    pairs = [(s, t, y) for s in EXTREME_ROWS for t in EXTREME_ROWS for y in (0, 3)]
    student, teacher, labels = (np.stack(x) for x in zip(*pairs, strict=True))
    values, *gradients = value_and_gradients(name, student, teacher, labels, temperature)
    assert np.all(np.isfinite(values))
    assert np.all(values >= 0)
    for gradient in gradients:
        assert np.all(np.isfinite(gradient))


@every_loss
def test_opposite_certainty_costs_what_the_formula_says(name):
    """Logits of ±1e4 on opposite sides: KL at T = 1 is the gap between the two logits."""
    student, teacher = np.full((2, ROWS, CLASSES), -1e4, np.float32)
    student[:, 0] = teacher[:, 1] = 1e4
    values, student_gradient, _ = value_and_gradients(name, student, teacher, NO_LABELS, 1.0)
    np.testing.assert_allclose(values, np.full(ROWS, 2 * 4e8 / CLASSES if name == 'logit_mse' else 2e4), rtol=1e-6)
    slope = 4e4 / CLASSES if name == 'logit_mse' else 1.0
    np.testing.assert_allclose(student_gradient, same_rows(slope, -slope, 0, 0, 0), rtol=1e-6, atol=1e-6)


@every_loss
def test_a_class_that_both_rule_out_is_as_good_as_sliced_away(name):
    student, teacher = np.random.default_rng(1).normal(size=(2, ROWS, CLASSES)).astype(np.float32)
    labels = np.array([0, 1, 1, 0])
    sliced = value_and_gradients(name, student[:, :3], teacher[:, :3], labels, 2.0)
    student[:, 3:] = teacher[:, 3:] = -INF
    values, *gradients = value_and_gradients(name, student, teacher, labels, 2.0)
    np.testing.assert_allclose(values, sliced[0], rtol=1e-6)
    for gradient, expected in zip(gradients, sliced[1:], strict=True):
        np.testing.assert_array_equal(gradient[:, 3:], 0.0)
        np.testing.assert_allclose(gradient[:, :3], expected, rtol=1e-5, atol=1e-6)


def test_a_class_that_the_teacher_rules_out_has_a_target_of_zero():
    student, teacher = same_rows(1, 2, 0.5, -1, 0), same_rows(0, 1, -INF, 3, -INF)
    p, q = (softmax_oracle(x[0].astype(np.float64), 2.0) for x in (teacher, student))
    values, student_gradient, _ = value_and_gradients('soft_targets', student, teacher, NO_LABELS, 2.0)
    np.testing.assert_allclose(values, np.full(ROWS, 4 * kl_oracle(p, q)), rtol=1e-5)
    np.testing.assert_allclose(student_gradient, same_rows(*(2 * (q - p))), rtol=1e-5, atol=1e-6)


def test_a_class_that_the_student_alone_rules_out_costs_a_lot_but_not_infinity():
    student, teacher = same_rows(1, -INF, 0.5, 2, 3), same_rows(0, 0, 0, 0, 0)
    values, student_gradient, _ = value_and_gradients('soft_targets', student, teacher, NO_LABELS, 1.0)
    np.testing.assert_allclose(values, np.full(ROWS, 1e30 / CLASSES), rtol=1e-5)
    # The classes that it does not rule out still learn.
    assert np.all(student_gradient[:, [0, 2, 3, 4]] != 0)


def test_logit_mse_leaves_out_classes_that_either_rules_out():
    student, teacher = same_rows(1, -INF, 5, -INF, 2), same_rows(3, 1, -INF, -INF, 2)
    values, *gradients = value_and_gradients('logit_mse', student, teacher, NO_LABELS, 1.0)
    np.testing.assert_array_equal(values, np.full(ROWS, 2.0))
    np.testing.assert_array_equal(gradients, [same_rows(-2, 0, 0, 0, 0), same_rows(2, 0, 0, 0, 0)])


def test_a_row_of_minus_infinity_is_uniform():
    student, teacher = np.full((ROWS, CLASSES), -INF, np.float32), same_rows(1, 2, 3, 4, 5)
    p = softmax_oracle(teacher[0].astype(np.float64), 4.0)
    values, student_gradient, _ = value_and_gradients('soft_targets', student, teacher, NO_LABELS, 4.0)
    np.testing.assert_allclose(values, np.full(ROWS, 16 * kl_oracle(p, np.full(CLASSES, 0.2))), rtol=1e-5)
    np.testing.assert_array_equal(student_gradient, np.zeros((ROWS, CLASSES)))


@on_distributions
@pytest.mark.parametrize('temperature', [0.5, 1.0, 4.0])
def test_a_row_of_minus_infinity_is_one_of_zeros_under_masks_too(name, temperature):
    """Uniform over the classes that are kept, at every temperature; here the mask leaves nothing but ruled-out classes."""
    rng = np.random.default_rng(3)
    student, teacher = np.full((ROWS, CLASSES), -INF, np.float32), rng.normal(size=(ROWS, CLASSES)).astype(np.float32)
    zeros, labels = np.zeros_like(student), np.array([0, 1, 2, 0], np.int32)
    whole, *_ = value_and_gradients(name, student, teacher, labels, temperature)
    np.testing.assert_allclose(whole, value_and_gradients(name, zeros, teacher, labels, temperature)[0], rtol=1e-5, atol=1e-6)
    student[:, 3:] = 1.0
    where = np.broadcast_to(np.arange(CLASSES) < 3, (ROWS, CLASSES))
    sequences = [x.reshape(2, 2, *x.shape[1:]) for x in (student, teacher, labels, where)]
    masked, *_ = value_and_gradients(name, *sequences[:3], temperature, sequences[3])
    sliced, *_ = value_and_gradients(name, zeros[:, :3], teacher[:, :3], labels, temperature)
    np.testing.assert_allclose(masked.reshape(ROWS), sliced, rtol=1e-5, atol=1e-6)


@on_distributions
@pytest.mark.parametrize('teacher', [2.0, -INF])
def test_one_class_teaches_nothing(name, teacher):
    student, teacher = np.array([[5.0]], np.float32), np.array([[teacher]], np.float32)
    for result in value_and_gradients(name, student, teacher, np.array([0]), 4.0):
        np.testing.assert_array_equal(result, np.zeros(result.shape))


@every_loss
def test_one_example_gives_a_scalar(name):
    logits = jax.ShapeDtypeStruct((CLASSES,), jnp.float32)
    loss = functools.partial(apply_loss, name)
    assert jax.eval_shape(loss, logits, logits, jax.ShapeDtypeStruct((), jnp.int32)).shape == ()
