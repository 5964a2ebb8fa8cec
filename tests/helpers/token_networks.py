"""Networks whose inputs are several arrays: a scanned encoder of tokens, and functions of pairs and dictionaries of floats."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kdjax import networks
from kdjax.networks import Network, Outputs

RNG = np.random.default_rng(0)


class _Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        x = x + nn.MultiHeadDotProductAttention(2, name='attention')(nn.LayerNorm(name='norm')(x))
        return nn.Dense(8, name='down')(nn.relu(nn.Dense(6, name='up')(x))), None


class TokenNetwork(nn.Module):
    """Embeds ids and types [batch, length], has two blocks of attention and dense layers in a scan, and classifies tokens."""

    @nn.compact
    def __call__(self, inputs: dict[str, jax.Array]) -> jax.Array:
        x = nn.Embed(11, 8, name='tokens')(inputs['ids']) + nn.Embed(2, 8, name='types')(inputs['types'])
        x = x + self.param('positions', nn.initializers.normal(0.1), (1, x.shape[1], 8))
        blocks = nn.scan(_Block, variable_axes={'params': 0}, split_rngs={'params': True}, length=2)
        x, _ = blocks(name='blocks')(x, None)
        return nn.Dense(3, name='head')(x)


class Gated(nn.Module):
    """Two dense layers, with a gate for every example between them."""

    @nn.compact
    def __call__(self, inputs: dict[str, jax.Array]) -> jax.Array:
        return nn.Dense(3, name='head')(nn.relu(nn.Dense(7, name='hidden')(inputs['x'])) * inputs['gate'])


def _sum(params: Any, inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
    first, second = inputs
    return nn.relu(first @ params['first'] + second @ params['second']) @ params['head']


SHAPES = {'first': (3, 4), 'second': (2, 4), 'head': (4, 3)}
PARAMS = {name: jnp.asarray(RNG.standard_normal(shape), jnp.float32) for name, shape in SHAPES.items()}


class Case(NamedTuple):
    """A network, inputs for it, a function that makes such inputs of one array `packed`, and the width of its hidden layer."""

    network: Network
    inputs: Any
    packed: np.ndarray
    unpack: Any
    hidden: int


_TOKENS = np.stack([RNG.integers(0, 11, (4, 6)), RNG.integers(0, 2, (4, 6))], axis=-1).astype(np.int32)
_FLOATS = RNG.standard_normal((4, 5)).astype(np.float32)


def _case(network: Network, packed: np.ndarray, unpack: Any, hidden: int) -> Case:
    return Case(network, unpack(packed), packed, unpack, hidden)


CASES = {
    'tokens': _case(networks.from_linen(TokenNetwork()), _TOKENS, lambda x: {'ids': x[..., 0], 'types': x[..., 1]}, 6),
    'floats': _case(networks.from_linen(Gated()), _FLOATS, lambda x: {'x': x[:, :4], 'gate': x[:, 4:]}, 7),
    'a pair': _case(
        Network(lambda key, inputs: {'params': PARAMS}, lambda v, inputs, **_: (Outputs(_sum(v['params'], inputs)), {})),
        _FLOATS,
        lambda x: (x[:, :3], x[:, 3:]),
        4,
    ),
}
