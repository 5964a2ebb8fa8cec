"""Frozen parameters: they stay bit for bit, and the others are trained as if they were alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_problem

from kdjax import networks, objectives, training
from kdjax.paths import leaves_with_paths


def test_what_is_frozen_stays_bit_for_bit_and_the_rest_is_trained():
    network = networks.from_linen(toy_problem.SmallNetwork(4))
    optimizer = training.train_only(optax.adamw(1e-2, weight_decay=0.1), 'head/*')
    problem = training.supervised(network, objectives.hard_labels(), optimizer)
    batch = {'inputs': jax.random.normal(jax.random.key(0), (8, 4, 4, 1)), 'labels': jnp.arange(8) % 3}
    state = problem.init(jax.random.key(1), batch)
    before = leaves_with_paths(jax.device_get(state.params))
    for _ in range(2):
        state, _ = problem.step(state, {}, batch)
    after = leaves_with_paths(jax.device_get(state.params))
    changed = {path for path in after if (before[path] != after[path]).any()}
    assert changed == {'head/kernel', 'head/bias'}


def test_the_optimizer_neither_sees_nor_remembers_what_is_frozen():
    params = {'hidden': jnp.arange(4.0), 'head': jnp.array([1.0, 2.0])}
    gradients = {'hidden': jnp.full(4, 100.0), 'head': jnp.array([3.0, -4.0])}
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1, weight_decay=0.3))
    optimizer = training.train_only(inner, lambda path, leaf: path == 'head')
    with jax.numpy_dtype_promotion('standard'):
        state, own_state = optimizer.init(params), inner.init({'head': params['head']})
        for _ in range(3):
            updates, state = optimizer.update(gradients, state, params)
            own, own_state = inner.update({'head': gradients['head']}, own_state, {'head': params['head']})
            np.testing.assert_array_equal(updates['head'], own['head'])
            np.testing.assert_array_equal(updates['hidden'], 0.0)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == sum(leaf.size for leaf in jax.tree.leaves(own_state))


def test_rules_that_pick_nothing_are_refused():
    with pytest.raises(ValueError, match=r"the pattern 'haed/\*' matches no path; there are: head"):
        training.train_only(optax.sgd(0.1), 'haed/*').init({'head': jnp.ones(2)})
