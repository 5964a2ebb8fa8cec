"""VGG and MobileNetV2: published parameter counts, shapes, the forward pass in numpy, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.model_checks import CIFAR, abstract_variables, filled, number_of_parameters, shapes_of

from kdjax import models, networks, paths
from kdjax.models._layers import convolution

CHANNELS = 64, 128, 256, 512, 512
IMAGENET = (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)


@pytest.mark.parametrize(
    'convolutions, classes, published',
    [((1, 1, 1, 1, 1), 100, 3_965_028), ((2, 2, 2, 2, 2), 100, 9_462_180), ((2, 2, 3, 3, 3), 10, 14_728_266)],
)
def test_vggs_have_the_parameters_of_the_tables(convolutions: tuple[int, ...], classes: int, published: int) -> None:
    stages = tuple(zip(CHANNELS, convolutions, strict=True))
    assert number_of_parameters(models.VGG(stages, hidden=(), classes=classes)) == published


def test_vgg_without_biases_and_with_hidden_layers() -> None:
    """4224 convolution channels lose a bias; a layer of 300 stands between the 512 channels and the classes."""
    wanted = 14_728_266 - 4_224 - (512 * 10 + 10) + (512 * 300 + 300) + (300 * 10 + 10)
    assert number_of_parameters(models.VGG(hidden=(300,), use_bias=False)) == wanted


def test_mobilenet_has_the_parameters_of_the_published_one() -> None:
    """For ImageNet, as torchvision counts them."""
    module = models.MobileNetV2(IMAGENET, stem=32, last=1280, stride=2, classes=1000)
    assert number_of_parameters(module) == 3_504_872


def test_vgg_shapes() -> None:
    module = models.VGG(((4, 1), (6, 2)), hidden=(5,), classes=7)
    assert shapes_of(module, ('stage0', 'stage1', 'stage1/conv0', 'stage1/norm1', 'hidden0')) == {
        'logits': (2, 7),
        'stage0': (2, 16, 16, 4),
        'stage1': (2, 8, 8, 6),
        'stage1/conv0': (2, 16, 16, 6),
        'stage1/norm1': (2, 16, 16, 6),
        'hidden0': (2, 5),
    }


@pytest.mark.parametrize('sides', [(8, 8), (3, 1), (32, 8)])
def test_vgg_pools_sides_down_to_one(sides: tuple[int, int]) -> None:
    shapes = shapes_of(models.VGG(), ('stage4',), jax.ShapeDtypeStruct((2, *sides, 1), jnp.float32))
    assert shapes == {'logits': (2, 10), 'stage4': (2, 1, 1, 512)}


def test_mobilenet_shapes() -> None:
    taps = ('stem', 'stage1', 'stage2', 'stage4', 'stage2/block0/expand', 'stage3/block0/depthwise', 'stage3/block1/depthwise')
    shapes = shapes_of(models.MobileNetV2(), (*taps, 'last'))
    assert shapes == {
        'logits': (2, 10),
        'stem': (2, 32, 32, 16),
        'stage1': (2, 32, 32, 16),
        'stage2': (2, 32, 32, 24),
        'stage4': (2, 8, 8, 64),
        'stage2/block0/expand': (2, 32, 32, 96),
        'stage3/block0/depthwise': (2, 16, 16, 144),
        'stage3/block1/depthwise': (2, 16, 16, 192),
        'last': (2, 8, 8, 256),
    }
    kernels = paths.leaves_with_paths(abstract_variables(models.MobileNetV2())['params'])
    assert kernels['stage3/block0/depthwise/kernel'].shape == (3, 3, 1, 144)
    assert 'stage1/block0/expand/kernel' not in kernels


@pytest.mark.parametrize('stages', [(), ((64,),), ((64, 0),), ((64, 1, 1, 1),)])
def test_stages_that_vgg_cannot_have_are_errors(stages: tuple) -> None:
    with pytest.raises(ValueError, match=r'^VGG: stages must be pairs \(channels, number of convolutions\)'):
        abstract_variables(models.VGG(stages))


@pytest.mark.parametrize('stages', [(), ((6, 16, 1),), ((6, 16, 1, 0),), ((0, 16, 1, 1),)])
def test_stages_that_mobilenet_cannot_have_are_errors(stages: tuple) -> None:
    with pytest.raises(ValueError, match=r'^MobileNetV2: stages must be \(expansion, width, blocks, stride\)'):
        abstract_variables(models.MobileNetV2(stages))


def convolve(x: np.ndarray, layer: dict, stride: int = 1, depthwise: bool = False) -> np.ndarray:
    """A sum over the window of shifted images, padded by half the window on all sides."""
    kernel = layer['kernel']
    size = kernel.shape[0]
    rows, columns = ((side - 1) // stride + 1 for side in x.shape[1:3])
    x = np.pad(x, ((0, 0), (size // 2, size // 2), (size // 2, size // 2), (0, 0)))
    total = 0.0
    for i in range(size):
        for j in range(size):
            part = x[:, i : i + stride * rows : stride, j : j + stride * columns : stride][:, :rows, :columns]
            total = total + (part * kernel[i, j, 0] if depthwise else part @ kernel[i, j])
    return total + layer.get('bias', 0.0)


def normalized(x: np.ndarray, layer: dict, statistics: dict) -> np.ndarray:
    return (x - statistics['mean']) / np.sqrt(statistics['var'] + 1e-5) * layer['scale'] + layer['bias']


def dense(x: np.ndarray, layer: dict) -> np.ndarray:
    return x @ layer['kernel'] + layer['bias']


def in_float64(variables: dict) -> tuple[dict, dict]:
    variables = jax.tree.map(lambda x: np.asarray(x, np.float64), variables)
    return variables['params'], variables['batch_stats']


def test_vgg_is_what_numpy_computes() -> None:
    """On images of 4x2 pixels, of which the second stage leaves 1x1."""
    module = models.VGG(((3, 2), (4, 1)), hidden=(5,), classes=3)
    inputs = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 2, 3)), jnp.float32)
    variables = filled(module, inputs)
    params, statistics = in_float64(variables)
    x = np.asarray(inputs, np.float64)
    for stage, convolutions in (('stage0', 2), ('stage1', 1)):
        for i in range(convolutions):
            x = convolve(x, params[stage][f'conv{i}'])
            x = np.maximum(normalized(x, params[stage][f'norm{i}'], statistics[stage][f'norm{i}']), 0)
        if stage == 'stage0':
            x = x.reshape(2, 2, 2, 1, 2, 3).max((2, 4))
    assert x.shape == (2, 2, 1, 4)
    x = np.maximum(dense(x.max((1, 2)), params['hidden0']), 0)
    logits = jax.jit(module.apply)(variables, inputs)
    np.testing.assert_allclose(logits, dense(x, params['head']), rtol=1e-5, atol=1e-5)


SMALL = models.MobileNetV2(((1, 4, 1, 1), (2, 5, 2, 2), (3, 5, 1, 1)), stem=4, last=6, classes=3)


def test_mobilenet_is_what_numpy_computes() -> None:
    """Its residuals: in the first stage, the second block of the second, and the third, which keeps the second's width."""
    inputs = jnp.asarray(4 * np.random.default_rng(0).standard_normal((2, 5, 6, 3)), jnp.float32)
    variables = filled(SMALL, inputs)
    params, statistics = in_float64(variables)
    clipped = 0

    def relu6(x: np.ndarray) -> np.ndarray:
        nonlocal clipped
        clipped += np.sum(x > 6)
        return np.clip(x, 0, 6)

    def block(x: np.ndarray, path: str, stride: int, residual: bool) -> np.ndarray:
        stage, name = path.split('/')
        layers, means = params[stage][name], statistics[stage][name]
        y = x
        if 'expand' in layers:
            y = relu6(normalized(convolve(y, layers['expand']), layers['expand_norm'], means['expand_norm']))
        y = convolve(y, layers['depthwise'], stride, depthwise=True)
        y = relu6(normalized(y, layers['depthwise_norm'], means['depthwise_norm']))
        y = normalized(convolve(y, layers['project']), layers['project_norm'], means['project_norm'])
        return x + y if residual else y

    x = convolve(np.asarray(inputs, np.float64), params['stem'])
    x = relu6(normalized(x, params['stem_norm'], statistics['stem_norm']))
    x = block(x, 'stage1/block0', 1, residual=True)
    x = block(x, 'stage2/block0', 2, residual=False)
    x = block(x, 'stage2/block1', 1, residual=True)
    x = block(x, 'stage3/block0', 1, residual=True)
    x = relu6(normalized(convolve(x, params['last']), params['last_norm'], statistics['last_norm']))
    assert clipped > 0
    logits = jax.jit(SMALL.apply)(variables, inputs)
    np.testing.assert_allclose(logits, dense(x.mean((1, 2)), params['head']), rtol=1e-5, atol=1e-5)


