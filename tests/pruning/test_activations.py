"""Importance by activations against float64 numpy, and a student cut from its teacher by it."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import models, networks, pruning
from kdjax.paths import leaves_with_paths, map_with_paths

TOKENS = np.random.default_rng(0).integers(0, 32, (2, 4, 6)).astype(np.int32)
DECODER = models.Decoder(vocabulary=32, depth=2, width=16, heads=4, hidden=12, key_value_heads=2, tied=True)
TAPS = tuple(f'block1/{name}' for name in ('gate', 'up', 'mlp_norm', 'attention_norm'))
NETWORK = networks.from_linen(DECODER, features=TAPS)


@functools.cache
def variables():
    return jax.device_get(jax.jit(lambda key: NETWORK.init(key, TOKENS[0]))(jax.random.key(0)))


def logits_of(network, variables, tokens):
    """Compiled."""
    return jax.jit(lambda variables: network.apply(variables, tokens)[0].logits)(variables)


def norm(x, order):
    x = np.abs(np.asarray(x, np.float64)).reshape(-1, x.shape[-1])
    return np.mean(x**order, axis=0) ** (1 / order)


@pytest.mark.parametrize('order', [1, 2])
def test_it_is_the_norm_of_what_each_kernel_reads(order):
    scores = pruning.activation_norms(NETWORK, variables(), list(TOKENS), order=order)
    features = jax.jit(lambda own: NETWORK.apply(own, TOKENS.reshape(8, 6))[0].features)(variables())
    gate, up, mlp_norm, attention_norm = (np.asarray(features[path]) for path in TAPS)
    hidden = gate / (1 + np.exp(-gate)) * up
    for path, x in (
        ('down', hidden),
        ('gate', mlp_norm),
        ('up', mlp_norm),
        ('attention/query', attention_norm),
        ('attention/value', attention_norm),
    ):
        np.testing.assert_allclose(scores[f'block1/{path}/kernel'], norm(x, order)[:, None], rtol=1e-5)
    # The channels of all heads in a row; the head is the embedding, which reads along its other axis.
    shapes = {path: score.shape for path, score in scores.items()}
    assert shapes['block0/attention/output/kernel'] == (16, 1)
    assert shapes['tokens/embedding'] == (1, 16)
    assert shapes['block0/mlp_norm/scale'] == (1,)
    assert shapes.keys() == leaves_with_paths(variables()['params']).keys()


def test_scanned_blocks_have_the_scores_of_all_of_them():
    scanned = networks.from_linen(DECODER.clone(scan=True))
    blocks = [variables()['params'][f'block{i}'] for i in range(2)]
    rest = {name: tree for name, tree in variables()['params'].items() if not name.startswith('block')}
    stacked = {'params': rest | {'blocks': {'block': jax.tree.map(lambda *x: np.stack(x), *blocks)}}}
    found = pruning.activation_norms(scanned, stacked, [TOKENS[0]])
    expected = pruning.activation_norms(NETWORK, variables(), [TOKENS[0]])
    for path in ('down/kernel', 'attention/output/kernel'):
        pair = [expected[f'block{i}/{path}'] for i in range(2)]
        np.testing.assert_allclose(found[f'blocks/block/{path}'], np.stack(pair), rtol=1e-5)


class Convolutions(nn.Module):
    """A convolution in groups after another, and a product over two axes, in another order."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), name='first')(x)
        self.sow('intermediates', 'before', x)
        x = nn.Conv(4, (3, 3), feature_group_count=2, name='grouped')(x)
        self.sow('intermediates', 'after', x)
        kernel = self.param('head', nn.initializers.normal(), (4, 5, 3))
        return jax.lax.dot_general(x.mean(axis=1), kernel, (((1, 2), (1, 0)), ((), ())))


def test_convolutions_and_kernels_of_several_axes():
    network = networks.from_linen(Convolutions(), features=('before', 'after'))
    images = np.random.default_rng(1).normal(size=(2, 5, 5, 2)).astype(np.float32)
    own = network.init(jax.random.key(0), images)
    scores = pruning.activation_norms(network, own, [images], order=2)
    features = network.apply(own, images)[0].features
    np.testing.assert_allclose(scores['first/kernel'][0, 0, :, 0], norm(images, 2), rtol=1e-5)
    squares = norm(features['before'], 2).reshape(2, 2) ** 2  # of groups that share the positions of a kernel
    np.testing.assert_allclose(scores['grouped/kernel'][0, 0, :, 0], np.sqrt(squares.mean(0)), rtol=1e-5)
    head = np.sqrt(np.mean(np.asarray(features['after']).mean(axis=1) ** 2, axis=0))  # [width, channels]
    np.testing.assert_allclose(scores['head'][..., 0], head.T, rtol=1e-5)


