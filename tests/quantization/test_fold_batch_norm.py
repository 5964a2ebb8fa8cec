"""Folded batch norms multiply by one, the outputs stay, and what cannot be folded is left alone."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.model_checks import filled

from kdjax import models, networks, paths, quantization
from kdjax.networks import Network, Outputs
from kdjax.quantization import Rule, fold_batch_norm

RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.standard_normal((3, 8, 8, 2)), jnp.float32)


def norm(name: str, **options: Any) -> nn.BatchNorm:
    return nn.BatchNorm(use_running_average=True, name=name, **options)


class LinenLayers(nn.Module):
    """Grouped convolution with a bias, and a dense layer without."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(norm('norm1')(nn.Conv(4, (3, 3), feature_group_count=2, name='conv')(x)))
        return norm('norm2')(nn.Dense(5, use_bias=False, name='dense')(x.mean((1, 2))))


class NNXLayers(nnx.Module):
    """The same."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(2, 4, (3, 3), feature_group_count=2, rngs=rngs)
        self.dense = nnx.Linear(4, 5, use_bias=False, rngs=rngs)
        self.norm1, self.norm2 = nnx.BatchNorm(4, rngs=rngs), nnx.BatchNorm(5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm2(self.dense(nnx.relu(self.norm1(self.conv(x))).mean((1, 2))))


def spread(variables: Any) -> Any:
    """Vectors that differ from channel to channel, of either sign; variances positive; one channel that is switched off."""

    def draw(path: str, leaf: jax.Array) -> jax.Array:
        if leaf.ndim > 1:
            return leaf
        values = RNG.uniform(0.1, 3, leaf.shape) * (1 if path.endswith('var') else RNG.choice([-1, 1], leaf.shape))
        return jnp.asarray(values, jnp.float32).at[0].mul(0 if path.endswith('norm1/scale') else 1)

    return paths.map_with_paths(draw, variables)


def logits(network: Network, variables: Any) -> np.ndarray:
    return np.asarray(jax.jit(network.apply)(variables, IMAGES)[0].logits)


def assert_same_outputs(network: Network, variables: Any, folded: Any) -> None:
    wanted = logits(network, variables)
    np.testing.assert_allclose(logits(network, folded), wanted, rtol=1e-5, atol=1e-5 * np.max(np.abs(wanted)))


@pytest.mark.parametrize('framework', ['linen', 'nnx'])
def test_every_number_is_what_the_formula_says(framework: str) -> None:
    network = networks.from_linen(LinenLayers()) if framework == 'linen' else networks.from_nnx(NNXLayers)
    variables = spread(filled(LinenLayers(), IMAGES))
    folded = jax.jit(lambda variables: fold_batch_norm(network, variables, IMAGES))(variables)
    assert_same_outputs(network, variables, folded)
    old, new = (
        {path: np.asarray(leaf, np.float64) for path, leaf in paths.leaves_with_paths(tree).items()}
        for tree in (variables, folded)
    )
    unchanged = dict(old)
    for layer, bn in (('conv', 'norm1'), ('dense', 'norm2')):
        m = old[f'params/{bn}/scale'] / np.sqrt(old[f'batch_stats/{bn}/var'] + 1e-5)
        assert (m == 0).sum() == (bn == 'norm1')
        vectors = [f'batch_stats/{bn}/mean', f'params/{layer}/kernel', *([f'params/{layer}/bias'] if layer == 'conv' else [])]
        for path in vectors:
            np.testing.assert_allclose(new[path], unchanged.pop(path) * m, rtol=1e-5)
        scale = unchanged.pop(f'params/{bn}/scale')
        np.testing.assert_allclose(new[f'params/{bn}/scale'], scale / np.where(m == 0, 1, m), rtol=1e-5)
    for path, leaf in unchanged.items():
        np.testing.assert_array_equal(new[path], leaf)


@pytest.mark.parametrize(
    'module', [models.ResNet(8, widths=(4, 4, 4, 6)), models.MobileNetV2(stages=((1, 4, 1, 1), (2, 4, 2, 2)), stem=4, last=8)]
)
def test_every_batch_norm_of_the_models_is_folded(module: nn.Module) -> None:
    network, variables = networks.from_linen(module), spread(filled(module, IMAGES))
    folded = fold_batch_norm(network, variables, IMAGES)
    assert_same_outputs(network, variables, folded)
    leaves = paths.leaves_with_paths(folded)
    scales = [path for path in leaves if path.endswith('/scale')]
    assert len(scales) == sum(path.endswith('/var') for path in leaves)
    for path in scales:
        m = leaves[path] / np.sqrt(leaves[path.replace('params', 'batch_stats').replace('scale', 'var')] + 1e-5)
        np.testing.assert_allclose(m[m != 0], 1, rtol=1e-5)


def test_quantization_per_tensor_then_rounds_less() -> None:
    """Channels whose weights differ a thousandfold, and that the batch norm brings to one size."""
    network, variables = networks.from_linen(LinenLayers()), filled(LinenLayers(), IMAGES)
    rules = {'conv/kernel': Rule(4, None, per_channel=False)}
    sizes = jnp.array([1.0, 10.0, 100.0, 1000.0])
    variables['params']['conv'] = {
        'kernel': variables['params']['conv']['kernel'] * sizes.reshape(1, 1, 1, 4),
        'bias': jnp.zeros(4),
    }
    variables['batch_stats']['norm1'] = {'mean': jnp.zeros(4), 'var': sizes**2}
    wanted, quantized = logits(network, variables), quantization.fake_quantize_network(network, rules)
    folded = fold_batch_norm(network, variables, IMAGES)
    before, after = (np.linalg.norm(logits(quantized, v) - wanted) for v in (variables, folded))
    assert after < 0.25 * before


class Rematerialized(nn.Module):
    """A block that the backward pass computes again."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.remat(LinenLayers)(name='block')(x)


