"""Modules for removed channels: what is left computes what the full network computes with those channels at zero."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict
from helpers.model_checks import abstract_variables, filled, shapes_of

from kdjax import models, networks, paths


class Cut(NamedTuple):
    """Channels to keep: layers and norms that make them, and layers that read them, after flattening perhaps."""

    makers: Sequence[str]
    readers: Sequence[str]
    kept: Sequence[int]


def removed(variables: dict, cuts: Sequence[Cut]) -> dict:
    """Smaller variables."""
    return functools.reduce(lambda v, cut: on_channels(v, cut, take, take), cuts, variables)


def masked(variables: dict, cuts: Sequence[Cut]) -> dict:
    """Variables with zeros in what makes the channels; what reads them stays, since it must not matter."""
    return functools.reduce(lambda v, cut: on_channels(v, cut, mask, lambda leaf, axis, kept: leaf), cuts, variables)


def on_channels(variables: dict, cut: Cut, of_makers: Callable, of_readers: Callable) -> dict:
    """Maps leaves with the axis that holds the channels and the indices kept on it."""
    channels = paths.leaves_with_paths(variables)[f'params/{cut.makers[0]}/kernel'].shape[-1]

    def change(path: str, leaf: jax.Array) -> jax.Array:
        _, *layer, name = path.split('/')
        layer = '/'.join(layer)
        if layer in cut.makers:
            leaf = of_makers(leaf, -1, cut.kept)
        if layer in cut.readers and name == 'kernel':
            leaf = of_readers(leaf, -2, [row for row in range(leaf.shape[-2]) if row % channels in cut.kept])
        return leaf

    return paths.map_with_paths(change, variables)


def take(leaf: jax.Array, axis: int, kept: Sequence[int]) -> jax.Array:
    return jnp.asarray(np.take(np.asarray(leaf), np.array(kept), axis))


def mask(leaf: jax.Array, axis: int, kept: Sequence[int]) -> jax.Array:
    assert axis == -1
    return jnp.asarray(np.where(np.isin(np.arange(leaf.shape[-1]), kept), leaf, 0), leaf.dtype)


def below(prefix: str, *names: str) -> list[str]:
    return [f'{prefix}/{name}' for name in names]


CASES = {
    'mlp': (models.MLP((6, 5)), 'hidden1', [Cut(['hidden0'], ['hidden1'], [0, 4, 5]), Cut(['hidden1'], ['head'], [1, 2])]),
    'cnn': (
        models.CNN((4, 3), (5,)),
        'stage1',
        [
            Cut(['stage0/conv'], ['stage1/conv'], [1, 2, 3]),
            Cut(['stage1/conv'], ['hidden0'], [0, 2]),
            Cut(['hidden0'], ['head'], [3]),
        ],
    ),
    'vgg': (
        models.VGG(((4, 2), (3, 1)), hidden=(5,)),
        'stage1',
        [
            Cut(below('stage0', 'conv0', 'norm0'), ['stage0/conv1'], [0, 3]),
            Cut(below('stage0', 'conv1', 'norm1'), ['stage1/conv0'], [1]),
            Cut(below('stage1', 'conv0', 'norm0'), ['hidden0'], [0, 2]),
            Cut(['hidden0'], ['head'], [0, 1, 4]),
        ],
    ),
    'resnet': (
        models.ResNet(8, widths=(4, 4, 6, 5)),
        'stage3',
        [
            Cut(below('stage1/block0', 'conv1', 'norm1'), ['stage1/block0/conv2'], [0, 2]),
            Cut(below('stage3/block0', 'conv1', 'norm1'), ['stage3/block0/conv2'], [1, 2, 4]),
        ],
    ),
    # An identity shortcut: the stem's channels are those of the first stage. A 1x1 shortcut: both its ends.
    'resnet_streams': (
        models.ResNet(8, widths=(4, 4, 6, 5)),
        'stage3',
        [
            Cut(
                ['stem', 'stem_norm', *below('stage1/block0', 'conv2', 'norm2')],
                ['stage1/block0/conv1', *below('stage2/block0', 'conv1', 'shortcut')],
                [1, 2],
            ),
            Cut(
                below('stage2/block0', 'conv2', 'norm2', 'shortcut', 'shortcut_norm'),
                below('stage3/block0', 'conv1', 'shortcut'),
                [0, 3, 4],
            ),
        ],
    ),
    # The first stage becomes as narrow as the stem, and keeps its shortcut.
    'resnet_shortcut': (
        models.ResNet(8, widths=(4, 6, 6, 5)),
        'stage1',
        [
            Cut(
                below('stage1/block0', 'conv2', 'norm2', 'shortcut', 'shortcut_norm'),
                below('stage2/block0', 'conv1', 'shortcut'),
                [0, 2, 3, 5],
            )
        ],
    ),
    'mobilenet': (
        models.MobileNetV2(((2, 4, 2, 1), (3, 5, 1, 2)), stem=3, last=6),
        'stage2',
        [
            Cut(
                below('stage1/block1', 'expand', 'expand_norm', 'depthwise', 'depthwise_norm'),
                ['stage1/block1/project'],
                [0, 1, 5, 6, 7],
            ),
            Cut(
                below('stage2/block0', 'expand', 'expand_norm', 'depthwise', 'depthwise_norm'),
                ['stage2/block0/project'],
                [0, 3, 11],
            ),
        ],
    ),
    # The second stage becomes as wide as the first is left, and its first block still adds nothing.
    'mobilenet_streams': (
        models.MobileNetV2(((1, 5, 1, 1), (2, 4, 2, 1)), stem=5, last=6),
        'last',
        [
            # Without an expansion the stem's channels go through the depthwise convolution, and into the addition.
            Cut(
                ['stem', 'stem_norm', *below('stage1/block0', 'depthwise', 'depthwise_norm', 'project', 'project_norm')],
                ['stage1/block0/project', 'stage2/block0/expand'],
                [0, 2, 4],
            ),
            Cut(
                [path for i in (0, 1) for path in below(f'stage2/block{i}', 'project', 'project_norm')],
                ['stage2/block1/expand', 'last'],
                [1, 2, 3],
            ),
            Cut(['last', 'last_norm'], ['head'], [0, 4, 5]),
        ],
    ),
    'transformer': (
        models.VisionTransformer(depth=2, width=4, heads=2, patches=2),
        'block1',
        [
            Cut(['block0/expand'], ['block0/reduce'], [0, 3, 4, 9, 15]),
            Cut(['block1/expand'], ['block1/reduce'], [7, 8]),
        ],
    ),
}
INPUTS = jnp.asarray(np.random.default_rng(1).standard_normal((3, 4, 4, 2)), jnp.float32)


@pytest.mark.parametrize('case', CASES)
def test_narrowed_module_is_the_masked_network(case: str) -> None:
    module, feature, cuts = CASES[case]
    variables = filled(module, INPUTS)
    smaller = removed(variables, cuts)
    narrowed = models.narrow(module, smaller, INPUTS)
    layers = {path.removesuffix('/kernel') for path in paths.leaves_with_paths(variables['params'])}
    assert narrowed.narrowed == {maker: len(cut.kept) for cut in cuts for maker in cut.makers if maker in layers}
    assert jax.tree.map(jnp.shape, abstract_variables(narrowed, INPUTS)) == jax.tree.map(jnp.shape, smaller)

    full, small = (networks.from_linen(each, features=feature) for each in (module, narrowed))
    got, wanted, unmasked = jax.jit(
        lambda *each: [network.apply(v, INPUTS)[0] for network, v in zip((small, full, full), each, strict=True)]
    )(smaller, masked(variables, cuts), variables)
    np.testing.assert_allclose(got.logits, wanted.logits, rtol=1e-5, atol=1e-5)
    assert np.max(np.abs(unmasked.logits - wanted.logits)) > 1e-2
    # Masked channels of the feature are zeros, and add nothing to the norm over channels.
    norms = [np.linalg.norm(outputs.features[feature], axis=-1) for outputs in (got, wanted)]
    np.testing.assert_allclose(*norms, rtol=1e-5, atol=1e-5)


def test_narrowed_module_trains_like_the_masked_network() -> None:
    """Logits by the batch's statistics, and the moving averages of the channels that are left."""
    module, _, cuts = CASES['mobilenet_streams']
    variables = filled(module, INPUTS)
    smaller = removed(variables, cuts)
    small, full = (networks.from_linen(each) for each in (models.narrow(module, smaller, INPUTS), module))
    (got, state), (wanted, full_state) = jax.jit(
        lambda *each: [network.apply(v, INPUTS, train=True) for network, v in zip((small, full), each, strict=True)]
    )(smaller, masked(variables, cuts))
    np.testing.assert_allclose(got.logits, wanted.logits, rtol=1e-4, atol=1e-4)
    kept = removed({'params': variables['params'], **full_state}, cuts)['batch_stats']
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), state['batch_stats'], kept)


