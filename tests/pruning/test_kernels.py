"""What is pruned and quantized unless said otherwise, and what a network multiplies by: exact sets, whatever the names."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers.token_networks import CASES

from kdjax import networks, paths, pruning, quantization
from kdjax.networks import Network, Outputs

IN_ATTENTION = {f'attention/{name}/kernel' for name in ('query', 'key', 'value', 'out')}
IN_BLOCK = {f'blocks/{path}' for path in (*IN_ATTENTION, 'up/kernel', 'down/kernel')}
ROWS = jnp.ones((2, 3, 4))
TOKENS = jnp.zeros((2, 3), jnp.int32)


class Attentive(nnx.Module):
    """Attention, a norm, and a dense layer whose bias and gain have two axes."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.w = nnx.Param(jnp.ones((4, 4)))
        self.b = nnx.Param(jnp.ones((3, 4)))
        self.gain = nnx.Param(jnp.ones((1, 4)))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.norm(self.attention(x))
        return x @ self.w[...] * self.gain[...][None] + self.b[...][None]


class Tied(nn.Module):
    """The head multiplies by the table of embeddings."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = nn.Embed(5, 4, name='tokens')
        return embed.attend(nn.LayerNorm(name='norm')(embed(tokens)))


def stacked(params: Any, x: jax.Array) -> jax.Array:
    """Two layers in a scan, with scales that an einsum multiplies by, then a depthwise filter; the names say nothing."""

    def layer(x: jax.Array, own: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        one, two, three = own
        return jnp.einsum('blc,c->blc', nn.relu(x @ one + two[None, None]), three), None

    x, _ = jax.lax.scan(layer, x, (params['one'], params['two'], params['three']))
    layout = ('NHC', 'HIO', 'NHC')
    return jax.lax.conv_general_dilated(x, params['four'], (1,), 'SAME', dimension_numbers=layout, feature_group_count=4)


STACKED = {'one': jnp.ones((2, 4, 4)), 'two': jnp.ones((2, 4)), 'three': jnp.ones((2, 4)), 'four': jnp.ones((3, 1, 4))}
# The network, its inputs, what it multiplies by, and what the names add to that: tables, and names that say nothing.
NETWORKS = {
    'scanned tokens': (
        CASES['tokens'].network,
        CASES['tokens'].inputs,
        IN_BLOCK | {'head/kernel'},
        {'tokens/embedding', 'types/embedding', 'positions'},
    ),
    'nnx': (networks.from_nnx(Attentive), ROWS, IN_ATTENTION | {'w'}, {'gain'}),
    'tied': (networks.from_linen(Tied()), TOKENS, {'tokens/embedding'}, set()),
    'no names': (
        Network(lambda key, inputs: {'params': STACKED}, lambda v, x, **_: (Outputs(stacked(v['params'], x)), {})),
        ROWS,
        {'one', 'four'},
        {'two', 'three'},
    ),
}


@pytest.mark.parametrize('name', NETWORKS)
def test_kernels_are_what_products_sum_with_and_by_default_what_no_name_calls_a_vector(name: str) -> None:
    network, inputs, kernels, more = NETWORKS[name]
    variables = jax.eval_shape(network.init, jax.random.key(0), inputs)
    found = pruning.product_kernels(network, variables, inputs)
    assert found == tuple(sorted(kernels))
    assert set(paths.select(paths.kernels, variables['params'])) == kernels | more
    ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), variables['params'])
    assert set(pruning.prune(optax.sgd(0.1), 0.5).init(ones).masks) == kernels | more
    assert set(pruning.prune(optax.sgd(0.1), 0.5, leaves=found).init(ones).masks) == kernels
    small = jax.eval_shape(quantization.quantize_weights, ones)
    quantized = jax.tree.leaves_with_path(small, is_leaf=lambda leaf: isinstance(leaf, quantization.QuantizedArray))
    assert {paths.path_of(keys) for keys, x in quantized if isinstance(x, quantization.QuantizedArray)} == kernels | more


def test_statistics_of_scanned_norms_are_no_weights() -> None:
    tree = {'batch_stats': {'norm': {'mean': np.ones((2, 4)), 'var': np.ones((2, 4))}}, 'params': {'kernel': np.ones((2, 4))}}
    assert list(paths.select(paths.kernels, tree)) == ['params/kernel']


def test_a_parameter_whose_name_ends_like_a_second_use_of_another_is_not_taken_for_one() -> None:
    params = {'w': jnp.ones((4, 4)), 'w_2': jnp.ones((1, 4))}
    network = Network(
        lambda key, x: {'params': params},
        lambda v, x, **_: (Outputs(x @ v['params']['w'] @ v['params']['w'] + v['params']['w_2']), {}),
    )
    assert pruning.product_kernels(network, {'params': params}, jnp.ones((2, 4))) == ('w',)


def test_a_network_without_products_is_an_error() -> None:
    network = Network(lambda key, x: {'params': {}}, lambda v, x, **_: (Outputs(x + v['params']['bias'][None]), {}))
    with pytest.raises(ValueError, match='product_kernels: the network multiplies its inputs by no parameter; name the arrays'):
        pruning.product_kernels(network, {'params': {'bias': jnp.ones(4)}}, jnp.ones((2, 4)))
