"""Networks by the names that distillation tables use, for command lines."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax

from kdjax import models, networks

_X4 = (32, 64, 128, 256)


class Architecture(NamedTuple):
    """How to make a module, and the paths of its stages, from input to output.

    Attributes:
      make: the module for a number of classes.
      stages: paths of what recipes compare.
      norms: paths of the batch norms whose outputs enter the stages' last ReLUs, if there are any.
      taps: further features.
      preacts: whether its stages end in a ReLU that they can be tapped before.
    """

    make: Callable[[int], nn.Module]
    stages: tuple[str, ...]
    norms: tuple[str, ...] = ()
    taps: tuple[str, ...] = ()
    preacts: bool = True


def network(architecture: Architecture, classes: int, *, recipe: str | None = None) -> networks.Network:
    """Makes the network, with all that a recipe may ask of it among its features."""
    gradients = architecture.stages[-1:] if recipe == 'loss_gradient_attention' else ()
    preacts = tuple(f'{stage}/preact' for stage in architecture.stages) if architecture.preacts else ()
    features = (*architecture.stages, 'pooled', *preacts, *architecture.norms, *architecture.taps)
    made = networks.from_linen(architecture.make(classes), features=features, class_gradients=gradients)
    made = networks.tap_parameters(made, tuple(f'{norm}/{name}' for norm in architecture.norms for name in ('scale', 'bias')))
    return networks.tap_jacobian(made) if recipe == 'jacobian' else made


def cnn(channels: tuple[int, ...], hidden: tuple[int, ...]) -> Architecture:
    """A `models.CNN`."""
    stages = tuple(f'stage{i}' for i in range(len(channels)))
    return Architecture(lambda classes: models.CNN(channels, hidden, classes), stages)


def resnet(
    depth: int, widths: tuple[int, ...] = (16, 16, 32, 64), convolution: models.Convolution = jax.lax.conv_general_dilated
) -> Architecture:
    """A `models.ResNet`."""
    stages = ('stage1', 'stage2', 'stage3')
    norms = tuple(f'{stage}/block{(depth - 2) // 6 - 1}/norm2' for stage in stages)
    return Architecture(lambda classes: models.ResNet(depth, classes, widths, convolution), stages, norms)


def mlp(*hidden: int) -> Architecture:
    """A `models.MLP`."""
    return Architecture(
        lambda classes: models.MLP(hidden, classes), tuple(f'hidden{i}' for i in range(len(hidden))), preacts=False
    )


def transformer(depth: int, width: int, heads: int) -> Architecture:
    """A `models.VisionTransformer` of 4 x 4 patches, whose stages are its blocks."""
    stages = tuple(f'block{i}' for i in range(depth))
    taps = tuple(f'{stage}/attention/{name}' for stage in stages for name in ('scores', 'values'))
    make = lambda classes: models.VisionTransformer(depth, width, heads, classes=classes)  # noqa: E731
    return Architecture(make, stages, taps=taps, preacts=False)


def staged(make: Callable[[int], nn.Module], stages: int, *, first: int = 1) -> Architecture:
    """Any other module whose stages are numbered."""
    return Architecture(make, tuple(f'stage{first + i}' for i in range(stages)))


def _vgg(*convolutions: int) -> Architecture:
    stages = tuple(zip((64, 128, 256, 512, 512), convolutions, strict=True))
    return staged(lambda classes: models.VGG(stages, hidden=(), classes=classes), 5, first=0)


ARCHITECTURES = {
    'cnn_64_128': cnn((64, 128), (512,)),
    'cnn_32_64': cnn((32, 64), (256,)),
    'cnn_8_16': cnn((8, 16), (32,)),
    'mlp_1200_1200': mlp(1200, 1200),
    'mlp_800_800': mlp(800, 800),
    'mlp_30': mlp(30),
    **{f'resnet{depth}': resnet(depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
    'resnet8x4': resnet(8, _X4),
    'resnet32x4': resnet(32, _X4),
    'resnet18': staged(lambda classes: models.ResNet18(classes), 4),
    'wrn_16_2': staged(lambda classes: models.WideResNet(16, 2, classes), 3),
    'wrn_40_1': staged(lambda classes: models.WideResNet(40, 1, classes), 3),
    'wrn_40_2': staged(lambda classes: models.WideResNet(40, 2, classes), 3),
    'vgg8': _vgg(1, 1, 1, 1, 1),
    'vgg11': _vgg(1, 1, 2, 2, 2),
    'vgg13': _vgg(2, 2, 2, 2, 2),
    'vgg16': _vgg(2, 2, 3, 3, 3),
    'mobilenet_v2': staged(lambda classes: models.MobileNetV2(classes=classes), 4),
    'shufflenet': staged(lambda classes: models.ShuffleNet(classes), 3),
    'shufflenet_v2': staged(lambda classes: models.ShuffleNetV2(classes), 3),
    'squeezenet': staged(lambda classes: models.SqueezeNet(classes), 3),
}
