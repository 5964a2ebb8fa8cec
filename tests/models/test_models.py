"""Models to distil from and into: the parameter counts of the published tables, shapes, features, and gradients."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.model_checks import abstract_variables, filled, number_of_parameters, shapes_of

from kdjax import models, networks, paths

WIDE = (32, 64, 128, 256)


def resnet_formula(depth: int, classes: int, widths: tuple[int, ...] = (16, 16, 32, 64)) -> int:
    """Kernels of 3x3 and norms of two parameters a channel; a 1x1 kernel and a norm where a shortcut changes shape."""
    total, incoming = 27 * widths[0] + 2 * widths[0], widths[0]
    for stage, width in enumerate(widths[1:]):
        for block in range((depth - 2) // 6):
            total += 9 * incoming * width + 9 * width * width + 2 * 2 * width
            if incoming != width or (stage > 0 and block == 0):
                total += incoming * width + 2 * width
            incoming = width
    return total + incoming * classes + classes


@pytest.mark.parametrize(
    'depth, widths, published',
    [
        (8, WIDE, 1_233_540),
        (32, WIDE, 7_433_860),
        (8, (16, 16, 32, 64), 83_892),
        (14, (16, 16, 32, 64), 181_108),
        (20, (16, 16, 32, 64), 278_324),
        (32, (16, 16, 32, 64), 472_756),
        (44, (16, 16, 32, 64), 667_188),
        (56, (16, 16, 32, 64), 861_620),
        (110, (16, 16, 32, 64), 1_736_564),
    ],
)
def test_resnets_have_the_parameters_of_the_tables(depth: int, widths: tuple[int, ...], published: int) -> None:
    assert number_of_parameters(models.ResNet(depth, classes=100, widths=widths)) == published
    assert resnet_formula(depth, 100, widths) == published


@pytest.mark.parametrize(
    'module, count',
    [
        (
            models.CNN((64, 128), (512,), classes=100),
            (27 * 64 + 64) + (9 * 64 * 128 + 128) + (8 * 8 * 128 * 512 + 512) + (512 * 100 + 100),
        ),
        (
            models.CNN((32, 64), (256,), classes=100),
            (27 * 32 + 32) + (9 * 32 * 64 + 64) + (8 * 8 * 64 * 256 + 256) + (256 * 100 + 100),
        ),
        (models.MLP((1200, 1200), classes=100), (3072 * 1200 + 1200) + (1200 * 1200 + 1200) + (1200 * 100 + 100)),
    ],
    ids=['teacher', 'student', 'mlp'],
)
def test_plain_networks_have_the_parameters_of_their_layers(module: nn.Module, count: int) -> None:
    assert number_of_parameters(module) == count


def test_resnet_shapes() -> None:
    taps = ('stage1', 'stage2', 'stage3', 'stage1/block0', 'stage3/block0')
    assert shapes_of(models.ResNet(8, classes=100), taps) == {
        'logits': (2, 100),
        'stage1': (2, 32, 32, 16),
        'stage2': (2, 16, 16, 32),
        'stage3': (2, 8, 8, 64),
        'stage1/block0': (2, 32, 32, 16),
        'stage3/block0': (2, 8, 8, 64),
    }
    assert shapes_of(models.ResNet(8, widths=WIDE), ('stage1', 'stage3')) == {
        'logits': (2, 10),
        'stage1': (2, 32, 32, 64),
        'stage3': (2, 8, 8, 256),
    }


def test_plain_network_shapes() -> None:
    assert shapes_of(models.CNN((4, 6), (5,), classes=7), ('stage0', 'stage1', 'hidden0')) == {
        'logits': (2, 7),
        'stage0': (2, 16, 16, 4),
        'stage1': (2, 8, 8, 6),
        'hidden0': (2, 5),
    }
    assert shapes_of(models.MLP((6, 5)), ('hidden0', 'hidden1')) == {'logits': (2, 10), 'hidden0': (2, 6), 'hidden1': (2, 5)}


def test_shortcuts_are_where_the_shape_changes() -> None:
    shortcuts = {
        path for path in paths.leaves_with_paths(abstract_variables(models.ResNet(14))) if path.endswith('shortcut/kernel')
    }
    assert shortcuts == {'params/stage2/block0/shortcut/kernel', 'params/stage3/block0/shortcut/kernel'}
    wide = paths.leaves_with_paths(abstract_variables(models.ResNet(8, widths=WIDE)))
    assert 'params/stage1/block0/shortcut/kernel' in wide


@pytest.mark.parametrize('depth', [2, 7, 9, 18, 49, 0, -4])
def test_depths_that_are_not_6n_plus_2_are_errors(depth: int) -> None:
    with pytest.raises(ValueError, match=f'depth must be 6n \\+ 2 with n >= 1 .*got {depth}'):
        abstract_variables(models.ResNet(depth))


def test_wrong_number_of_widths_is_an_error() -> None:
    with pytest.raises(ValueError, match=r'widths must be those of the stem and three stages, got \(16, 32\)'):
        abstract_variables(models.ResNet(8, widths=(16, 32)))


@functools.cache
def one_training_pass() -> tuple[dict, jax.Array, dict, networks.Outputs, jax.Array]:
    """Of a narrow ResNet 8: its parameters, and loss, gradient and outputs there, and the loss one small step further."""
    module = models.ResNet(8, widths=(4, 4, 6, 8))
    network = networks.from_linen(module, features=('stage3',))
    inputs = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
    labels = jnp.array([0, 3, 3, 9])
    variables = filled(module, inputs)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params: dict) -> tuple[jax.Array, networks.Outputs]:
        outputs, _ = network.apply({**variables, 'params': params}, inputs, train=True)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(outputs.logits), labels[:, None], axis=1)), outputs

    (before, outputs), gradient = loss(variables['params'])
    (after, _), _ = loss(jax.tree.map(lambda p, g: p - 0.001 * g, variables['params'], gradient))
    return variables['params'], before, gradient, outputs, after


def test_gradient_reaches_every_parameter_and_a_step_along_it_lowers_the_loss() -> None:
    _, before, gradient, _, after = one_training_pass()
    for path, leaf in paths.leaves_with_paths(gradient).items():
        assert np.all(np.isfinite(leaf)), path
        # Single entries may be zero; a whole channel without a gradient would be a path that is cut.
        assert np.all(np.any(leaf != 0, axis=tuple(range(leaf.ndim - 1)))), path
    assert after < before


def test_feature_of_the_last_stage_is_what_the_head_reads() -> None:
    """It is taken after the last ReLU, so that its mean through the head gives the logits."""
    params, _, _, outputs, _ = one_training_pass()
    features = np.asarray(outputs.features['stage3'], np.float64)
    assert features.min() == 0
    wanted = features.mean((1, 2)) @ np.asarray(params['head']['kernel']) + np.asarray(params['head']['bias'])
    np.testing.assert_allclose(outputs.logits, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('module', [models.CNN((2,), (40,), dropout=0.5), models.MLP((40,), dropout=0.5)], ids=['cnn', 'mlp'])
def test_dropout_is_off_in_evaluation_and_drawn_from_rng_in_training(module: nn.Module, key: jax.Array) -> None:
    network = networks.from_linen(module)
    inputs = jax.random.normal(key, (2, 4, 4, 3))
    variables = filled(module, inputs)
    plain = networks.from_linen(module.clone(dropout=0.0))
    rngs = jax.random.split(key)
    calls = [
        (network, True, rngs[0]),
        (network, True, rngs[0]),
        (network, True, rngs[1]),
        (network, False, None),
        (plain, True, None),
    ]
    one, again, other, evaluated, wanted = jax.jit(
        lambda: [net.apply(variables, inputs, train=train, rng=rng)[0].logits for net, train, rng in calls]
    )()
    np.testing.assert_array_equal(again, one)
    assert np.all(np.any(one != other, axis=1))
    np.testing.assert_allclose(evaluated, wanted, rtol=1e-6)


def transformer(width: int = 8, heads: int = 2) -> models.VisionTransformer:
    return models.VisionTransformer(depth=2, width=width, heads=heads, patches=2, classes=5)


@pytest.mark.parametrize('depth, width, patches, classes', [(2, 32, 4, 10), (3, 24, 8, 100)])
def test_transformers_have_the_parameters_of_their_layers(depth: int, width: int, patches: int, classes: int) -> None:
    """Which do not depend on the number of heads."""
    norm = 2 * width
    block = 2 * norm + 4 * (width * width + width) + (width * 4 * width + 4 * width) + (4 * width * width + width)
    embed = (32 // patches) ** 2 * 3 * width + width + patches**2 * width
    for heads in (2, 4):
        module = models.VisionTransformer(depth, width, heads, patches, classes)
        assert number_of_parameters(module) == embed + depth * block + norm + width * classes + classes


def test_transformer_shapes() -> None:
    module = models.VisionTransformer(depth=2, width=32, heads=4)
    taps = ('embed', 'block0', 'block1', 'block1/attention', 'block1/attention/scores', 'block0/attention/values')
    assert shapes_of(module, taps) == {
        'logits': (2, 10),
        'embed': (2, 4, 4, 32),
        'block0': (2, 16, 32),
        'block1': (2, 16, 32),
        'block1/attention': (2, 16, 32),
        'block1/attention/scores': (2, 4, 16, 16),
        'block0/attention/values': (2, 4, 16, 8),
    }


@functools.cache
def transformer_pass() -> tuple[dict, Callable, jax.Array]:
    """Variables of a small transformer, its jitted apply, and two images, the second with the patches of the first moved."""
    network = networks.from_linen(
        transformer(),
        features=('block1', 'block1/norm1', 'block1/attention', 'block1/attention/scores', 'block1/attention/values'),
    )
    image = np.random.default_rng(0).standard_normal((4, 6, 3)).astype(np.float32)
    patches = image.reshape(2, 2, 2, 3, 3).swapaxes(1, 2).reshape(4, 2, 3, 3)
    moved = patches[[2, 0, 3, 1]].reshape(2, 2, 2, 3, 3).swapaxes(1, 2).reshape(4, 6, 3)
    inputs = jnp.stack([image, moved])
    variables = jax.tree.map(lambda x: 0.3 * x, filled(transformer(), inputs))
    return variables, jax.jit(network.apply), inputs


def test_tapped_scores_and_values_are_those_of_the_block_s_attention() -> None:
    """By hand in float64, from the tokens that enter it to those that leave it."""
    variables, apply, inputs = transformer_pass()
    outputs, _ = apply(variables, inputs)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), variables['params'])
    taps = {path: np.asarray(value, np.float64) for path, value in outputs.features.items()}
    layers, tokens = params['block1']['attention'], taps['block1/norm1']
    query, key, value = (
        np.einsum('btw,whd->bhtd', tokens, layers[name]['kernel']) + layers[name]['bias'][:, None]
        for name in ('query', 'key', 'value')
    )
    scores = np.einsum('bhqd,bhkd->bhqk', query, key) / np.sqrt(4)
    np.testing.assert_allclose(taps['block1/attention/scores'], scores, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(taps['block1/attention/values'], value, rtol=1e-5, atol=1e-5)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    out = np.einsum('bhqk,bhkd,hdw->bqw', weights, value, layers['out']['kernel']) + layers['out']['bias']
    np.testing.assert_allclose(taps['block1/attention'], out, rtol=1e-5, atol=1e-5)


def test_the_head_reads_the_mean_of_the_normalised_tokens() -> None:
    variables, apply, inputs = transformer_pass()
    outputs, _ = apply(variables, inputs)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), variables['params'])
    tokens = np.asarray(outputs.features['block1'], np.float64)
    normal = (tokens - tokens.mean(-1, keepdims=True)) / np.sqrt(tokens.var(-1, keepdims=True) + 1e-6)
    mean = (normal * params['norm']['scale'] + params['norm']['bias']).mean(1)
    wanted = mean @ params['head']['kernel'] + params['head']['bias']
    np.testing.assert_allclose(outputs.logits, wanted, rtol=1e-5, atol=1e-5)


def test_without_positions_the_order_of_the_patches_does_not_matter() -> None:
    variables, apply, inputs = transformer_pass()
    nowhere = {'params': {**variables['params'], 'positions': jnp.zeros_like(variables['params']['positions'])}}
    one, other = apply(nowhere, inputs)[0].logits
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    one, other = apply(variables, inputs)[0].logits
    assert not np.allclose(one, other, atol=1e-3)


@pytest.mark.parametrize('module', [models.VisionTransformer(1, 8, 2, patches=5), models.VisionTransformer(1, 8, 3)])
def test_patches_and_heads_that_do_not_divide_are_errors(module: nn.Module) -> None:
    with pytest.raises(ValueError, match=r'^VisionTransformer: . patches a side must divide the image \(32, 32\), and . heads'):
        abstract_variables(module)
