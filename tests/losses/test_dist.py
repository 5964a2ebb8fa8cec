"""DIST against a float64 oracle, and what its correlations promise."""

import functools

import jax
import numpy as np
import pytest
from helpers.gradient_checks import value_and_gradients, with_gradients
from helpers.logit_checks import CLASSES, EXTREME_ROWS, random_logits
from helpers.oracles import softmax
from hypothesis import given, settings
from hypothesis import strategies as st

from kdjax import losses

EXAMPLES = settings(max_examples=25, deadline=None, derandomize=True, database=None)


def pearson(x, y):
    """The correlation with the 1e-8 of the published code."""
    x, y = x - x.mean(), y - y.mean()
    return np.sum(x * y) / (np.linalg.norm(x) * np.linalg.norm(y) + 1e-8)


def dist_oracle(s, t, temperature=1.0, beta=1.0, gamma=1.0):
    """T² (β · mean_b(1 - r of rows) + γ · mean_c(1 - r of columns)) of probabilities."""
    p, q = (softmax(z, temperature) for z in (s, t))
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
    value, *gradients = value_and_gradients('dist', student, teacher, **options)
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
    masked = value_and_gradients('dist', student, teacher, where=rows[:, None] & columns)
    sliced = value_and_gradients('dist', student[rows][:, columns], teacher[rows][:, columns])
    np.testing.assert_allclose(masked[0], sliced[0], rtol=1e-6, atol=1e-6)
    for whole, part in zip(masked[1:], sliced[1:], strict=True):
        np.testing.assert_allclose(whole[rows][:, columns], part, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(whole[~rows], 0)
        np.testing.assert_array_equal(whole[:, ~columns], 0)


def test_dist_is_zero_where_probabilities_are_linearly_related():
    """p_s = 0.3 p_t + 0.7 / C has the rows and the columns of p_t, moved and scaled."""
    teacher = random_logits()[1]
    p = softmax(teacher)
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
    kept = np.array([True, True, False, True])
    tokens = [np.where(kept[:, None], x, np.nan).astype(np.float32).reshape(2, 2, CLASSES) for x in (student, teacher)]
    masked = losses.dist(*tokens, where=kept.reshape(2, 2, 1))
    np.testing.assert_allclose(masked, losses.dist(student[kept], teacher[kept]), rtol=1e-6)


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
