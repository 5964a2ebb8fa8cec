"""Expectation maximization: its bound in float64, that neither half of a step lowers it, and where it ends."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.toy_problem import SILENT
from scipy.special import log_softmax, logsumexp

from kdjax import models, networks, regimes

EXAMPLES, LABELLED, PRECISION = 120, 12, 0.01


@pytest.fixture(scope='module')
def pair():
    rng = np.random.default_rng(0)
    labels = np.arange(EXAMPLES) % 3
    centers = np.array([[0.0, 2.0], [2.0, -1.0], [-2.0, -1.0]])
    inputs = np.float32(centers[labels] + 0.8 * rng.normal(size=(EXAMPLES, 2)))
    data = {'inputs': inputs, 'labels': np.where(np.arange(EXAMPLES) < LABELLED, labels, -1).astype(np.int32)}
    members = (networks.from_linen(models.MLP((8,), 3)), networks.from_linen(nn.Dense(3)))
    problem = regimes.expectation_maximization(members, iterations=5, precision=PRECISION)
    variables = [member.init(jax.random.key(i), inputs) for i, member in enumerate(members)]
    return problem, problem.init(variables), data, labels, members


def log_product(members, variables, inputs):
    logits = [np.float64(m.apply(v, inputs)[0].logits) for m, v in zip(members, variables, strict=True)]
    return sum(log_softmax(x, axis=-1) for x in logits)


def log_posterior(members, state, data):
    """The mean log likelihood, and the prior, written down without responsibilities."""
    joint = log_product(members, state.variables, data['inputs'])
    known = data['labels'] >= 0
    values = np.where(known, joint[np.arange(EXAMPLES), np.maximum(data['labels'], 0)], logsumexp(joint, axis=-1))
    now, start = (jax.tree.leaves(x) for x in (tuple(v['params'] for v in state.variables), state.start))
    distance = sum(np.sum(np.square(np.float64(a) - np.float64(b))) for a, b in zip(now, start, strict=True))
    return values.mean() - PRECISION / 2 * distance


def test_neither_half_of_a_step_lowers_the_bound(pair):
    problem, state, data, _, _ = pair
    _, bounds = regimes.until_convergence(problem, state, data, tolerance=1e-4, limit=40)
    bounds = np.asarray(bounds)
    assert 6 < len(bounds) < 80  # it converged, and not at once
    assert np.diff(bounds).min() > -2e-6
    assert bounds[-1] > bounds[0] + 0.5
    assert bounds[-1] - bounds[-3] < 1e-4 <= bounds[-3] - bounds[-5]


def test_after_the_e_step_the_bound_is_the_log_posterior(pair):
    problem, state, data, _, members = pair
    for _ in range(3):
        following, bounds = problem.step(state, data)
        assert float(bounds.expectation) == pytest.approx(log_posterior(members, state, data), abs=1e-5)
        # A bound from below: the log posterior rises at least as much.
        assert float(bounds.maximization) <= log_posterior(members, following, data) + 1e-5
        state = following


def test_the_m_step_maximises_with_fixed_responsibilities(pair):
    problem, state, data, _, members = pair
    joint = log_product(members, state.variables, data['inputs'])
    q = np.exp(joint - logsumexp(joint, axis=-1, keepdims=True))
    known = data['labels'] >= 0
    q[known] = np.eye(3)[data['labels'][known]]
    entropy = -np.sum(np.where(q > 0, q * np.log(np.maximum(q, 1e-300)), 0.0), axis=-1)
    following, bounds = problem.step(state, data)
    now = log_product(members, following.variables, data['inputs'])
    leaves = (jax.tree.leaves(x) for x in (tuple(v['params'] for v in following.variables), state.start))
    distance = sum(np.sum(np.square(np.float64(a) - np.float64(b))) for a, b in zip(*leaves, strict=True))
    expected = np.mean(np.sum(q * now, axis=-1) + entropy) - PRECISION / 2 * distance
    assert float(bounds.maximization) == pytest.approx(expected, abs=1e-5)
    assert float(bounds.maximization) > float(bounds.expectation) + 0.1


def test_unlabelled_inputs_help_both_networks_and_hidden_labels_are_not_read(pair):
    problem, state, data, labels, members = pair
    # All labels hidden but the first ones', which are learned alone at first; so the shapes, and the program, stay the same.
    few = {name: array[np.arange(EXAMPLES) % LABELLED] for name, array in data.items()}
    learned, _ = regimes.until_convergence(problem, state, few, limit=5)
    ended, _ = regimes.until_convergence(problem, learned, data, limit=5)
    for member, before, after in zip(members, learned.variables, ended.variables, strict=True):
        accuracies = [
            np.mean(np.asarray(member.apply(variables, data['inputs'])[0].logits).argmax(-1) == labels)
            for variables in (before, after)
        ]
        assert accuracies[1] > 0.9
        assert accuracies[1] >= accuracies[0]
    hidden = {**data, 'labels': np.where(data['labels'] < 0, -7, data['labels'])}
    again, _ = regimes.until_convergence(problem, learned, hidden, limit=5)
    jax.tree.map(np.testing.assert_array_equal, ended, again)


def test_without_labels_it_is_as_with_none_known(pair):
    problem, state, data, _, _ = pair
    none, _ = problem.step(state, {'inputs': data['inputs']})
    hidden, _ = problem.step(state, {'inputs': data['inputs'], 'labels': np.full(EXAMPLES, -1, np.int32)})
    jax.tree.map(np.testing.assert_array_equal, none, hidden)


def test_bad_arguments_are_refused(pair):
    problem, state, data, _, members = pair
    with pytest.raises(ValueError, match='at least one network'):
        regimes.expectation_maximization([])
    with pytest.raises(ValueError, match='got 0, 0'):
        regimes.expectation_maximization(members, iterations=0)
    with pytest.raises(ValueError, match='got 10, -1'):
        regimes.expectation_maximization(members, precision=-1)
    with pytest.raises(ValueError, match='2 networks need as many variables, got 1'):
        problem.init(state.variables[:1])
    with pytest.raises(ValueError, match='tolerance must be positive'):
        regimes.until_convergence(problem, state, data, tolerance=0.0)
    other = regimes.expectation_maximization([networks.from_linen(nn.Dense(3)), SILENT])
    with pytest.raises(ValueError, match='logits of one shape'):
        other.step(other.init([state.variables[1], {'params': {}}]), {'inputs': jnp.ones((2, 2))})
