"""Residual networks of basic blocks: those for small images, as distillation tables use them, and ResNet18."""

import functools
import itertools
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from kdjax.models._layers import Convolution, Stage, batch_norm, classify, convolution
from kdjax.models._narrowing import within
from kdjax.models._stems import Stem, apply_stem


class ResNet(nn.Module):
    """CIFAR ResNet of depth 6n + 2: a 3x3 stem and three stages of n basic blocks, at full, half and quarter size.

    `ResNet(20)` has widths 16, 16, 32, 64; the wider `resnet8x4` and `resnet32x4` of the tables are
    `ResNet(8, widths=(32, 64, 128, 256))` and depth 32. Shortcuts that change shape are a 1x1 convolution with batch norm.
    Stages are named `stage1` to `stage3` and blocks `stage1/block0`, ...; their features are taken after the last ReLU.

    Attributes:
      depth: number of layers, 8, 14, 20, 32, 44, 56, 110, ...
      classes: number of classes.
      widths: channels of the stem and of the stages.
      convolution: how convolutions are computed, see `kdjax.models.im2col_convolution`.
      narrowed: output channels of layers that have fewer, by path; see `kdjax.models.narrow`.

    Raises:
      ValueError: the depth is not 6n + 2.

    >>> import jax, jax.numpy as jnp
    >>> variables = jax.eval_shape(ResNet(20, classes=100).init, jax.random.key(0), jnp.ones((1, 32, 32, 3)))
    >>> sum(leaf.size for leaf in jax.tree.leaves(variables['params']))
    278324

    Reference:
      He, Zhang, Ren, Sun. Deep Residual Learning for Image Recognition. 2016. https://arxiv.org/abs/1512.03385
    """

    depth: int
    classes: int = 10
    widths: Sequence[int] = (16, 16, 32, 64)
    convolution: Convolution = jax.lax.conv_general_dilated
    narrowed: Mapping[str, int] = FrozenDict()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images [batch, height, width, channels] to logits [batch, classes]."""
        blocks, rest = divmod(self.depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f'ResNet: depth must be 6n + 2 with n >= 1 (8, 14, 20, ...), got {self.depth}')
        if len(self.widths) != 4:
            raise ValueError(f'ResNet: widths must be those of the stem and three stages, got {self.widths}')
        x = convolution(self.narrowed.get('stem', self.widths[0]), 3, lowering=self.convolution, name='stem')(x)
        x = nn.relu(batch_norm(train, 'stem_norm')(x))
        block = functools.partial(_BasicBlock, convolution=self.convolution)
        for i, (incoming, width) in enumerate(itertools.pairwise(self.widths), start=1):
            name, stride = f'stage{i}', 1 if i == 1 else 2
            x = Stage(block, incoming, width, blocks, stride, within(self.narrowed, name), name=name)(x, train)
        return classify(self, jnp.mean(x, axis=(1, 2)), self.classes)


class ResNet18(nn.Module):
    """A stem and four stages of two basic blocks, with 64, 128, 256 and 512 channels, each but the first at half the size.

    The default is for small images, with a 3x3 stem at full size, as CIFAR tables have it. The paper's network for ImageNet is
    `ResNet18(1000, stem=Stem(64, window=7, stride=2, pooling=2))`. Names and shortcuts are those of `ResNet`, with stages
    `stage1` to `stage4`.

    Attributes:
      classes: number of classes.
      stem: the first convolution.
      convolution: how convolutions are computed, see `kdjax.models.cpu_convolution`.
      narrowed: output channels of layers that have fewer, by path; see `kdjax.models.narrow`.

    >>> import jax, jax.numpy as jnp
    >>> variables = jax.eval_shape(ResNet18().init, jax.random.key(0), jnp.ones((1, 32, 32, 3)))
    >>> sum(leaf.size for leaf in jax.tree.leaves(variables['params']))
    11173962

    Reference:
      He, Zhang, Ren, Sun. Deep Residual Learning for Image Recognition. 2016. https://arxiv.org/abs/1512.03385
    """

    classes: int = 10
    stem: Stem = Stem(64)
    convolution: Convolution = jax.lax.conv_general_dilated
    narrowed: Mapping[str, int] = FrozenDict()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images [batch, height, width, channels] to logits [batch, classes]."""
        x = apply_stem(self.stem, x, train, width=self.narrowed.get('stem', self.stem.width), lowering=self.convolution)
        block = functools.partial(_BasicBlock, convolution=self.convolution)
        for i, (incoming, width) in enumerate(itertools.pairwise((self.stem.width, 64, 128, 256, 512)), start=1):
            name, stride = f'stage{i}', 1 if i == 1 else 2
            x = Stage(block, incoming, width, 2, stride, within(self.narrowed, name), name=name)(x, train)
        return classify(self, jnp.mean(x, axis=(1, 2)), self.classes)


class _BasicBlock(nn.Module):
    incoming: int
    width: int
    stride: int
    narrowed: Mapping[str, int]
    convolution: Convolution

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        def layer(name: str, size: int, stride: int = 1) -> nn.Conv:
            return convolution(self.narrowed.get(name, self.width), size, stride, lowering=self.convolution, name=name)

        y = layer('conv1', 3, self.stride)(x)
        y = nn.relu(batch_norm(train, 'norm1')(y))
        y = layer('conv2', 3)(y)
        y = batch_norm(train, 'norm2')(y)
        # Where the standard network has a shortcut, the narrowed one has it too, whatever channels are left.
        if self.incoming != self.width or x.shape[1:3] != y.shape[1:3]:
            x = layer('shortcut', 1, self.stride)(x)
            x = batch_norm(train, 'shortcut_norm')(x)
        self.sow('intermediates', 'preact', x + y)
        return nn.relu(x + y)
