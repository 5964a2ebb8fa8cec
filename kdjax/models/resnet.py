"""Residual networks for small images, as distillation tables use them."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

Convolution = Callable[..., jax.Array]


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

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images [batch, height, width, channels] to logits [batch, classes]."""
        blocks, rest = divmod(self.depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f'ResNet: depth must be 6n + 2 with n >= 1 (8, 14, 20, ...), got {self.depth}')
        if len(self.widths) != 4:
            raise ValueError(f'ResNet: widths must be those of the stem and three stages, got {self.widths}')
        x = _convolution(self.convolution, self.widths[0], 3, name='stem')(x)
        x = nn.relu(_norm(train, 'stem_norm')(x))
        for i, width in enumerate(self.widths[1:], start=1):
            x = _Stage(width, blocks, 1 if i == 1 else 2, self.convolution, name=f'stage{i}')(x, train)
        return nn.Dense(self.classes, name='head')(jnp.mean(x, axis=(1, 2)))


class _Stage(nn.Module):
    width: int
    blocks: int
    stride: int
    convolution: Convolution

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for i in range(self.blocks):
            x = _BasicBlock(self.width, self.stride if i == 0 else 1, self.convolution, name=f'block{i}')(x, train)
        return x


class _BasicBlock(nn.Module):
    width: int
    stride: int
    convolution: Convolution

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = _convolution(self.convolution, self.width, 3, self.stride, name='conv1')(x)
        y = nn.relu(_norm(train, 'norm1')(y))
        y = _convolution(self.convolution, self.width, 3, name='conv2')(y)
        y = _norm(train, 'norm2')(y)
        if x.shape != y.shape:
            x = _convolution(self.convolution, self.width, 1, self.stride, name='shortcut')(x)
            x = _norm(train, 'shortcut_norm')(x)
        return nn.relu(x + y)


def _convolution(convolution: Convolution, width: int, size: int, stride: int = 1, *, name: str) -> nn.Conv:
    # Explicit padding: 'SAME' pads a strided convolution on one side only, unlike the networks behind published numbers.
    return nn.Conv(
        width,
        (size, size),
        (stride, stride),
        padding=size // 2,
        use_bias=False,
        kernel_init=nn.initializers.variance_scaling(2.0, 'fan_out', 'normal'),
        name=name,
        conv_general_dilated=convolution,
    )


def _norm(train: bool, name: str) -> nn.BatchNorm:
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, name=name)
