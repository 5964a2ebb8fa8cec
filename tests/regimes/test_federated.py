"""Clients that train on their own shards: what leaves a shard, and what averaging makes of it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kdjax import data, networks, objectives, regimes, training

NETWORK = networks.from_linen(nn.Dense(3))
PROBLEM = training.distillation(NETWORK, None, objectives.hard_labels(), optax.sgd(0.1))
UPDATE = regimes.client_updates(PROBLEM, steps=3, batch_size=4)
CLIENTS = 8


def shards_of(clients=CLIENTS):
    rng = np.random.default_rng(0)
    return {
        'inputs': rng.normal(size=(clients, 6, 5)).astype(np.float32),
        'labels': rng.integers(0, 3, (clients, 6)).astype(np.int32),
    }


def start():
    return NETWORK.init(jax.random.key(0), jnp.ones((1, 5)))


def test_a_client_takes_the_steps_that_it_would_take_alone():
    shards, variables, key = shards_of(), start(), jax.random.key(1)
    clients = UPDATE(key, variables, shards)
    for client, own in enumerate(jax.random.split(key, CLIENTS)):
        _, batch_key = jax.random.split(own)
        drawn = np.asarray(jax.random.randint(batch_key, (3, 4), 0, 6))
        kernel, bias = (np.asarray(variables['params'][name], np.float64) for name in ('kernel', 'bias'))
        for indices in drawn:
            inputs, labels = (shards[name][client][indices] for name in ('inputs', 'labels'))
            logits = inputs @ kernel + bias
            p = np.exp(logits - logits.max(1, keepdims=True))
            error = (p / p.sum(1, keepdims=True) - np.eye(3)[labels]) / len(labels)
            kernel, bias = kernel - 0.1 * inputs.T @ error, bias - 0.1 * error.sum(0)
        np.testing.assert_allclose(clients['params']['kernel'][client], kernel, atol=1e-6)
        np.testing.assert_allclose(clients['params']['bias'][client], bias, atol=1e-6)


def test_what_a_client_returns_depends_on_no_other_shard():
    shards, variables, key = shards_of(), start(), jax.random.key(1)
    changed = {name: array.copy() for name, array in shards.items()}
    changed['inputs'][3] = -7.0
    changed['labels'][3] = 2
    before, after = (np.asarray(UPDATE(key, variables, each)['params']['kernel']) for each in (shards, changed))
    others = np.arange(CLIENTS) != 3
    np.testing.assert_array_equal(before[others], after[others])
    assert (before[3] != after[3]).any()


def test_shards_stay_on_their_devices_and_only_variables_leave():
    mesh = regimes.client_mesh(CLIENTS)
    assert mesh.size == 8
    split, everywhere = (NamedSharding(mesh, spec) for spec in (PartitionSpec('clients'), PartitionSpec()))
    shards = jax.device_put(shards_of(), split)
    key, variables = jax.device_put((jax.random.key(1), start()), everywhere)
    compiled = UPDATE.lower(key, variables, shards).compile()
    sent = ('all-gather', 'all-reduce', 'all-to-all', 'collective-permute', 'collective-broadcast', 'reduce-scatter', 'send(')
    assert not [word for word in sent if word in compiled.as_text()]
    # With the shards where they are, the program itself asks for no other layout of them.
    assert all(each.spec == PartitionSpec('clients') for each in jax.tree.leaves(compiled.input_shardings[0][2]))
    clients = UPDATE(key, variables, shards)
    assert jax.tree.map(jnp.shape, clients) == jax.tree.map(lambda x: (CLIENTS, *x.shape), variables)
    assert all(leaf.sharding.is_equivalent_to(split, leaf.ndim) for leaf in jax.tree.leaves(clients))


@pytest.mark.parametrize('clients,devices', [(10, 2), (3, 1), (8, 8)])
def test_clients_share_as_many_devices_as_divide_them(clients, devices):
    assert regimes.client_mesh(clients).size == devices


def test_the_average_weighs_by_examples():
    rng = np.random.default_rng(0)
    variables = {'a': rng.normal(size=(4, 3, 2)).astype(np.float32), 'b': rng.normal(size=4).astype(np.float32)}
    examples = np.array([1, 50, 7, 100])
    averaged = regimes.average_clients(variables, examples)
    for name, array in variables.items():
        expected = np.average(array.astype(np.float64), axis=0, weights=examples)
        np.testing.assert_allclose(averaged[name], expected, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match=r'average_clients: examples \(3,\) do not fit variables with leading axes \[\(4,\)\]'):
        regimes.average_clients(variables, examples[:3])


@pytest.mark.parametrize('settings', [{'steps': 0, 'batch_size': 1}, {'steps': 1, 'batch_size': 0}])
def test_updates_without_steps_or_examples_are_refused(settings):
    with pytest.raises(ValueError, match='client_updates: steps and batch_size must be at least 1'):
        regimes.client_updates(PROBLEM, **settings)


@pytest.mark.parametrize('concentration', [0.01, 1.0, 1e6])
def test_every_example_is_in_one_shard_and_no_shard_is_empty(concentration):
    labels = np.repeat(np.arange(5), 40)
    shards = data.dirichlet_shards(labels, 10, concentration=concentration, seed=2)
    assert len(shards) == 10
    assert all(len(shard) for shard in shards)
    np.testing.assert_array_equal(np.sort(np.concatenate(shards)), np.arange(200))


def test_the_concentration_says_how_alike_shards_are():
    labels = np.repeat(np.arange(5), 200)

    def largest_share(concentration):
        shards = data.dirichlet_shards(labels, 4, concentration=concentration)
        return np.mean([np.bincount(labels[shard], minlength=5).max() / len(shard) for shard in shards])

    assert largest_share(1e6) == pytest.approx(0.2, abs=0.005)
    assert largest_share(0.05) > 0.5 > largest_share(10.0)


def test_smaller_shards_repeat_their_own_examples():
    stacked = data.stack_shards({'inputs': np.arange(10.0), 'labels': np.arange(10)}, [np.array([4, 5, 6]), np.array([9, 2])])
    np.testing.assert_array_equal(stacked['labels'], [[4, 5, 6], [9, 2, 9]])
    np.testing.assert_array_equal(stacked['inputs'], [[4.0, 5.0, 6.0], [9.0, 2.0, 9.0]])


def test_shards_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match='dirichlet_shards: shards must be between 1 and 3, the number of examples, got 4'):
        data.dirichlet_shards(np.arange(3), 4, concentration=1.0)
    with pytest.raises(ValueError, match='dirichlet_shards: concentration must be positive, got 0'):
        data.dirichlet_shards(np.arange(3), 2, concentration=0)
