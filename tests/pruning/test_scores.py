"""Scores are their formulas, in float32, and shapes say what lives and dies together."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import pruning

RNG = np.random.default_rng(0)
KERNEL, GRADIENT = RNG.standard_normal((2, 3, 3, 2, 4))
WEIGHTS = {'conv/kernel': jnp.asarray(KERNEL, jnp.float32), 'conv/bias': jnp.arange(-1.0, 3.0)}
GRADIENTS = {'conv/kernel': jnp.asarray(GRADIENT, jnp.float32), 'conv/bias': jnp.full(4, -2.0)}


def p_norm(w: np.ndarray, axes: tuple[int, ...], order: float) -> np.ndarray:
    if math.isinf(order):
        return np.abs(w).max(axes, keepdims=True)
    return (np.abs(w) ** order).sum(axes, keepdims=True) ** (1 / order)


def test_magnitude_and_saliency_are_their_formulas() -> None:
    np.testing.assert_array_equal(pruning.magnitude(WEIGHTS)['conv/kernel'], np.abs(np.asarray(WEIGHTS['conv/kernel'])))
    scores = pruning.saliency(WEIGHTS, GRADIENTS)
    np.testing.assert_allclose(scores['conv/kernel'], np.abs(KERNEL * GRADIENT), rtol=1e-6)
    np.testing.assert_array_equal(scores['conv/bias'], [2, 0, 2, 4])


def test_saliency_is_the_change_of_a_linear_loss_when_a_weight_becomes_zero() -> None:
    x = jnp.array([2.0, -0.5, 1.0])
    loss = lambda w: jnp.vdot(w, x)  # noqa: E731
    w = jnp.array([0.25, 3.0, -1.0])
    change = [abs(loss(w.at[i].set(0.0)) - loss(w)) for i in range(3)]
    np.testing.assert_allclose(pruning.saliency({'w': w}, {'w': jax.grad(loss)(w)})['w'], change, rtol=1e-6)


@pytest.mark.parametrize('order', [1, 2, 3, math.inf])
@pytest.mark.parametrize(
    'axis, others', [(-1, (0, 1, 2)), (2, (0, 1, 3)), ((0, 1), (2, 3)), ([-1, -2], (0, 1)), ((0, 1, 2, 3), ())]
)
def test_slice_norms_are_p_norms_over_the_other_axes(axis: Any, others: tuple[int, ...], order: float) -> None:
    got = pruning.slice_norms(axis, order)({'conv/kernel': WEIGHTS['conv/kernel']}, {})['conv/kernel']
    np.testing.assert_allclose(got, p_norm(KERNEL, others, order), rtol=1e-6)


def test_names_of_usual_slices() -> None:
    """[1, 1, 1, out] for filters, [1, 1, in, 1] for channels; every entry of a vector is a filter of its own."""
    filters = pruning.filter_norms(2)(WEIGHTS, GRADIENTS)
    np.testing.assert_allclose(filters['conv/kernel'], p_norm(KERNEL, (0, 1, 2), 2), rtol=1e-6)
    np.testing.assert_array_equal(filters['conv/bias'], [1, 0, 1, 2])
    channels = pruning.channel_norms()({'conv/kernel': WEIGHTS['conv/kernel']}, {})['conv/kernel']
    np.testing.assert_allclose(channels, p_norm(KERNEL, (0, 1, 3), 1), rtol=1e-6)


def test_scores_are_float32_whatever_the_weights() -> None:
    """In bfloat16 a sum of 300 ones would stop at 256."""
    weights = {'kernel': jnp.ones((300, 2), jnp.bfloat16)}
    for scores in (pruning.magnitude, pruning.saliency, pruning.filter_norms(), pruning.random_scores(jax.random.key(0))):
        assert scores(weights, weights)['kernel'].dtype == jnp.float32
    np.testing.assert_array_equal(pruning.filter_norms()(weights, weights)['kernel'], [[300, 300]])


def test_random_scores_depend_on_key_path_and_shape_alone(key: jax.Array) -> None:
    weights = {'b': jnp.ones((40, 25)), 'a': jnp.zeros((40, 25))}
    scores = pruning.random_scores(key)(weights, {})
    again = pruning.random_scores(key)({'a': jnp.full((40, 25), 7.0), 'b': jnp.ones((40, 25))}, weights)
    for path, score in scores.items():
        np.testing.assert_array_equal(score, again[path])
        # The mean of 1000 uniform numbers is 1/2 ± 0.009.
        np.testing.assert_allclose(score.mean(), 0.5, atol=0.04)
        assert score.min() >= 0
        assert score.max() < 1
    assert not np.any(scores['a'] == scores['b'])
    assert not np.any(scores['a'] == pruning.random_scores(jax.random.fold_in(key, 1))(weights, {})['a'])


def test_what_has_no_norm_is_an_error() -> None:
    for order in (0, -1, math.nan):
        with pytest.raises(ValueError, match=f'slice_norms: order must be positive, got {order}'):
            pruning.filter_norms(order)
    with pytest.raises(ValueError, match=r'slice_norms: conv/bias of shape \(4,\) has no axis -2'):
        pruning.channel_norms()(WEIGHTS, GRADIENTS)
