"""MobileNetV2, a light network of depthwise convolutions."""

import functools
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from kdjax.models._layers import Stage, batch_norm, classify, convolution
from kdjax.models._narrowing import within


class MobileNetV2(nn.Module):
    """A 3x3 stem, stages of inverted residual blocks, a 1x1 convolution, and the mean position's class.

    A block expands its channels by a 1x1 convolution, filters each by a 3x3 depthwise one, and projects them to its width by
    another 1x1, without an activation; all three have batch norm, the first two ReLU6. An expansion of 1 needs no expanding
    convolution. Blocks that keep size and width add their input. The default is small and meant for small images; the paper's
    network for ImageNet is

        MobileNetV2(
            stages=((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
            stem=32, last=1280, stride=2, classes=1000,
        )

    Stages are named `stage1`, `stage2`, ... and blocks `stage1/block0`, ..., with convolutions `expand`, `depthwise` and
    `project`, whose features are taken before the norm.

    Attributes:
      stages: (expansion, width, number of blocks, stride of the first block) of each stage.
      stem: channels of the first convolution.
      last: channels of the last one.
      stride: of the stem.
      classes: number of classes.
      narrowed: output channels of layers that have fewer, by path; see `kdjax.models.narrow`. A depthwise convolution has its
        input's channels.

    Raises:
      ValueError: a stage is not four positive numbers, or there are none.

    >>> import jax, jax.numpy as jnp
    >>> variables = jax.eval_shape(MobileNetV2().init, jax.random.key(0), jnp.ones((1, 32, 32, 3)))
    >>> sum(leaf.size for leaf in jax.tree.leaves(variables['params']))
    134538

    Reference:
      Sandler, Howard, Zhu, Zhmoginov, Chen. MobileNetV2: Inverted Residuals and Linear Bottlenecks. 2018.
      https://arxiv.org/abs/1801.04381
    """

    stages: Sequence[tuple[int, int, int, int]] = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 2, 2), (6, 64, 2, 2))
    stem: int = 16
    last: int = 256
    stride: int = 1
    classes: int = 10
    narrowed: Mapping[str, int] = FrozenDict()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images [batch, height, width, channels] to logits [batch, classes]."""
        if not self.stages or any(len(stage) != 4 or min(stage) < 1 for stage in self.stages):
            raise ValueError(f'MobileNetV2: stages must be (expansion, width, blocks, stride), at least one, got {self.stages}')
        x = convolution(self.narrowed.get('stem', self.stem), 3, self.stride, name='stem')(x)
        x = nn.relu6(batch_norm(train, 'stem_norm')(x))
        incoming = self.stem
        for i, (expansion, width, blocks, stride) in enumerate(self.stages, start=1):
            name, block = f'stage{i}', functools.partial(_InvertedResidual, expansion=expansion)
            x = Stage(block, incoming, width, blocks, stride, within(self.narrowed, name), name=name)(x, train)
            incoming = width
        x = convolution(self.narrowed.get('last', self.last), 1, name='last')(x)
        x = nn.relu6(batch_norm(train, 'last_norm')(x))
        return classify(self, jnp.mean(x, axis=(1, 2)), self.classes)


class _InvertedResidual(nn.Module):
    incoming: int
    width: int
    stride: int
    narrowed: Mapping[str, int]
    expansion: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = x
        if self.expansion > 1:
            y = convolution(self.narrowed.get('expand', self.expansion * self.incoming), 1, name='expand')(y)
            y = nn.relu6(batch_norm(train, 'expand_norm')(y))
        channels = y.shape[-1]
        y = convolution(channels, 3, self.stride, groups=channels, name='depthwise')(y)
        y = nn.relu6(batch_norm(train, 'depthwise_norm')(y))
        y = convolution(self.narrowed.get('project', self.width), 1, name='project')(y)
        y = batch_norm(train, 'project_norm')(y)
        return x + y if self.stride == 1 and self.incoming == self.width else y
