"""Models to distil from and into: the parameter counts of the published tables, shapes, features, and gradients."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import models, networks, paths

CIFAR = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
WIDE = (32, 64, 128, 256)


def abstract_variables(module: nn.Module) -> dict:
    return jax.eval_shape(lambda key: networks.from_linen(module).init(key, CIFAR), jax.random.key(0))


def number_of_parameters(module: nn.Module) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_variables(module)['params']))


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


def shapes_of(module: nn.Module, features: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Of the logits and the features, for two CIFAR images."""
    network = networks.from_linen(module, features=features)
    outputs, _ = jax.eval_shape(network.apply, abstract_variables(module), CIFAR)
    return {'logits': outputs.logits.shape} | {path: value.shape for path, value in outputs.features.items()}


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


def filled(module: nn.Module, inputs: jax.Array) -> dict:
    """Variables as `init` shapes them, drawn by numpy, which compiles nothing: kernels of both signs, vectors positive."""
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        sign = np.where(rng.random(leaf.shape) < 0.5, -1, 1) if len(leaf.shape) > 1 else 1
        return jnp.asarray(sign * rng.uniform(0.5, 1.0, leaf.shape), leaf.dtype)

    return jax.tree.map(draw, jax.eval_shape(networks.from_linen(module).init, jax.random.key(0), inputs))


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