class Wrapped(nn.Module):
    """A model that is part of another."""

    model: nn.Module

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.model(2 * x)


def test_narrowed_modules_are_values() -> None:
    """Equal and hashable, arguments of jit, cloned and made part of others without losing their widths."""
    module, _, cuts = CASES['resnet_streams']
    variables = filled(module, INPUTS)
    smaller = removed(variables, cuts)
    narrowed, again = (models.narrow(each, smaller, INPUTS) for each in (module, module))
    assert narrowed == again
    assert hash(narrowed) == hash(again)
    assert narrowed != module
    assert models.narrow(narrowed, smaller, INPUTS) == narrowed
    assert models.narrow(narrowed, variables, INPUTS) == module
    assert models.narrow(module, abstract_variables(narrowed, INPUTS), INPUTS) == narrowed
    traced = []

    @functools.partial(jax.jit, static_argnums=0)
    def apply(model: nn.Module, variables: dict) -> jax.Array:
        traced.append(model)
        return model.apply(variables, INPUTS)

    np.testing.assert_array_equal(apply(narrowed, smaller), apply(again, smaller))
    assert traced == [narrowed]
    wrapped = abstract_variables(Wrapped(narrowed), INPUTS)
    assert jax.tree.map(jnp.shape, wrapped['params']['model']) == jax.tree.map(jnp.shape, smaller['params'])


def test_standard_variables_narrow_nothing() -> None:
    for module in (case[0] for case in CASES.values()):
        narrowed = models.narrow(module, abstract_variables(module, INPUTS), INPUTS)
        assert narrowed == module
        assert narrowed.narrowed == FrozenDict()


def test_features_of_a_narrowed_module_have_the_channels_left() -> None:
    narrowed = models.VGG().clone(narrowed=FrozenDict({'stage1/conv1': 100, 'hidden0': 77}))
    shapes = shapes_of(narrowed, ('stage0', 'stage1', 'stage1/conv0', 'hidden0'))
    assert shapes == {
        'logits': (2, 10),
        'stage0': (2, 16, 16, 64),
        'stage1': (2, 8, 8, 100),
        'stage1/conv0': (2, 16, 16, 128),
        'hidden0': (2, 77),
    }
