"""Kernels as products of two thinner ones."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.scanned import ScannedMLP

from kdjax import models, networks, paths, pruning, quantization

IMAGES = jax.random.normal(jax.random.key(1), (3, 8, 8, 1))
ROWS = jax.random.normal(jax.random.key(3), (3, 12))


def rebuilt(factors):
    """The kernels that pairs of factors stand for, in float64 numpy."""

    def join(node):
        if not isinstance(node, dict):
            return node
        if set(node) == {'left', 'right'}:
            left, right = (np.asarray(node[side], np.float64) for side in ('left', 'right'))
            rank = left.shape[-1]
            kept = right.shape[left.ndim - 1 :] if right.ndim == left.ndim else right.shape[1:]
            matrix = left.reshape(-1, rank) @ right.reshape(rank, -1)
            return jnp.asarray(matrix.reshape(*left.shape[:-1], *kept), jnp.float32)
        return {name: join(child) for name, child in node.items()}

    return {**factors, 'params': join(factors['params'])}


NETWORKS = {
    'mlp': networks.from_linen(models.MLP((40, 40))),
    'cnn': networks.from_linen(models.CNN((12, 16), (32,))),
    'resnet': networks.from_linen(models.ResNet(8, widths=(8, 8, 12, 16))),
    'transformer': networks.from_linen(models.VisionTransformer(depth=1, width=16, heads=2)),
}


@pytest.mark.parametrize('name', NETWORKS)
def test_the_thin_network_is_the_network_with_the_products_of_the_factors(name):
    network = NETWORKS[name]
    variables = jax.jit(network.init)(jax.random.key(0), IMAGES)
    thin, factors = pruning.factorize(network, variables, IMAGES, energy=0.6)
    assert sum(leaf.size for leaf in jax.tree.leaves(factors)) < 0.7 * sum(leaf.size for leaf in jax.tree.leaves(variables))
    expected = jax.jit(network.apply)(rebuilt(factors), IMAGES)[0].logits
    np.testing.assert_allclose(jax.jit(thin.apply)(factors, IMAGES)[0].logits, expected, rtol=1e-5, atol=1e-5)
    shapes = jax.eval_shape(thin.init, jax.random.key(0), IMAGES)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, factors)


@pytest.mark.parametrize('energy', [0.3, 0.5, 0.8])
def test_the_rank_is_the_smallest_that_keeps_the_energy_and_the_kernel_the_best_of_its_rank(energy):
    network = networks.from_linen(nn.Dense(40))
    variables = network.init(jax.random.key(0), ROWS)
    kernel = np.asarray(variables['params']['kernel'], np.float64)
    u, values, v = np.linalg.svd(kernel, full_matrices=False)
    _, factors = pruning.factorize(network, variables, ROWS, energy=energy)
    left, right = factors['params']['kernel']['left'], factors['params']['kernel']['right']
    rank = left.shape[1]
    kept = (values**2).cumsum() / (values**2).sum()
    assert kept[rank - 1] >= energy > (kept[rank - 2] if rank > 1 else 0)
    np.testing.assert_allclose(left @ right, (u[:, :rank] * values[:rank]) @ v[:rank], atol=1e-5)
    assert 'bias' in factors['params']


def test_a_kernel_of_low_rank_loses_nothing():
    network = networks.from_linen(nn.Dense(40))
    variables = network.init(jax.random.key(0), ROWS)
    kernel = jax.random.normal(jax.random.key(4), (12, 2)) @ jax.random.normal(jax.random.key(5), (2, 40))
    variables = {'params': {**variables['params'], 'kernel': kernel}}
    thin, factors = pruning.factorize(network, variables, ROWS, energy=1 - 1e-10)
    assert factors['params']['kernel']['left'].shape == (12, 2)
    expected = network.apply(variables, ROWS)[0].logits
    np.testing.assert_allclose(thin.apply(factors, ROWS)[0].logits, expected, rtol=1e-4, atol=1e-4)


class Tied(nn.Module):
    @nn.compact
    def __call__(self, x):
        kernel = self.param('kernel', nn.initializers.normal(), (12, 12))
        return x @ kernel @ kernel


class Transposed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x @ self.param('kernel', nn.initializers.normal(), (30, 12)).T


class Grouped(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.mean(nn.Conv(16, (3, 3), feature_group_count=2)(jnp.tile(x, 8)), axis=(1, 2))


@pytest.mark.parametrize('module,inputs', [(Tied(), ROWS), (Transposed(), ROWS), (Grouped(), IMAGES), (nn.Dense(2), ROWS)])
def test_kernels_that_cannot_be_or_would_not_be_smaller_stay(module, inputs):
    network = networks.from_linen(module)
    variables = network.init(jax.random.key(0), inputs)
    thin, factors = pruning.factorize(network, variables, inputs, energy=0.9)
    assert jax.tree.structure(factors) == jax.tree.structure(dict(variables))
    np.testing.assert_array_equal(thin.apply(factors, inputs)[0].logits, network.apply(variables, inputs)[0].logits)


def test_scanned_kernels_stay_and_those_around_them_do_not():
    network = networks.from_linen(ScannedMLP(depth=2, width=24))
    variables = network.init(jax.random.key(0), ROWS)
    thin, factors = pruning.factorize(network, variables, ROWS, energy=0.5)
    assert set(factors['params']['embed']['kernel']) == {'left', 'right'}
    assert factors['params']['layers']['dense']['kernel'].shape == (2, 24, 24)
    expected = network.apply(rebuilt(factors), ROWS)[0].logits
    np.testing.assert_allclose(thin.apply(factors, ROWS)[0].logits, expected, rtol=1e-5, atol=1e-5)


def test_nnx_state_dropout_and_gradients_pass():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first, self.norm = nnx.Linear(12, 20, rngs=rngs), nnx.BatchNorm(20, rngs=rngs)
            self.drop, self.second = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(20, 3, rngs=rngs)

        def __call__(self, x):
            return self.second(self.drop(nnx.relu(self.norm(self.first(x)))))

    network = networks.from_nnx(Net)
    variables = network.init(jax.random.key(0), ROWS)
    thin, factors = pruning.factorize(network, variables, ROWS, energy=0.5, leaves='first/kernel')
    assert set(factors['params']['first']['kernel']) == {'left', 'right'}

    def run(network, variables):
        outputs, state = network.apply(variables, ROWS, train=True, rng=jax.random.key(7))
        return jnp.sum(outputs.logits**2), state

    (_, state), gradients = jax.value_and_grad(lambda v: run(thin, v), has_aux=True)(factors)
    (_, expected_state), expected = jax.value_and_grad(lambda v: run(network, v), has_aux=True)(rebuilt(factors))
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(expected_state), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    # The chain rule: dL/dleft = dL/dW · rightᵀ.
    pair, slope = factors['params']['first']['kernel'], expected['params']['first']['kernel']
    ours = gradients['params']['first']['kernel']
    np.testing.assert_allclose(ours['left'], slope @ pair['right'].T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours['right'], pair['left'].T @ slope, rtol=1e-4, atol=1e-5)


def test_thin_networks_are_quantized_as_any_others():
    network = NETWORKS['mlp']
    variables = network.init(jax.random.key(0), IMAGES)
    thin, factors = pruning.factorize(network, variables, IMAGES, energy=0.6)
    rule = quantization.Rule(ranges='dynamic')
    quantized = quantization.quantize_variables(thin, rule, factors, IMAGES)
    assert isinstance(quantized['params']['hidden0']['kernel']['left'], quantization.QuantizedArray)
    exact = thin.apply(factors, IMAGES)[0].logits
    rounded = quantization.quantize_network(thin, rule).apply(quantized, IMAGES)[0].logits
    assert 0 < np.abs(rounded - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize('energy', [0, 1.1, float('nan')])
def test_bad_energies_and_patterns_are_refused(energy):
    network = networks.from_linen(nn.Dense(40))
    variables = network.init(jax.random.key(0), ROWS)
    with pytest.raises(ValueError, match='factorize: energy must be above 0 and at most 1'):
        pruning.factorize(network, variables, ROWS, energy=energy)
    with pytest.raises(ValueError, match="the pattern 'kernels' matches no path"):
        pruning.factorize(network, variables, ROWS, energy=0.5, leaves='kernels')


def test_bfloat16_weights_stay_bfloat16():
    network = networks.from_linen(nn.Dense(40, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16))
    variables = network.init(jax.random.key(0), ROWS)
    thin, factors = pruning.factorize(network, variables, ROWS, energy=0.5)
    assert {leaf.dtype for leaf in paths.leaves_with_paths(factors).values()} == {jnp.dtype(jnp.bfloat16)}
    assert thin.apply(factors, ROWS)[0].logits.dtype == jnp.bfloat16
