"""Networks by the names that distillation tables use, for command lines."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn

from kdjax import models

_X4 = (32, 64, 128, 256)


class Architecture(NamedTuple):
    """How to make a module, and the paths of its stages, from input to output."""

    make: Callable[[int], nn.Module]
    stages: tuple[str, ...]


def _cnn(channels: tuple[int, ...], hidden: tuple[int, ...]) -> Architecture:
    stages = tuple(f'stage{i}' for i in range(len(channels)))
    return Architecture(lambda classes: models.CNN(channels, hidden, classes), stages)


def _resnet(depth: int, widths: tuple[int, ...] = (16, 16, 32, 64)) -> Architecture:
    return Architecture(lambda classes: models.ResNet(depth, classes, widths), ('stage1', 'stage2', 'stage3'))


def _mlp(*hidden: int) -> Architecture:
    return Architecture(lambda classes: models.MLP(hidden, classes), tuple(f'hidden{i}' for i in range(len(hidden))))


ARCHITECTURES = {
    'cnn_64_128': _cnn((64, 128), (512,)),
    'cnn_32_64': _cnn((32, 64), (256,)),
    'cnn_8_16': _cnn((8, 16), (32,)),
    'mlp_1200_1200': _mlp(1200, 1200),
    'mlp_800_800': _mlp(800, 800),
    'mlp_30': _mlp(30),
    **{f'resnet{depth}': _resnet(depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
    'resnet8x4': _resnet(8, _X4),
    'resnet32x4': _resnet(32, _X4),
}