@pytest.mark.parametrize('scan', [False, True])
def test_hidden_units_that_the_data_never_use_go_first_and_the_narrower_student_computes_the_same(scan):
    module = DECODER.clone(scan=scan, depth=2 if scan else 1)
    network = networks.from_linen(module)
    own = jax.device_get(jax.jit(lambda key: network.init(key, TOKENS[0]))(jax.random.key(1)))
    idle = [1, 4, 9]
    # By their weights they are the largest of all, since what reads them makes up for what makes them.
    factors = {'up/kernel': (np.float32(1e-9), 1), 'down/kernel': (np.float32(1e3), 0)}

    def scaled(path, leaf):
        factor, axis = next((found for name, found in factors.items() if path.endswith(name)), (np.float32(1), 0))
        along = np.where(np.isin(np.arange(12), idle), factor, np.float32(1))
        return leaf if factor == 1 else leaf * (along if axis else along[:, None])

    own = map_with_paths(scaled, own)
    channels = pruning.channel_groups(network, own, TOKENS[0])
    scores = pruning.activation_norms(network, own, list(TOKENS))
    masks = channels.masks(scores, 0.25)
    smaller = pruning.remove_channels(channels, {'params': pruning.apply_masks(masks, own['params'])})
    student = models.narrow(module, smaller, TOKENS[0])
    assert set(student.narrowed.values()) == {9}
    for path, leaf in leaves_with_paths(smaller['params']).items():
        if path.endswith('gate/kernel'):
            np.testing.assert_array_equal(leaf, np.delete(leaves_with_paths(own['params'])[path], idle, axis=-1))
    logits = [logits_of(net, v, TOKENS[1]) for net, v in ((networks.from_linen(student), smaller), (network, own))]
    np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r'^activation_norms: there are no batches'):
        pruning.activation_norms(NETWORK, variables(), [])
    with pytest.raises(ValueError, match=r'^activation_norms: order must be positive, got 0'):
        pruning.activation_norms(NETWORK, variables(), [TOKENS[0]], order=0)
    embedding = networks.from_linen(nn.Embed(4, 2))
    with pytest.raises(ValueError, match=r'^activation_norms: the network multiplies its inputs by no parameter'):
        pruning.activation_norms(embedding, embedding.init(jax.random.key(0), TOKENS[0]), [TOKENS[0] % 4])


def test_block_importance_is_one_less_the_mean_cosine():
    x, y = np.random.default_rng(2).normal(size=(2, 3, 4, 5)).astype(np.float32)
    cosines = np.sum(np.float64(x) * y, -1) / np.linalg.norm(np.float64(x), axis=-1) / np.linalg.norm(np.float64(y), axis=-1)
    np.testing.assert_allclose(pruning.block_importance(x, y), 1 - cosines.mean(), rtol=1e-5)
    where = np.random.default_rng(3).uniform(size=(3, 4)) < 0.5
    hidden = np.where(where[..., None], x, np.nan)
    np.testing.assert_allclose(pruning.block_importance(hidden, y, where=where), 1 - cosines[where].mean(), rtol=1e-5)
    np.testing.assert_allclose(pruning.block_importance(x, 1e20 * x), 0, atol=1e-6)
    np.testing.assert_allclose(pruning.block_importance(x, -x), 2, rtol=1e-6)
    assert pruning.block_importance(x, np.zeros_like(x)) == 1
    assert pruning.block_importance(hidden, y, where=np.zeros((3, 4), bool)) == 0
    with pytest.raises(ValueError, match=r'^block_importance: inputs \(3, 4, 5\) and outputs \(4, 5\) must have one shape'):
        pruning.block_importance(x, y[0])
    assert jnp.isnan(pruning.block_importance(np.full_like(x, np.nan), y))


def test_a_head_of_keys_that_says_least_goes_with_its_queries():
    """By hand, since attention depends on how many there are: the scores are those of the channels of all heads in a row."""
    own = {'params': dict(variables()['params'])}
    small = np.repeat(np.float32([1, 1e-6]), 4)  # the second head of values, and so the last two of what is attended
    own = map_with_paths(lambda path, leaf: leaf * small if path.endswith('value/kernel') else leaf, own)
    scores = pruning.activation_norms(NETWORK, own, list(TOKENS))
    totals = np.asarray(scores['block0/attention/output/kernel']).reshape(2, 8).sum(axis=1)  # two heads for one of keys
    assert totals[1] < 1e-5 * totals[0]

    def cut(path, leaf):
        name = path.split('/')[-2]
        if '/attention/' not in path:
            return leaf
        return leaf[:8] if name == 'output' else leaf[:, : 8 if name == 'query' else 4]

    smaller = networks.from_linen(DECODER.clone(heads=2, key_value_heads=1, head_width=4))
    logits = [logits_of(net, v, TOKENS[0]) for net, v in ((smaller, map_with_paths(cut, own)), (NETWORK, own))]
    np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-4)