def test_batch_norms_within_calls_are_folded() -> None:
    network, variables = networks.from_linen(Rematerialized()), spread(filled(Rematerialized(), IMAGES))
    folded = fold_batch_norm(network, variables, IMAGES)
    assert_same_outputs(network, variables, folded)
    plain = {name: tree['block'] for name, tree in variables.items()}
    wanted = fold_batch_norm(networks.from_linen(LinenLayers()), plain, IMAGES)
    jax.tree.map(np.testing.assert_array_equal, folded, {name: {'block': tree} for name, tree in wanted.items()})


class PreActivation(nn.Module):
    """A batch norm before the layer, of inputs and of what a ReLU gave."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return norm('norm2')(nn.relu(nn.Dense(4)(norm('norm1')(x)))).mean((1, 2))


class Branching(nn.Module):
    """The product is used before the batch norm and after it."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.Dense(4)(x)
        return (norm('norm1')(y) + y).mean((1, 2))


class SharedNorm(nn.Module):
    """One batch norm after two layers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shared = norm('norm1')
        return (shared(nn.Dense(4)(x)) + shared(nn.Dense(4)(x))).mean((1, 2))


class SharedLayer(nn.Module):
    """Two batch norms after one layer."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layer = nn.Dense(2)
        return (norm('norm1')(layer(x)) + norm('norm2')(layer(2 * x))).mean((1, 2))


class WithoutScale(nn.Module):
    """A batch norm that has only a variance to multiply by."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return norm('norm1', use_scale=False)(nn.Dense(4)(x)).mean((1, 2))


class Stretched(nn.Module):
    """An activation between product and batch norm."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return norm('norm1')(2 * nn.Dense(4)(x)).mean((1, 2))


class Positions(nn.Module):
    """A batch norm along another axis than the product's output channels."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return norm('norm1', axis=1)(nn.Dense(8)(x)).mean((1, 2))


@pytest.mark.parametrize('module', [PreActivation, Branching, SharedNorm, SharedLayer, WithoutScale, Stretched, Positions])
def test_what_cannot_be_folded_is_left_alone(module: type[nn.Module]) -> None:
    variables = spread(filled(module(), IMAGES))
    folded = fold_batch_norm(networks.from_linen(module()), variables, IMAGES)
    jax.tree.map(np.testing.assert_array_equal, folded, variables)


def test_scanned_and_tapped_batch_norms_are_left_alone() -> None:
    def scanned(variables: Any, inputs: jax.Array, **_: Any) -> Any:
        p, s = variables['params'], variables['batch_stats']

        def layer(x: jax.Array, slices: Any) -> tuple[jax.Array, None]:
            kernel, scale, mean, var = slices
            return (x @ kernel - mean[None]) * (jax.lax.rsqrt(var + 1e-5) * scale)[None], None

        return Outputs(jax.lax.scan(layer, inputs, (p['kernel'], p['scale'], s['mean'], s['var']))[0]), {}

    shapes = {'params': {'kernel': (2, 3, 3), 'scale': (2, 3)}, 'batch_stats': {'mean': (2, 3), 'var': (2, 3)}}
    variables = jax.tree.map(lambda shape: jnp.full(shape, 2.0), shapes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    with pytest.raises(ValueError, match='fold_batch_norm: nothing subtracts a mean from batch_stats'):
        fold_batch_norm(Network(None, scanned), variables, jnp.ones((4, 3)))
    tapped, variables = networks.from_linen(LinenLayers(), features='conv'), spread(filled(LinenLayers(), IMAGES))
    folded = fold_batch_norm(tapped, variables, IMAGES)
    np.testing.assert_array_equal(folded['params']['conv']['kernel'], variables['params']['conv']['kernel'])
    assert np.all(folded['params']['dense']['kernel'] != variables['params']['dense']['kernel'])


def test_a_network_without_batch_norms_is_an_error() -> None:
    network = networks.from_linen(models.MLP((4,)))
    with pytest.raises(
        ValueError, match=r'^fold_batch_norm: nothing subtracts a mean from batch_stats; give a network with batch'
    ):
        fold_batch_norm(network, filled(models.MLP((4,)), IMAGES), IMAGES)


def test_weights_that_are_integers_already_are_an_error() -> None:
    network, variables = networks.from_linen(LinenLayers()), filled(LinenLayers(), IMAGES)
    stored = quantization.quantize_variables(network, Rule(ranges='dynamic'), variables, IMAGES)
    with pytest.raises(ValueError, match='fold_batch_norm: weights are integers; fold them before quantize_variables'):
        fold_batch_norm(network, stored, IMAGES)
