"""Objectives on sampled text: they are their losses of the labels' log-probabilities, over what counts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import losses, objectives
from kdjax.networks import Outputs

RNG = np.random.default_rng(0)
STUDENT, TEACHER = RNG.normal(size=(2, 4, 5, 7)).astype(np.float32)
BATCH = {
    'labels': RNG.integers(-1, 7, (4, 5)).astype(np.int32),
    'mask': RNG.random((4, 5)) < 0.8,
    'weights': np.array([1.0, 2.0, 0.0, 0.5], np.float32),
    'sampled': np.log(RNG.uniform(0.1, 0.9, (4, 5))).astype(np.float32),
}
KEPT = BATCH['mask'] & (BATCH['labels'] >= 0)
CASES = {
    'k1': (objectives.sampled_reverse_kl(estimator='k1'), functools.partial(losses.sampled_reverse_kl, estimator='k1')),
    'k3': (objectives.sampled_reverse_kl(), losses.sampled_reverse_kl),
    'policy': (objectives.policy_gradient(), losses.policy_gradient),
    'sampler': (
        objectives.policy_gradient(sampler='sampled'),
        functools.partial(losses.policy_gradient, sampler=np.where(KEPT, BATCH['sampled'], 0)),
    ),
}


def of_labels(logits):
    log_p = jax.nn.log_softmax(logits)
    return jnp.take_along_axis(log_p, np.maximum(BATCH['labels'], 0)[..., None], axis=-1)[..., 0]


def value(objective, student, teacher=TEACHER, batch=None):
    params, state = objective.init(jax.random.key(0), Outputs(student), Outputs(teacher), batch or BATCH)
    return objective.apply(params, state, Outputs(student), Outputs(teacher), batch or BATCH, step=0)[0]


@pytest.mark.parametrize('name', CASES)
def test_an_objective_is_its_loss_of_the_labels_that_count(name):
    objective, loss = CASES[name]

    def expected(student):
        weights = np.where(KEPT, BATCH['weights'][:, None], 0.0)
        return jnp.sum(weights * loss(of_labels(student), of_labels(TEACHER), where=KEPT)) / weights.sum()

    found = jax.jit(jax.value_and_grad(functools.partial(value, objective)))(STUDENT)
    for x, y in zip(found, jax.jit(jax.value_and_grad(expected))(STUDENT), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    spoilt = np.where(KEPT[..., None], STUDENT, np.float32(np.nan))
    for x, y in zip(jax.jit(jax.value_and_grad(functools.partial(value, objective)))(spoilt), found, strict=True):
        np.testing.assert_array_equal(x, y)


def test_minillm_s_two_terms_have_the_gradient_of_the_divergence_of_sequences():
    """Of two tokens over two words, where all sequences can be counted: the mean over samples is the exact gradient.

    The reward of MiniLLM is a mean over the tokens to come, which of two tokens is the one that follows.
    """
    rng = np.random.default_rng(1)
    first, second = rng.normal(size=2), rng.normal(size=(2, 2))
    parameters = {'first': jnp.asarray(first, jnp.float32), 'second': jnp.asarray(second, jnp.float32)}
    teacher = {'first': jnp.array([0.3, -0.8]), 'second': jnp.array([[1.0, 0.0], [-0.5, 0.7]])}
    texts = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], np.int32)

    def logits(p):
        return jnp.stack([jnp.tile(p['first'], (4, 1)), p['second'][texts[:, 0]]], axis=1)

    def log_p(p):
        return jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(logits(p)), texts[..., None], axis=-1)[..., 0], axis=1)

    def exact(p):
        return jnp.sum(jnp.exp(log_p(p)) * (log_p(p) - log_p(teacher)))

    chances = np.exp(log_p(parameters))
    batch = {'labels': texts, 'weights': chances.astype(np.float32)}
    # Weights are of examples: their mean over two positions is half of the sum over tokens.
    objective = objectives.policy_gradient() + objectives.reverse_kl()
    found = jax.grad(lambda p: value(objective, logits(p), logits(teacher), batch))(parameters)
    expected = jax.grad(exact)(parameters)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(2 * x, y, rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r'^policy_gradient needs logits \[batch, length, classes\], got \(4, 7\)'):
        value(objectives.policy_gradient(), STUDENT[:, 0], TEACHER[:, 0], {'labels': BATCH['labels'][:, 0]})
    with pytest.raises(ValueError, match=r'^sampled_reverse_kl: student \(4, 5, 7\) and teacher \(4, 5, 6\)'):
        value(objectives.sampled_reverse_kl(), STUDENT, TEACHER[..., :6])
    with pytest.raises(ValueError, match=r"^policy_gradient needs batch\['old'\]"):
        value(objectives.policy_gradient(sampler='old'), STUDENT)
