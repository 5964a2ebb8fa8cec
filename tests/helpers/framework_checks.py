"""One network in Linen and in NNX, by hand in numpy, and comparisons of trees."""

import functools
import itertools
from collections.abc import Callable

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx

from kdjax import networks
from kdjax.networks import Network

CHANNELS = (3, 3, 3)
CLASSES = 5
SHAPE = (4, 4, 4, 3)
# Both blocks have the same shapes, which saves compiling; values tell them apart.
SHAPES = {
    'params/head/kernel': (3, 5),
    'params/head/bias': (5,),
}
for block in '01':
    SHAPES |= {
        f'params/blocks/{block}/conv/kernel': (3, 3, 3, 3),
        f'params/blocks/{block}/conv/bias': (3,),
        f'params/blocks/{block}/norm/scale': (3,),
        f'params/blocks/{block}/norm/bias': (3,),
        f'batch_stats/blocks/{block}/norm/mean': (3,),
        f'batch_stats/blocks/{block}/norm/var': (3,),
    }


class LinenBlock(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Conv(self.width, (3, 3), name='conv')(x)
        return nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name='norm')(x))


class LinenBlocks(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for i, width in enumerate(CHANNELS[1:]):
            x = LinenBlock(width, name=str(i))(x, train)
        return x


class LinenPool(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x.mean((1, 2))


class LinenNet(nn.Module):
    dropout: float = 0.5

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = LinenPool(name='pool')(LinenBlocks(name='blocks')(x, train))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(CLASSES, name='head')(x)


class NnxBlock(nnx.Module):
    def __init__(self, incoming: int, width: int, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(incoming, width, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.relu(self.norm(self.conv(x)))


class NnxPool(nnx.Module):
    def __call__(self, x: jax.Array) -> jax.Array:
        return x.mean((1, 2))


class NnxNet(nnx.Module):
    def __init__(self, dropout: float = 0.5, *, rngs: nnx.Rngs):
        self.blocks = nnx.List([NnxBlock(*widths, rngs=rngs) for widths in itertools.pairwise(CHANNELS)])
        self.pool = NnxPool()
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.head = nnx.Linear(CHANNELS[-1], CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        return self.head(self.dropout(self.pool(x)))


def linen_net(features: str | tuple[str, ...] = (), dropout: float = 0.5) -> Network:
    return networks.from_linen(LinenNet(dropout), features=features)


def nnx_net(features: str | tuple[str, ...] = (), dropout: float = 0.5) -> Network:
    return networks.from_nnx(functools.partial(NnxNet, dropout), features=features)


both = pytest.mark.parametrize('make', [pytest.param(linen_net, id='linen'), pytest.param(nnx_net, id='nnx')])
Make = Callable[..., Network]


@functools.cache
def inputs() -> jax.Array:
    return jax.random.normal(jax.random.key(17), SHAPE)


@functools.cache
def trained(make: Make) -> dict:
    """Variables in which no bias and no statistic is what it starts as, so that none can be mixed up unnoticed."""
    variables = make().init(jax.random.key(5), inputs())
    leaves, structure = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(6), len(leaves))
    return structure.unflatten(
        [leaf + jax.random.uniform(key, leaf.shape, leaf.dtype, -0.4, 0.4) for key, leaf in zip(keys, leaves, strict=True)]
    )


def copied(tree: dict) -> dict:
    return jax.tree.map(np.array, tree)


def assert_bitwise_equal(got: object, wanted: object) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def assert_close(got: object, wanted: object, tolerance: float = 1e-5) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, wanted)


def assert_only_dictionaries_of_arrays(tree: object, kind: type = jax.Array) -> None:
    if isinstance(tree, dict):
        for name, node in tree.items():
            assert type(name) is str
            assert_only_dictionaries_of_arrays(node, kind)
    else:
        assert isinstance(tree, kind)


def convolution_by_hand(x: np.ndarray, params: dict) -> np.ndarray:
    kernel, bias = (np.asarray(params['conv'][name], np.float64) for name in ('kernel', 'bias'))
    height, width = x.shape[1:3]
    padded = np.pad(np.asarray(x, np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [(i, j, padded[:, i : i + height, j : j + width]) for i in range(3) for j in range(3)]
    return sum(patch @ kernel[i, j] for i, j, patch in shifted) + bias


def block_by_hand(x: np.ndarray, params: dict, stats: dict) -> np.ndarray:
    y = convolution_by_hand(x, params)
    mean, var = (np.asarray(stats['norm'][name], np.float64) for name in ('mean', 'var'))
    scale, bias = (np.asarray(params['norm'][name], np.float64) for name in ('scale', 'bias'))
    return np.maximum((y - mean) / np.sqrt(var + 1e-5) * scale + bias, 0)
