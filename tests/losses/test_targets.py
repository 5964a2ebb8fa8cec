"""Losses for several labels at a time and for numbers: float64 oracles, labels that are unknown or wrong, extremes, masks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.gradient_checks import with_gradients
from helpers.logit_checks import EXTREME_ROWS, assert_slope, doubles, random, row_gradient
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kdjax import losses

SHAPE = (4, 5)
WHERE = np.random.default_rng(5).random(SHAPE) < 0.7
LABELS = np.array([[0, 1, 1, 0, -1], [1, -1, -2, 0, 0], [0, 0, 0, 0, 0], [-1, -1, -1, -1, -1]], np.int32)
WEIGHTS = np.array([1, 2, 0, 0.5, 3], np.float32)


def log_sigmoid(z):
    return -np.logaddexp(0, -z)


def mean(values, where):
    """Over the last axis, 0 where nothing is kept."""
    return np.sum(np.where(where, values, 0), axis=-1) / np.maximum(np.sum(where, axis=-1), 1)


def labels_oracle(logits, labels, weights, where):
    weights = np.where(where & (labels >= 0), weights, 0)
    values = -labels * log_sigmoid(logits) - (1 - labels) * log_sigmoid(-logits)
    total = weights.sum(-1)
    return np.sum(weights * values, axis=-1) / np.where(total == 0, 1, total)


def soft_oracle(student, teacher, temperature, where):
    s, t = student / temperature, teacher / temperature
    p = np.exp(log_sigmoid(t))
    values = p * (log_sigmoid(t) - log_sigmoid(s)) + (1 - p) * (log_sigmoid(-t) - log_sigmoid(-s))
    return temperature**2 * mean(values, where)


def regression_oracle(student, targets, delta, where):
    e = np.abs(student - targets)
    return mean(e**2 if delta is None else np.where(e <= delta, e**2 / 2, delta * (e - delta / 2)), where)


def bounded_oracle(student, teacher, targets, margin, where):
    of_student, of_teacher = (np.sum(np.where(where, (x - targets) ** 2, 0), axis=-1) for x in (student, teacher))
    return np.where(of_student + margin > of_teacher, of_student, 0)


@functools.partial(jax.jit, static_argnums=0)
def values_and_gradient(function, x, *rest, **options):
    """The values, and the gradient of their sum with respect to the first argument."""
    values, pullback = jax.vjp(lambda x: function(x, *rest, **options), x)
    return values, pullback(jnp.ones_like(values))[0]


@pytest.mark.parametrize('kind', ['integers', 'booleans', 'probabilities'])
@pytest.mark.parametrize('weights', [None, WEIGHTS])
def test_binary_labels_equals_the_oracle(kind, weights):
    """Unknown labels and classes of weight 0 do not count, whatever their logits; a row of nothing else is 0."""
    logits = 3 * random(*SHAPE)
    labels = {'integers': LABELS, 'booleans': LABELS > 0, 'probabilities': np.float32(np.clip(logits, 0, 1))}[kind]
    counted = WHERE & (LABELS >= 0) if kind == 'integers' else WHERE
    counted = counted if weights is None else counted & (weights > 0)
    filled = np.where(counted, logits, np.nan).astype(np.float32)
    values, gradient = values_and_gradient(losses.binary_labels, filled, labels, class_weights=weights, where=WHERE)

    def oracle(z):
        return labels_oracle(z, np.float64(labels), 1.0 if weights is None else weights, WHERE)

    np.testing.assert_allclose(values, oracle(np.float64(logits)), rtol=1e-5)
    np.testing.assert_allclose(gradient, row_gradient(oracle, np.float64(logits)), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(gradient[~counted], 0)
    eager = losses.binary_labels(filled, labels, class_weights=weights, where=WHERE)
    np.testing.assert_allclose(eager, values, rtol=1e-6, atol=1e-7)
    moved = losses.binary_labels(filled.T, labels.T, class_weights=weights, where=WHERE.T, axis=0)
    np.testing.assert_allclose(moved, values, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('label', [2, -0.5, 1.5, float('nan')])
def test_binary_labels_beyond_0_and_1_are_refused_or_nan(label):
    """Refused where they are known, on a mesh too, and NaN where they are traced; what is not kept may be anything."""
    labels = np.zeros(SHAPE, np.int32 if isinstance(label, int) else np.float32)
    labels[2, 1] = label
    with pytest.raises(ValueError, match=rf'^binary_labels: labels must be 0 or 1.*got {label}$'):
        losses.binary_labels(random(*SHAPE), labels)
    mesh = jax.make_mesh((4,), ('data',), axis_types=(AxisType.Explicit,), devices=jax.devices()[:4])
    split = jax.device_put((random(*SHAPE), labels), NamedSharding(mesh, PartitionSpec('data')))
    with pytest.raises(ValueError, match=rf'^binary_labels: labels must be 0 or 1.*got {label}$'):
        losses.binary_labels(*split)
    values, _ = values_and_gradient(losses.binary_labels, random(*SHAPE), labels)
    np.testing.assert_array_equal(np.isnan(values), [False, False, True, False])
    kept = labels == 0
    values, gradient = values_and_gradient(losses.binary_labels, random(*SHAPE), labels, where=kept)
    np.testing.assert_allclose(values, losses.binary_labels(random(*SHAPE), labels, where=kept), rtol=1e-6)
    assert np.all(np.isfinite(values))
    assert gradient[2, 1] == 0


@pytest.mark.parametrize('temperature', [0.5, 1.0, 4.0])
def test_binary_soft_targets_equals_the_oracle(temperature):
    student, teacher = 3 * random(*SHAPE), 3 * random(*SHAPE, seed=1)
    values, *gradients = with_gradients('binary_soft_targets', student, teacher, where=WHERE, temperature=temperature)
    exact = doubles(student, teacher)
    np.testing.assert_allclose(values, soft_oracle(*exact, temperature, WHERE), rtol=1e-5, atol=1e-6)
    assert_slope(lambda s: soft_oracle(s, exact[1], temperature, WHERE), exact[0], gradients[0])
    assert_slope(lambda t: soft_oracle(exact[0], t, temperature, WHERE), exact[1], gradients[1])


def test_binary_soft_targets_of_one_class_are_soft_targets_of_two():
    """With the logits z and 0; at equality exactly 0, near it and at high temperatures to three digits."""
    student, teacher = random(8, 1), random(8, 1, seed=1)

    def two(x):
        return np.concatenate([x, np.zeros_like(x)], axis=1)

    expected = losses.soft_targets(two(student), two(teacher), temperature=2.0)
    np.testing.assert_allclose(losses.binary_soft_targets(student, teacher, temperature=2.0), expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(losses.binary_soft_targets(student, student), np.zeros(8))
    near = student + np.float32(1e-2)
    for temperature in (1.0, 50.0):
        oracle = soft_oracle(*doubles(student, near), temperature, np.array(True))
        np.testing.assert_allclose(losses.binary_soft_targets(student, near, temperature=temperature), oracle, rtol=1e-2)


def test_binary_losses_are_finite_at_extremes():
    """Of ±1e4, and of -inf, which is a certain no."""
    for teacher in (EXTREME_ROWS, EXTREME_ROWS[::-1]):
        results = with_gradients('binary_soft_targets', EXTREME_ROWS, teacher, temperature=0.5)
        assert all(np.all(np.isfinite(x)) for x in results)
    for labels in (np.zeros(EXTREME_ROWS.shape, bool), EXTREME_ROWS > 0, EXTREME_ROWS <= 0):
        results = values_and_gradient(losses.binary_labels, EXTREME_ROWS, labels)
        assert all(np.all(np.isfinite(x)) for x in results)
    np.testing.assert_array_equal(losses.binary_labels(np.float32([-np.inf, 1e4, -1e4]), np.array([0, 1, 0])), 0)


@pytest.mark.parametrize('delta', [None, 0.5, 2.0])
@pytest.mark.parametrize('axis', [0, -1])
def test_regression_equals_the_oracle(delta, axis):
    student, targets = 3 * random(*SHAPE), random(*SHAPE, seed=1)
    filled = np.where(WHERE, targets, np.nan).astype(np.float32)
    moved = [np.moveaxis(x, -1, axis) for x in (student, filled, WHERE)]
    values, gradient = values_and_gradient(
        functools.partial(losses.regression, axis=axis), *moved[:2], delta=delta, where=moved[2]
    )
    exact = doubles(student, targets)
    np.testing.assert_allclose(values, regression_oracle(*exact, delta, WHERE), rtol=1e-5)
    expected = row_gradient(lambda x: regression_oracle(x, exact[1], delta, WHERE), exact[0])
    np.testing.assert_allclose(np.moveaxis(gradient, axis, -1), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(losses.regression(*moved[:2], delta=delta, axis=axis, where=moved[2]), values, rtol=1e-6)
    large = values_and_gradient(losses.regression, np.float32([[1e4, -1e4]]), np.float32([[-1e4, 1e4]]), delta=delta)
    assert all(np.all(np.isfinite(x)) for x in large)
    for wrong in (np.nan, np.inf, -np.inf):
        values, _ = values_and_gradient(losses.regression, np.float32([[wrong, 0], [0, 0]]), np.zeros((2, 2), np.float32))
        np.testing.assert_array_equal(np.isnan(values), [True, False])


@pytest.mark.parametrize('margin', [-2.0, 0.0, 1.0])
def test_bounded_regression_equals_the_oracle(margin):
    """Some examples are good enough and some are not; those that are have no gradient, and the teacher never has."""
    student, teacher, targets = (random(12, 3, seed=i) for i in range(3))
    where = np.random.default_rng(6).random((12, 3)) < 0.8
    filled = [np.where(where, x, np.nan).astype(np.float32) for x in (student, teacher, targets)]
    values, gradient = values_and_gradient(losses.bounded_regression, *filled, margin=margin, where=where)
    expected = bounded_oracle(*doubles(student, teacher, targets), margin, where)
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    assert 0 < np.sum(values > 0) < 12
    np.testing.assert_allclose(gradient, np.where(where & (expected > 0)[:, None], 2 * (student - targets), 0), rtol=1e-5)
    for x in (0, 1, 2):
        arrays = [student, teacher, targets]
        arrays[x] = np.where(np.arange(12)[:, None] == 3, np.float32(np.nan), arrays[x])
        values, _ = values_and_gradient(losses.bounded_regression, *arrays, margin=margin)
        np.testing.assert_array_equal(np.isnan(values), np.arange(12) == 3)


ONES, INTEGERS = np.ones(SHAPE, np.float32), np.ones(SHAPE, np.int32)


@pytest.mark.parametrize(
    'function, arguments, options, part',
    [
        (losses.binary_labels, (ONES, INTEGERS[:, :3]), {}, r'logits \(4, 5\), labels \(4, 3\)'),
        (losses.binary_labels, (ONES, INTEGERS[:, 0]), {}, r'labels \(4,\)'),
        (losses.binary_labels, (INTEGERS, INTEGERS), {}, 'logits must be floating point'),
        (losses.binary_labels, (ONES, ONES.astype(np.complex64)), {}, 'labels must be boolean, integer or floating'),
        (losses.binary_labels, (ONES, INTEGERS), {'class_weights': WEIGHTS[:3]}, r'class_weights must be .* \(5,\)'),
        (losses.binary_labels, (ONES, INTEGERS), {'class_weights': -WEIGHTS}, 'class_weights must not be negative'),
        (losses.binary_labels, (ONES, INTEGERS), {'axis': 2}, 'axis 2'),
        (losses.binary_labels, (ONES, INTEGERS), {'where': ONES}, 'where must be boolean'),
        (losses.regression, (ONES, INTEGERS), {}, 'targets must be floating point, got int32'),
        (losses.regression, (ONES, ONES[:, :1]), {}, r'student \(4, 5\), targets \(4, 1\)'),
        (losses.regression, (ONES, ONES), {'delta': 0.0}, 'delta must be positive'),
        (losses.regression, (ONES, ONES), {'delta': np.ones(4)}, 'delta must be a number'),
        (losses.bounded_regression, (ONES, ONES, ONES[:3]), {}, r'targets \(3, 5\)'),
        (losses.bounded_regression, (ONES, ONES[0], ONES), {}, r'teacher \(5,\)'),
    ],
)
def test_what_does_not_fit_is_named(function, arguments, options, part):
    with pytest.raises(ValueError, match=rf'^{function.__name__}: [^\n]*{part}[^\n]*$'):
        function(*arguments, **options)
