"""ResNet18, wide ResNets, ShuffleNets and SqueezeNets: published parameter counts, shapes, parts in numpy, gradients."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.model_checks import CIFAR, abstract_variables, filled, number_of_parameters, shapes_of

from kdjax import models, networks, paths
from kdjax.models._shufflenet import shuffle_channels

IMAGENET = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
FIRST = ((16, 64), (16, 64), (32, 128)), ((32, 128), (48, 192), (48, 192), (64, 256)), ((64, 256),)
AUTHORS = (240, 4, 60), (480, 8, 120), (960, 4, 240)
POOLED = models.Stem(24, stride=2, pooling=2)


def test_counts_of_the_residual_tables() -> None:
    """ImageNet's as torchvision counts it, the wide ones as the tables of CRD do, WRN-28-10 by hand below."""
    assert number_of_parameters(models.ResNet18()) == 11_173_962
    assert number_of_parameters(models.ResNet18(100)) == 11_220_132
    assert number_of_parameters(models.ResNet18(1000, models.Stem(64, window=7, stride=2, pooling=2))) == 11_689_512
    published = {(16, 1): 180_916, (16, 2): 703_284, (40, 1): 569_780, (40, 2): 2_255_156, (28, 10): 36_536_884}
    for (depth, widening), count in published.items():
        assert number_of_parameters(models.WideResNet(depth, widening, 100)) == count
        widths = 16, 16 * widening, 32 * widening, 64 * widening
        by_hand = 27 * 16 + 2 * widths[3] + widths[3] * 100 + 100
        for incoming, width in itertools.pairwise(widths):
            by_hand += 2 * incoming + 9 * incoming * width + 2 * width + 9 * width * width
            by_hand += incoming * width if incoming != width or width != widths[1] else 0
            by_hand += ((depth - 4) // 6 - 1) * (4 * width + 2 * 9 * width * width)
        assert by_hand == count


def test_counts_of_the_light_tables() -> None:
    """ImageNet's as torchvision and, for the first ShuffleNet, pytorchcv count them; CIFAR's as the tables of CRD do."""
    assert number_of_parameters(models.ShuffleNet(100)) == 949_258
    assert number_of_parameters(models.ShuffleNet(1000, AUTHORS, stem=POOLED)) == 1_865_728
    eight = (384, 4, 96), (768, 8, 192), (1536, 4, 384)
    assert number_of_parameters(models.ShuffleNet(1000, eight, 8, POOLED)) == 2_434_768
    assert number_of_parameters(models.ShuffleNetV2(100)) == 1_355_528
    assert number_of_parameters(models.ShuffleNetV2(1000, stem=POOLED)) == 2_278_604
    half = (48, 4), (96, 8), (192, 4)
    assert number_of_parameters(models.ShuffleNetV2(1000, half, POOLED)) == 1_366_792
    assert number_of_parameters(models.SqueezeNet(1000, stride=2, pooling=2)) == 1_235_496
    assert number_of_parameters(models.SqueezeNet(1000, FIRST, 96, 7, 2, 2)) == 1_248_424


@pytest.mark.parametrize('convolutions, published', [((1, 1, 2, 2, 2), 9_277_284), ((2, 2, 3, 3, 3), 14_774_436)])
def test_counts_of_deeper_vggs(convolutions: tuple[int, ...], published: int) -> None:
    stages = tuple(zip((64, 128, 256, 512, 512), convolutions, strict=True))
    assert number_of_parameters(models.VGG(stages, hidden=(), classes=100)) == published


def test_count_of_the_halved_mobilenet_of_the_tables() -> None:
    """Whose first block expands 16 channels to 16 by a convolution and a norm, which the paper's network leaves out."""
    stages = (1, 8, 1, 1), (6, 12, 2, 1), (6, 16, 3, 2), (6, 32, 4, 2), (6, 48, 3, 1), (6, 80, 3, 2), (6, 160, 1, 1)
    module = models.MobileNetV2(stages, stem=16, last=1280, stride=2, classes=100)
    assert number_of_parameters(module) == 812_836 - (16 * 16 + 2 * 16)


def test_shapes_for_small_images() -> None:
    taps = 'stage1', 'stage2', 'stage3'
    assert shapes_of(models.ResNet18(100), (*taps, 'stage4', 'stage4/block0')) == {
        'logits': (2, 100),
        'stage1': (2, 32, 32, 64),
        'stage2': (2, 16, 16, 128),
        'stage3': (2, 8, 8, 256),
        'stage4': (2, 4, 4, 512),
        'stage4/block0': (2, 4, 4, 512),
    }
    wide = {'logits': (2, 10), 'stage1': (2, 32, 32, 32), 'stage2': (2, 16, 16, 64), 'stage3': (2, 8, 8, 128)}
    assert shapes_of(models.WideResNet(16, 2), taps) == wide
    shuffled = {'logits': (2, 10), 'stage1': (2, 16, 16, 240), 'stage2': (2, 8, 8, 480), 'stage3': (2, 4, 4, 960)}
    assert shapes_of(models.ShuffleNet(), taps) == shuffled
    split = {'logits': (2, 10), 'stage1': (2, 16, 16, 116), 'stage2': (2, 8, 8, 232), 'stage3': (2, 4, 4, 464)}
    assert shapes_of(models.ShuffleNetV2(), taps) == split
    fired = {'logits': (2, 10), 'stage1': (2, 32, 32, 128), 'stage2': (2, 16, 16, 256), 'stage3': (2, 8, 8, 512)}
    assert shapes_of(models.SqueezeNet(), taps) == fired


def test_shapes_for_imagenet() -> None:
    pooled = models.Stem(64, window=7, stride=2, pooling=2)
    shapes = shapes_of(models.ResNet18(1000, pooled), ('stage1', 'stage4'), IMAGENET)
    assert shapes == {'logits': (2, 1000), 'stage1': (2, 56, 56, 64), 'stage4': (2, 7, 7, 512)}
    shapes = shapes_of(models.ShuffleNet(1000, AUTHORS, stem=POOLED), ('stage1', 'stage3'), IMAGENET)
    assert shapes == {'logits': (2, 1000), 'stage1': (2, 28, 28, 240), 'stage3': (2, 7, 7, 960)}
    shapes = shapes_of(models.SqueezeNet(1000, stride=2, pooling=2), ('stage1', 'stage3'), IMAGENET)
    assert shapes == {'logits': (2, 1000), 'stage1': (2, 56, 56, 128), 'stage3': (2, 14, 14, 512)}


def test_channels_are_dealt_out_over_the_groups() -> None:
    """As a matrix of groups by channels read down its columns; dealing over the other number undoes it."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 12)), jnp.float32)
    mixed = shuffle_channels(x, 3)
    for group in range(3):
        for channel in range(4):
            np.testing.assert_array_equal(mixed[..., 3 * channel + group], x[..., 4 * group + channel])
    np.testing.assert_array_equal(shuffle_channels(mixed, 4), x)


SMALL = {
    'resnet18': (models.ResNet18(3, models.Stem(4, window=5, stride=2, pooling=2)), (3, 16, 16, 3)),
    'wide': (models.WideResNet(10, 1, 3), (3, 8, 8, 3)),
    'shuffle': (models.ShuffleNet(3, ((24, 2, 4), (48, 1, 8)), 2, models.Stem(8)), (6, 8, 8, 3)),
    'split': (models.ShuffleNetV2(3, ((8, 2), (12, 2)), models.Stem(6), last=10), (6, 8, 8, 3)),
    'squeeze': (models.SqueezeNet(3, (((3, 4),), ((4, 5), (3, 4))), stem=6), (3, 8, 8, 3)),
}


@pytest.mark.parametrize('name', ['wide', 'shuffle', 'split', 'squeeze'])
def test_gradient_reaches_every_channel(name: str) -> None:
    module, shape = SMALL[name]
    network = networks.from_linen(module)
    inputs = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    variables = filled(module, inputs)
    if name == 'squeeze':
        # Nothing but positive numbers, so that no ReLU is shut for want of a norm, and small ones, so that logits stay near.
        inputs, variables = jax.tree.map(lambda x: 0.2 * jnp.abs(x), (inputs, variables))

    @jax.jit
    @jax.grad
    def gradient(params: dict) -> jax.Array:
        outputs, _ = network.apply({**variables, 'params': params}, inputs, train=True)
        return jnp.mean(jax.nn.logsumexp(outputs.logits, axis=-1) - outputs.logits[:, 0])

    for path, leaf in paths.leaves_with_paths(gradient(variables['params'])).items():
        assert np.all(np.isfinite(leaf)), path
        # What this one adds the next norm takes away again, as no ReLU stands between them.
        if not path.endswith('depthwise_norm/bias'):
            assert np.all(np.any(leaf != 0, axis=tuple(range(leaf.ndim - 1)))), path


@pytest.mark.parametrize('name', SMALL)
def test_training_gives_back_the_variables_that_init_shapes(name: str) -> None:
    module, shape = SMALL[name]
    network = networks.from_linen(module)
    inputs = jax.ShapeDtypeStruct(shape, jnp.float32)
    variables = abstract_variables(module, inputs)
    _, state = jax.eval_shape(lambda v, x: network.apply(v, x, train=True), variables, inputs)
    assert jax.tree.map(jnp.shape, state) == {k: jax.tree.map(jnp.shape, v) for k, v in variables.items() if k != 'params'}


def test_wide_blocks_add_what_numpy_adds() -> None:
    """A block whose convolutions are zero hands its input on, and one that changes shape a projection of its first ReLU."""
    module, shape = SMALL['wide']
    network = networks.from_linen(module, features=('stem', 'stage1', 'stage2'))
    inputs = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    variables = filled(module, inputs)
    for stage in ('stage1', 'stage2'):
        layer = variables['params'][stage]['block0']['conv2']
        layer['kernel'] = jnp.zeros_like(layer['kernel'])
    outputs, _ = jax.jit(network.apply)(variables, inputs)
    taps = {path: np.asarray(value, np.float64) for path, value in outputs.features.items()}
    np.testing.assert_array_equal(taps['stage1'], taps['stem'])
    exact = jax.tree.map(lambda x: np.asarray(x, np.float64), variables)
    norm, means = exact['params']['stage2']['block0']['norm1'], exact['batch_stats']['stage2']['block0']['norm1']
    activated = (taps['stage1'] - means['mean']) / np.sqrt(means['var'] + 1e-5) * norm['scale'] + norm['bias']
    kernel = exact['params']['stage2']['block0']['shortcut']['kernel'][0, 0]
    np.testing.assert_allclose(taps['stage2'], np.maximum(activated, 0)[:, ::2, ::2] @ kernel, rtol=1e-5, atol=1e-5)


def test_the_first_unit_of_a_shuffled_stage_appends_to_its_pooled_input() -> None:
    """The mean of 3x3 positions, of which those outside count as zeros, behind what the unit computes."""
    module, shape = SMALL['shuffle']
    network = networks.from_linen(module, features=('stage1', 'stage2', 'stage2/unit0'))
    inputs = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    outputs, _ = jax.jit(network.apply)(filled(module, inputs), inputs)
    taps = {path: np.asarray(value, np.float64) for path, value in outputs.features.items()}
    padded = np.pad(taps['stage1'], ((0, 0), (1, 1), (1, 1), (0, 0)))
    pooled = sum(padded[:, i : i + 3 : 2, j : j + 3 : 2] for i in range(3) for j in range(3)) / 9
    assert taps['stage2/unit0'].min() < 0
    np.testing.assert_array_equal(taps['stage2'][..., :24], np.maximum(taps['stage2/unit0'], 0))
    np.testing.assert_allclose(taps['stage2'][..., 24:], pooled, rtol=1e-5, atol=1e-6)


def test_split_units_leave_half_of_their_channels_alone() -> None:
    """After the shuffle the untouched channels are every other one."""
    module, shape = SMALL['split']
    network = networks.from_linen(module, features=('stage1', 'stage1/unit0', 'stage1/unit1', 'stage1/shortcut'))
    inputs = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    outputs, _ = jax.jit(network.apply)(filled(module, inputs), inputs)
    taps = outputs.features
    first = shuffle_channels(jnp.concatenate([taps['stage1/shortcut'], taps['stage1/unit0']], axis=-1), 2)
    np.testing.assert_array_equal(taps['stage1'][..., ::2], first[..., :4])
    np.testing.assert_array_equal(taps['stage1'][..., 1::2], taps['stage1/unit1'])


@pytest.mark.parametrize('name', ['resnet18', 'wide', 'squeeze'])
def test_fewer_channels_make_a_narrower_module(name: str) -> None:
    module, shape = SMALL[name]
    path = {'resnet18': 'stage2/block1/conv1', 'wide': 'stage2/block0/conv1', 'squeeze': 'stage2/fire0/squeeze'}[name]
    inputs = jax.ShapeDtypeStruct(shape, jnp.float32)
    narrow = models.narrow(module, abstract_variables(module.clone(narrowed={path: 2}), inputs), inputs)
    assert dict(narrow.narrowed) == {path: 2}
    kernels = paths.leaves_with_paths(abstract_variables(narrow, inputs)['params'])
    assert kernels[f'{path}/kernel'].shape[-1] == 2


@pytest.mark.parametrize(
    'module, message',
    [
        (models.WideResNet(15), r'WideResNet: depth must be 6n \+ 4 .*got 15 and 1'),
        (models.WideResNet(16, 0), 'WideResNet: .*got 16 and 0'),
        (models.ShuffleNet(stages=()), 'ShuffleNet: stages must be'),
        (models.ShuffleNet(groups=7), 'ShuffleNet: 7 groups must divide the 240 channels of a stage'),
        (models.ShuffleNetV2(stages=((7, 2),)), 'ShuffleNetV2: stages must be .an even number of channels'),
        (models.SqueezeNet(stages=((), ((1, 2),))), 'SqueezeNet: a stage must be'),
        (models.ResNet18(stem=models.Stem(8, window=2)), 'the stem must have positive numbers and an odd window'),
    ],
)
def test_networks_that_cannot_be_are_errors(module: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        abstract_variables(module, CIFAR)
