"""A network computed in parts is the network: outputs, gradients, whole runs, on one device and on eight."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import toy_problem

from kdjax import networks, objectives, parallel, training

SIZE = 32
INPUTS = {
    'ids': jax.random.randint(jax.random.key(0), (SIZE, 3), 0, 5),
    'x': jax.random.normal(jax.random.key(1), (SIZE, 3, 4)),
}
LABELLED = [0, 1, 2, 3, 5, 9, 17, 18, 30]  # eight examples of the first micro-batch are six of these nine, and so on
LABELS = jnp.full(SIZE, -1).at[jnp.array(LABELLED)].set(jnp.arange(9) % 3)


class Net(nn.Module):
    dropout: float = 0.0

    @nn.compact
    def __call__(self, ids: jax.Array, x: jax.Array, train: bool = False) -> jax.Array:
        hidden = nn.tanh(nn.Dense(6, name='hidden')(x + nn.Embed(5, 4)(ids)))
        hidden = nn.Dropout(self.dropout, deterministic=not train, name='drop')(hidden)
        return nn.Dense(3, name='head')(hidden.mean(1))


@functools.cache
def network(dropout: float = 0.0) -> networks.Network:
    return networks.from_linen(Net(dropout), features=('hidden', 'drop'))


@functools.cache
def variables() -> dict:
    return jax.jit(network().init)(jax.random.key(2), INPUTS)


def take(tree, start, size):
    return jax.tree.map(lambda x: x[start : start + size], tree)


def learn(student, objective, size, optimizer):
    """Parameters after two runs over the batch, in batches of a size."""
    problem = training.distillation(student, network(), objective, optimizer)
    batch = {'inputs': INPUTS, 'labels': LABELS}
    state = problem.init(jax.random.key(3), take(batch, 0, size), student_variables=variables())
    teacher_variables = network().init(jax.random.key(4), INPUTS)
    for start in 2 * list(range(0, SIZE, size)):
        state, _ = problem.step(state, teacher_variables, take(batch, start, size))
    return state.params


def distance(left, right):
    return max(float(np.abs(x - y).max()) for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True))


def test_gradients_are_accumulated_exactly_where_labels_are_missing_and_examples_are_compared():
    objective = objectives.combine(
        hard=objectives.hard_labels(), similarity=100.0 * objectives.similarity_preserving('hidden', 'hidden')
    )
    optimizer = optax.sgd(0.5, momentum=0.9)
    whole = learn(network(), objective, SIZE, optimizer)
    assert distance(variables()['params'], whole) > 0.1
    assert distance(learn(networks.in_parts(network(), 4), objective, SIZE, optimizer), whole) < 1e-6
    assert distance(learn(network(), objective, SIZE // 4, optax.MultiSteps(optimizer, 4)), whole) > 0.1


@pytest.mark.parametrize('wrap', [lambda network: network, networks.rematerialize])
def test_outputs_are_those_of_the_network_in_the_order_of_the_batch(wrap):
    inner = wrap(network())
    parts = networks.in_parts(inner, 4)
    wanted = inner.apply(variables(), INPUTS)
    for apply in (parts.apply, jax.jit(parts.apply)):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), apply(variables(), INPUTS), wanted)
    assert networks.in_parts(inner, 1) is inner


def test_every_part_has_noise_of_its_own(key):
    parts = networks.in_parts(network(0.5), 4)
    apply = jax.jit(functools.partial(parts.apply, train=True))
    same = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), INPUTS)
    dropped = np.asarray(apply(variables(), same, rng=key)[0].features['drop'] == 0).reshape(SIZE // 4, 4, -1).swapaxes(0, 1)
    assert 0.3 < dropped.mean() < 0.7
    assert len({part.tobytes() for part in dropped}) == 4
    np.testing.assert_array_equal(apply(variables(), INPUTS, rng=key)[0].logits, apply(variables(), INPUTS, rng=key)[0].logits)


@pytest.mark.parametrize('wrap', [lambda network: network, networks.rematerialize, networks.mixed_precision])
def test_state_stays_as_it_is_and_where_it_would_change_is_an_error(wrap, key):
    inner = wrap(networks.from_linen(toy_problem.SmallNetwork(4)))
    images = jax.random.normal(key, (8, 4, 4, 1))
    start = inner.init(key, images)
    parts = networks.in_parts(inner, 2)
    _, state = jax.jit(parts.apply)(start, images)
    jax.tree.map(np.testing.assert_array_equal, state, {'batch_stats': start['batch_stats']})
    message = (
        '^in_parts: the network changes its state, such as batch_stats/block/.*/mean, which parts of a batch cannot share: '
    )
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(functools.partial(parts.apply, train=True), start, images, rng=key)


def test_what_cannot_be_cut_or_joined_is_an_error():
    with pytest.raises(ValueError, match=r'^in_parts: the number of parts must be positive, got 0$'):
        networks.in_parts(network(), 0)
    with pytest.raises(ValueError, match=r'^in_parts: a batch of 32 cannot be cut into 5 equal parts; choose a number'):
        networks.in_parts(network(), 5).apply(variables(), INPUTS)
    with pytest.raises(
        ValueError, match=r'^in_parts: inputs must be arrays with one number of examples, got \[\(8,\), \(32,\)\]'
    ):
        networks.in_parts(network(), 4).apply(variables(), {**INPUTS, 'ids': INPUTS['ids'][:8]})
    # Six rows in a kernel, and parts of four, six and eight examples.
    tapped = networks.tap_parameters(network(), 'head/kernel')
    for size in (16, 24, 32):
        with pytest.raises(
            ValueError, match=r'^in_parts: head/kernel \(6, 3\) has no leading axis of \d+ examples along which'
        ):
            jax.eval_shape(networks.in_parts(tapped, 4).apply, variables(), take(INPUTS, 0, size))
    outside = networks.tap_parameters(networks.in_parts(network(), 4), 'head/kernel')
    assert outside.apply(variables(), INPUTS)[0].features['head/kernel'].shape == (6, 3)


def test_activations_of_a_part_are_all_there_is_of_them():
    deep = networks.from_linen(nn.Sequential([layer for _ in range(8) for layer in (nn.Dense(32), nn.tanh)]))
    start, inputs = deep.init(jax.random.key(0), jnp.ones((1, 4))), jnp.ones((1024, 4))

    def temporary(network):
        gradient = jax.jit(jax.grad(lambda start: jnp.sum(network.apply(start, inputs)[0].logits)))
        return gradient.lower(start).compile().memory_analysis().temp_size_in_bytes

    assert temporary(networks.in_parts(deep, 16)) < 0.3 * temporary(deep)


@pytest.mark.parametrize('fsdp', [1, 8])
def test_on_eight_devices_gradients_are_those_of_one_and_in_data_parallelism_no_example_leaves_its_device(fsdp):
    wide = networks.from_linen(nn.Sequential([nn.Dense(256), nn.tanh, nn.Dense(256), nn.tanh, nn.Dense(3)]))
    parts = networks.in_parts(wide, 2)
    start, inputs = wide.init(jax.random.key(0), jnp.ones((1, 8))), INPUTS['x'].reshape(SIZE, 12)[:, :8]

    def loss(apply, start, inputs):
        logits = apply(start, inputs)[0].logits
        return jnp.sum(logits**2) / jnp.sum(jnp.abs(logits))  # of all examples together

    mesh = parallel.data_parallel(fsdp=fsdp)
    placed, shared = parallel.shard(mesh, start), parallel.shard_batch(mesh, {'x': inputs})['x']
    compiled = jax.jit(jax.grad(functools.partial(loss, parts.apply))).lower(placed, shared).compile()
    wanted = jax.jit(jax.grad(functools.partial(loss, wide.apply)))(start, inputs)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), compiled(placed, shared), wanted)
    if fsdp == 1:
        assert not re.search('all-gather|all-to-all|collective-permute', compiled.as_text())
