"""Losses that add the relations of a batch to its predictions, against float64 oracles: MLLD and DIST+."""

import functools

import jax
import numpy as np
import pytest
from helpers.gradient_checks import value_and_gradients
from helpers.oracles import kl, log_softmax, softmax

from kdjax import losses

RNG = np.random.default_rng(0)
STUDENT, TEACHER = (2 * RNG.normal(size=(2, 5, 4))).astype(np.float32)
FEATURES = RNG.normal(size=(2, 5, 6)).astype(np.float32)


def multi_level_logits(s, t, temperatures):
    """Σ_T of the three means, entry by entry."""
    total = 0.0
    for temperature in temperatures:
        p, q = (softmax(z, temperature) for z in (t, s))
        total += temperature**2 * np.mean(kl(log_softmax(t, temperature), log_softmax(s, temperature)))
        for a, b in ((p, q), (p.T, q.T)):
            total += sum((x @ y - u @ v) ** 2 for x, u in zip(a, b, strict=True) for y, v in zip(a, b, strict=True)) / len(a)
    return total


def relations(x, y, beta, gamma):
    def apart(a, b):
        return np.mean([1 - np.corrcoef(*rows)[0, 1] for rows in zip(a, b, strict=True)])

    return beta * apart(x, y) + gamma * apart(x.T, y.T)


def dist_plus(s, t, x, y, beta=1.0, gamma=1.0, feature=1.0, temperature=1.0):
    p, q = (softmax(z, temperature) for z in (s, t))
    return temperature**2 * relations(p, q, beta, gamma) + feature * relations(x, y, beta, gamma)


def derivative(function, x, step=1e-6):
    x = x.astype(np.float64)
    moves = (step * np.eye(x.size)).reshape(-1, *x.shape)
    return np.array([(function(x + move) - function(x - move)) / (2 * step) for move in moves]).reshape(x.shape)


@pytest.mark.parametrize('temperatures', [(1.0,), (2.0, 3.0, 4.0, 5.0, 6.0)])
def test_multi_level_logits_equal_the_oracle(temperatures):
    oracle = functools.partial(multi_level_logits, temperatures=temperatures)
    value, *gradients = value_and_gradients('multi_level_logits', STUDENT, TEACHER, temperatures=temperatures)
    s, t = STUDENT.astype(np.float64), TEACHER.astype(np.float64)
    np.testing.assert_allclose(value, oracle(s, t), rtol=1e-5)
    np.testing.assert_allclose(gradients[0], derivative(lambda x: oracle(x, t), s), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gradients[1], derivative(lambda x: oracle(s, x), t), rtol=1e-4, atol=1e-5)


def test_multi_level_logits_have_the_published_temperatures():
    expected = multi_level_logits(STUDENT.astype(np.float64), TEACHER.astype(np.float64), (2, 3, 4, 5, 6))
    np.testing.assert_allclose(losses.multi_level_logits(STUDENT, TEACHER), expected, rtol=1e-5)


def test_equal_networks_have_no_multi_level_loss_and_no_gradient():
    for result in value_and_gradients('multi_level_logits', STUDENT, STUDENT):
        np.testing.assert_array_equal(result, np.zeros_like(result))


def test_examples_in_another_order_and_a_batch_of_any_shape_change_nothing():
    order = np.array([3, 1, 0, 4, 2])
    expected = losses.multi_level_logits(STUDENT, TEACHER)
    np.testing.assert_allclose(losses.multi_level_logits(STUDENT[order], TEACHER[order]), expected, rtol=1e-6)
    folded = losses.multi_level_logits(STUDENT[:4].reshape(2, 2, 4), TEACHER[:4].reshape(2, 2, 4))
    np.testing.assert_allclose(folded, losses.multi_level_logits(STUDENT[:4], TEACHER[:4]), rtol=1e-6)


@pytest.mark.parametrize('temperatures', [(), 4.0, (4.0, 0.0), [-1.0]])
def test_temperatures_that_do_not_fit_are_named(temperatures):
    with pytest.raises(ValueError, match=r'^multi_level_logits: temperatures? must be [^\n]+$'):
        losses.multi_level_logits(STUDENT, TEACHER, temperatures=temperatures)


@pytest.mark.parametrize('options', [{}, {'beta': 2.0, 'gamma': 0.5, 'feature': 3.0, 'temperature': 4.0}])
def test_dist_plus_equals_the_oracle(options):
    arrays = STUDENT, TEACHER, *FEATURES
    exact = [x.astype(np.float64) for x in arrays]
    loss = jax.jit(jax.value_and_grad(functools.partial(losses.dist_plus, **options), argnums=(0, 1, 2, 3)))
    value, gradients = loss(*arrays)
    np.testing.assert_allclose(value, dist_plus(*exact, **options), rtol=1e-5)
    for i, gradient in enumerate(gradients):

        def of_one(x, i=i):
            return dist_plus(*exact[:i], x, *exact[i + 1 :], **options)

        np.testing.assert_allclose(gradient, derivative(of_one, exact[i]), rtol=1e-4, atol=1e-4)


def test_positions_of_a_map_are_examples_with_the_mask_of_their_own():
    maps = np.random.default_rng(1).normal(size=(2, 5, 2, 3, 6)).astype(np.float32)
    where = np.array([True, False, True, True, False])
    masked = losses.dist_plus(STUDENT, TEACHER, *maps, where=where[:, None])
    spoilt = np.where(where[:, None, None, None], maps, np.float32(np.inf))
    np.testing.assert_array_equal(losses.dist_plus(STUDENT, TEACHER, *spoilt, where=where[:, None]), masked)
    flat = maps[:, where].reshape(2, -1, 6).astype(np.float64)
    predictions = losses.dist(STUDENT[where], TEACHER[where])
    np.testing.assert_allclose(masked, predictions + relations(*flat, 1.0, 1.0), rtol=1e-5)


def test_a_dist_plus_that_cannot_be_is_refused():
    refused = [
        ((STUDENT, TEACHER, FEATURES[0], FEATURES[1, :, :5]), {}, 'same shape'),
        ((STUDENT, TEACHER, *FEATURES[:, :4]), {}, 'same examples'),
        ((STUDENT, TEACHER, *FEATURES), {'where': np.ones((7, 1), bool)}, 'does not broadcast'),
        ((STUDENT, TEACHER, *FEATURES), {'temperature': 0.0}, 'positive'),
    ]
    for arrays, options, message in refused:
        with pytest.raises(ValueError, match=rf'^dist_plus: [^\n]*{message}[^\n]*$'):
            losses.dist_plus(*arrays, **options)
