"""Channels that are removed: the masked network and the smaller one compute the same."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers.scanned import ScannedMLP

from kdjax import models, networks, paths, pruning

IMAGES = jax.random.normal(jax.random.key(1), (3, 8, 8, 1))


def filled(network, inputs):
    """Variables in which no bias is zero and no norm the identity."""
    key = jax.random.key(2)

    def fill(path, leaf):
        noise = jax.random.normal(jax.random.fold_in(key, hash_of(path)), leaf.shape)
        return jnp.abs(leaf + 0.3 * noise) + 0.1 if path.endswith('var') else leaf + 0.3 * noise

    return jax.jit(lambda: paths.map_with_paths(fill, network.init(jax.random.key(0), inputs[:1])))()


def hash_of(path):
    return sum(i * ord(letter) for i, letter in enumerate(path, start=1)) % 2**31


def halved(network, variables, inputs, sparsity=0.5):
    channels = pruning.channel_groups(network, variables, inputs[:1])
    scores = pruning.magnitude(paths.select(channels.leaves, variables['params']))
    masks = jax.jit(channels.masks, static_argnums=1)(scores, sparsity)
    return channels, {**variables, 'params': pruning.apply_masks(masks, variables['params'])}


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


MODELS = {
    'mlp': (models.MLP((30, 21)), [30, 21]),
    'cnn': (models.CNN((8, 6), (12,)), [8, 6, 12]),
    'vgg': (models.VGG(stages=((8, 1), (6, 2)), hidden=(10,)), [8, 6, 6, 10]),
    'resnet': (models.ResNet(8, widths=(4, 4, 6, 8)), [4, 4, 6, 6, 8, 8]),
    'resnet with a shortcut at every stage': (models.ResNet(8, widths=(6, 4, 6, 8)), [6, 4, 4, 6, 6, 8, 8]),
    'mobilenet': (
        models.MobileNetV2(stages=((1, 4, 1, 1), (2, 4, 2, 2)), stem=6, last=10),
        [6, 4, 8, 4, 8, 10],
    ),
    'transformer': (models.VisionTransformer(depth=2, width=8, heads=2), [32, 32]),
}


@pytest.mark.parametrize('name', MODELS)
def test_every_model_gets_smaller_and_computes_the_same(name):
    module, sizes = MODELS[name]
    network = networks.from_linen(module)
    variables = filled(network, IMAGES)
    channels, masked = halved(network, variables, IMAGES)
    assert sorted(group.size for group in channels.groups) == sorted(sizes)
    smaller = pruning.remove_channels(channels, masked)
    for group in channels.groups:
        for member in group.members:
            length = paths.leaves_with_paths(smaller)[member.path].shape[member.axis]
            assert length == sum(np.isin(member.channels, _alive(group, masked)))
    module = models.narrow(module, smaller, IMAGES[:1])
    apply = jax.jit(lambda variables: network.apply(variables, IMAGES)[0].logits)
    expected = apply(masked)
    np.testing.assert_allclose(jax.jit(module.apply)(smaller, IMAGES), expected, rtol=1e-5, atol=1e-5)
    assert size(smaller['params']) < 0.8 * size(variables['params'])
    # The channels that went were not idle.
    assert np.abs(apply(variables) - expected).max() > 1e-2


def _alive(group, variables):
    leaves = paths.leaves_with_paths(variables)
    alive = set()
    for member in group.members:
        if member.path.startswith('params/'):
            rows = np.moveaxis(np.asarray(leaves[member.path]), member.axis, 0).reshape(len(member.channels), -1)
            alive |= set(member.channels[np.any(rows != 0, axis=1)].tolist())
    return sorted(alive)


def test_residual_streams_are_one_group_and_the_insides_of_blocks_are_others():
    network = networks.from_linen(models.ResNet(14, widths=(4, 4, 6, 8)))
    variables = jax.eval_shape(lambda: network.init(jax.random.key(0), IMAGES[:1]))
    groups = pruning.channel_groups(network, variables, IMAGES[:1]).groups
    kernels = [{(m.path, m.axis) for m in group.members if m.path.endswith('kernel')} for group in groups]
    stream = {
        ('params/stem/kernel', 3),
        *((f'params/stage1/block{i}/conv1/kernel', 2) for i in range(2)),
        *((f'params/stage1/block{i}/conv2/kernel', 3) for i in range(2)),
        ('params/stage2/block0/conv1/kernel', 2),
        ('params/stage2/block0/shortcut/kernel', 2),
    }
    assert stream in kernels
    assert {('params/stage3/block1/conv1/kernel', 3), ('params/stage3/block1/conv2/kernel', 2)} in kernels
    (of_stream,) = (group for group, found in zip(groups, kernels, strict=True) if found == stream)
    assert ('batch_stats/stem_norm/var', 0) in {(m.path, m.axis) for m in of_stream.members}


def function_network(function, shapes):
    """A network without a framework."""

    def init(key, inputs):
        del inputs
        keys = jax.random.split(key, len(shapes))
        draws = {name: jax.random.normal(keys[i], shape) for i, (name, shape) in enumerate(shapes.items())}
        return {'params': draws}

    return networks.Network(init, lambda v, x, *, train=False, rng=None: (networks.Outputs(function(v['params'], x)), {}))


def convolve(x, kernel, groups=1):
    layout = ('NHWC', 'HWIO', 'NHWC')
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), 'SAME', dimension_numbers=layout, feature_group_count=groups)


def mean(x):
    return jnp.mean(x, axis=(1, 2))


# (function, shapes of its parameters, sizes of the groups that can be removed)
REMOVABLE = {
    # A channel of zeros is one half after the sigmoid, and no longer counts.
    'a function that is not zero at zero': (lambda p, x: jax.nn.sigmoid(x @ p['a']) @ p['b'], {'a': (4, 6), 'b': (6, 3)}, [6]),
    'two branches that are added': (
        lambda p, x: (x @ p['a'] + jnp.tanh(x @ p['b'])) @ p['c'],
        {'a': (4, 6), 'b': (4, 6), 'c': (6, 3)},
        [6],
    ),
    'branches that are joined': (
        lambda p, x: jnp.concatenate([x @ p['a'], x @ p['b']], axis=1) @ p['c'],
        {'a': (4, 6), 'b': (4, 5), 'c': (11, 3)},
        [6, 5],
    ),
    'gates': (
        lambda p, x: ((x @ p['a']) * jax.nn.sigmoid(x @ p['gate'])) @ p['c'],
        {'a': (4, 6), 'gate': (4, 6), 'c': (6, 3)},
        [6],
    ),
    'weights in the first operand': (
        lambda p, x: jnp.einsum('oh,bh->bo', p['b'], jax.nn.relu(jnp.einsum('hi,bi->bh', p['a'], x))),
        {'a': (6, 4), 'b': (3, 6)},
        [6],
    ),
    'a depthwise convolution with two filters a channel': (
        lambda p, x: mean(convolve(convolve(x, p['a']), p['d'], p['a'].shape[-1])) @ p['c'],
        {'a': (3, 3, 1, 4), 'd': (3, 3, 1, 8), 'c': (8, 3)},
        [4],
    ),
    'one of two axes': (
        lambda p, x: jnp.einsum('bhd,hdo->bo', jnp.einsum('bi,ihd->bhd', x, p['a']), p['b']),
        {'a': (4, 5, 6), 'b': (5, 6, 3)},
        [5, 6],
    ),
    'within a loop over layers': (
        lambda p, x: (
            jax.lax.scan(lambda h, w: (h + jax.nn.relu(h @ w[0]) @ w[1], None), x @ p['a'], (p['u'], p['v']))[0] @ p['c']
        ),
        {'a': (4, 5), 'u': (3, 5, 7), 'v': (3, 7, 5), 'c': (5, 2)},
        [5, 7],
    ),
}

KEPT = {
    'layer norm': lambda p, x: nn.LayerNorm(use_bias=False, use_scale=False).apply({}, x @ p['a']) @ p['b'],
    'softmax': lambda p, x: jax.nn.softmax(x @ p['a']) @ p['b'],
    'the mean of channels': lambda p, x: (x @ p['a'] + jnp.mean(x @ p['a'], axis=1, keepdims=True)) @ p['b'],
    'order': lambda p, x: jnp.cumsum(x @ p['a'], axis=1) @ p['b'],
    'sorting': lambda p, x: jnp.sort(x @ p['a'], axis=1) @ p['b'],
    'some of the channels': lambda p, x: (x @ p['a'])[:, :3] @ p['b'][:3],
    'padding of channels': lambda p, x: jnp.pad((x @ p['a'])[:, :5], ((0, 0), (0, 1))) @ p['b'],
    'channels that are split': lambda p, x: jnp.sum((x @ p['a']).reshape(-1, 2, 3), axis=1) @ p['b'][:3],
    'an array that is no parameter': lambda p, x: ((x @ p['a']) * jnp.arange(6.0)[None]) @ p['b'],
    'the inputs': lambda p, x: (x @ p['a'] + jnp.concatenate([x, x[:, :2]], axis=1)) @ p['b'],
    'the output': lambda p, x: x @ p['a'] + jnp.sum(p['b']),
    'control flow': lambda p, x: jax.lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, x @ p['a']) @ p['b'],
}


@pytest.mark.parametrize('name', REMOVABLE)
def test_channels_of_any_function_are_found(name):
    function, shapes, sizes = REMOVABLE[name]
    network = function_network(function, shapes)
    inputs = IMAGES if 'convolution' in name else IMAGES[:, 0, :4, 0]
    variables = network.init(jax.random.key(0), inputs)
    channels, masked = halved(network, variables, inputs)
    assert sorted(group.size for group in channels.groups) == sorted(sizes)
    smaller = pruning.remove_channels(channels, masked)
    assert size(smaller) < size(variables)
    expected = function(masked['params'], inputs)
    np.testing.assert_allclose(function(smaller['params'], inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', KEPT)
def test_channels_that_something_depends_on_are_kept(name):
    network = function_network(KEPT[name], {'a': (4, 6), 'b': (6, 3)})
    inputs = IMAGES[:, 0, :4, 0]
    with pytest.raises(ValueError, match='channel_groups: the network has no channels that can be removed'):
        pruning.channel_groups(network, network.init(jax.random.key(0), inputs), inputs)


def test_grouped_convolutions_keep_their_channels():
    network = function_network(
        lambda p, x: mean(convolve(convolve(x, p['a']), p['g'], 2)) @ p['c'],
        {'a': (3, 3, 1, 4), 'g': (3, 3, 2, 6), 'c': (6, 3)},
    )
    with pytest.raises(ValueError, match='no channels'):
        pruning.channel_groups(network, network.init(jax.random.key(0), IMAGES), IMAGES)


def test_attention_keeps_its_heads():
    network = networks.from_linen(models.VisionTransformer(depth=1, width=8, heads=2))
    variables = jax.eval_shape(lambda: network.init(jax.random.key(0), IMAGES[:1]))
    (group,) = pruning.channel_groups(network, variables, IMAGES[:1]).groups
    assert {member.path for member in group.members if member.path.endswith('kernel')} == {
        'params/block0/expand/kernel',
        'params/block0/reduce/kernel',
    }


class Block(nnx.Module):
    def __init__(self, rngs):
        self.first, self.norm = nnx.Linear(8, 6, rngs=rngs), nnx.BatchNorm(6, rngs=rngs)
        self.second = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.norm(self.first(x))))


def test_nnx_networks_have_channels_too():
    network = networks.from_nnx(Block)
    inputs = IMAGES[:, 0, :, 0]
    variables = filled(network, inputs)
    channels, masked = halved(network, variables, inputs)
    (group,) = channels.groups
    assert {member.path for member in group.members} == {
        *(f'params/{name}' for name in ('first/kernel', 'first/bias', 'norm/scale', 'norm/bias', 'second/kernel')),
        *(f'batch_stats/norm/{name}' for name in ('mean', 'var')),
    }
    smaller = pruning.remove_channels(channels, masked)
    assert smaller['params']['first']['kernel'].shape == (8, 3)
    assert smaller['batch_stats']['norm']['var'].shape == (3,)


def test_stacked_layers_share_what_is_removed():
    network = networks.from_linen(ScannedMLP(depth=3, width=6))
    inputs = IMAGES[:, 0, :, 0]
    variables = filled(network, inputs)
    channels, masked = halved(network, variables, inputs)
    assert [group.size for group in channels.groups] == [6]
    smaller = pruning.remove_channels(channels, masked)
    expected = network.apply(masked, inputs)[0].logits
    narrower = networks.from_linen(ScannedMLP(depth=3, width=3))
    np.testing.assert_allclose(narrower.apply(smaller, inputs)[0].logits, expected, rtol=1e-5, atol=1e-5)


def test_the_weakest_of_every_group_go_with_the_exact_count_and_never_all():
    network = function_network(lambda p, x: jax.nn.relu(x @ p['a']) @ p['b'], {'a': (4, 6), 'b': (6, 3)})
    inputs = IMAGES[:, 0, :4, 0]
    variables = network.init(jax.random.key(0), inputs)
    channels = pruning.channel_groups(network, variables, inputs)
    scores = pruning.magnitude(variables['params'])
    total = np.abs(np.asarray(variables['params']['a'])).sum(axis=0) + np.abs(np.asarray(variables['params']['b'])).sum(axis=1)
    for sparsity, kept in ((0.0, 6), (0.34, 4), (0.5, 3), (0.99, 1), (1.0, 1)):
        masks = channels.masks(scores, sparsity)
        best = np.sort(np.argsort(-total)[:kept])
        np.testing.assert_array_equal(np.flatnonzero(np.asarray(masks['a']).all(axis=0)), best)
        np.testing.assert_array_equal(np.asarray(masks['b']), np.isin(np.arange(6), best)[:, None] & np.ones(3, bool))
    # Ties too.
    ties = channels.masks({path: jnp.ones_like(score) for path, score in scores.items()}, 0.5)
    assert np.asarray(ties['a']).all(axis=0).sum() == 3
    with pytest.raises(ValueError, match=r'sparsity must be between 0 and 1, got 1\.5'):
        channels.masks(scores, 1.5)


def test_a_channel_whose_last_weight_is_pruned_never_comes_back_and_training_removes_it():
    module = models.ResNet(8, widths=(4, 4, 6, 8))
    network = networks.from_linen(module)
    variables = filled(network, IMAGES)
    channels = pruning.channel_groups(network, variables, IMAGES[:1])
    schedule = pruning.cubic(0.5, begin=0, end=6)
    optimizer = pruning.prune(optax.adamw(1e-2), schedule, leaves=channels.leaves, masks=channels.masks)
    state, gone = optimizer.init(variables['params']), {}

    @jax.jit
    def step(params, state):
        loss = lambda params: jnp.mean(network.apply({**variables, 'params': params}, IMAGES)[0].logits ** 2)  # noqa: E731
        with jax.numpy_dtype_promotion('standard'):
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params = variables['params']
    for _ in range(10):
        params, state = step(params, state)
        for path, mask in state.masks.items():
            pruned = ~np.asarray(mask)
            assert pruned[gone.get(path, np.zeros_like(pruned))].all()
            assert not np.asarray(paths.leaves_with_paths(params)[path])[pruned].any()
            gone[path] = pruned
    smaller = pruning.remove_channels(channels, {**variables, 'params': params})
    assert [leaf.shape for leaf in jax.tree.leaves(smaller['params']['stage3']['block0']['conv1'])] == [(3, 3, 3, 4)]
    expected = jax.jit(network.apply)({**variables, 'params': params}, IMAGES)[0].logits
    small = models.narrow(module, smaller, IMAGES[:1])
    np.testing.assert_allclose(jax.jit(small.apply)(smaller, IMAGES), expected, rtol=1e-5, atol=1e-5)


def test_of_a_group_of_zeros_one_channel_stays_and_other_variables_are_refused():
    network = function_network(lambda p, x: jax.nn.relu(x @ p['a']) @ p['b'], {'a': (4, 6), 'b': (6, 3)})
    inputs = IMAGES[:, 0, :4, 0]
    variables = network.init(jax.random.key(0), inputs)
    channels = pruning.channel_groups(network, variables, inputs)
    smaller = pruning.remove_channels(channels, jax.tree.map(jnp.zeros_like, variables))
    assert smaller['params']['a'].shape == (4, 1)
    unchanged = pruning.remove_channels(channels, variables)
    assert unchanged['params']['a'].shape == (4, 6)
    with pytest.raises(ValueError, match='remove_channels: params/a is not as it was when the channels were found'):
        pruning.remove_channels(channels, smaller)