def test_gradient_reaches_every_channel_of_mobilenet() -> None:
    module = models.MobileNetV2(((2, 4, 1, 1),), stem=4, last=6)
    network = networks.from_linen(module)
    inputs = jnp.asarray(np.random.default_rng(0).standard_normal((6, 4, 4, 3)), jnp.float32)
    variables = filled(module, inputs)

    @jax.jit
    @jax.grad
    def gradient(params: dict) -> jax.Array:
        outputs, _ = network.apply({**variables, 'params': params}, inputs, train=True)
        return jnp.mean(jax.nn.logsumexp(outputs.logits, axis=-1) - outputs.logits[:, 0])

    for path, leaf in paths.leaves_with_paths(gradient(variables['params'])).items():
        assert np.all(np.isfinite(leaf)), path
        assert np.all(np.any(leaf != 0, axis=tuple(range(leaf.ndim - 1)))), path


def test_depthwise_kernels_start_with_the_variance_of_their_window() -> None:
    """2 / 9 for 3x3, as every output has one input channel; a full kernel of 64 channels has 2 / (9 * 64)."""
    image = jnp.ones((1, 3, 3, 64))
    for groups in (64, 1):
        layer = convolution(64, 3, groups=groups, name='layer')
        kernel = layer.init(jax.random.key(0), image)['params']['kernel']
        np.testing.assert_allclose(np.var(kernel), 2 * groups / (9 * 64), rtol=0.2)


def test_light_networks_train_through_from_linen() -> None:
    """The variables that `init` shapes are those that `apply` gives back in training."""
    for module in (models.VGG(), models.MobileNetV2()):
        network = networks.from_linen(module)
        variables = abstract_variables(module)
        _, state = jax.eval_shape(lambda v, x, network=network: network.apply(v, x, train=True), variables, CIFAR)
        assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, {'batch_stats': variables['batch_stats']})
