"""Standardized logits against a float64 oracle, under masks and at extremes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.logit_checks import CLASSES, ROWS, random_logits, row_gradient, same_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from kdjax import losses

INF = float('inf')
EXAMPLES = settings(max_examples=25, deadline=None, derandomize=True, database=None)


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


def test_standardization_of_halves_of_other_axes_and_of_what_is_no_logit():
    logits = random_logits()[0]
    half = jnp.asarray(logits, jnp.bfloat16)
    assert losses.standardize_logits(half).dtype == jnp.float32
    np.testing.assert_array_equal(losses.standardize_logits(half), losses.standardize_logits(half.astype(jnp.float32)))
    np.testing.assert_array_equal(standardized(logits.T, axis=0)[0], standardized(logits)[0].T)
    for result in standardized(logits, np.zeros(CLASSES, bool)):
        np.testing.assert_array_equal(result, np.zeros_like(logits))
    assert np.all(np.isfinite(standardized(same_rows(1e4, -1e4, 0, -INF, 1))[1]))
    for wrong in (np.nan, np.inf):
        row = np.where(np.arange(CLASSES) == 1, np.float32(wrong), logits)
        assert np.all(np.isnan(standardized(row)[0]))
        masked, gradient = standardized(row, np.arange(CLASSES) != 1)
        np.testing.assert_array_equal(masked, standardized(logits, np.arange(CLASSES) != 1)[0])
        assert np.all(np.isfinite(gradient))
    for bad, options in (
        (logits.astype(np.int32), {}),
        (logits[:, :1], {}),
        (logits, {'axis': 2}),
        (logits, {'epsilon': 0.0}),
    ):
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
