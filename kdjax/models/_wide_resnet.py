"""Wide residual networks, whose blocks have norm and activation in front of each convolution."""

import functools
import itertools
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from kdjax.models._layers import Convolution, Stage, batch_norm, classify, convolution
from kdjax.models._narrowing import within


class WideResNet(nn.Module):
    """WRN of depth 6n + 4: a 3x3 stem of 16 channels, and three stages of n blocks with 16k, 32k and 64k channels.

    `WideResNet(16, 2)` is the WRN-16-2 of the tables, `WideResNet(28, 10)` the paper's WRN-28-10. In a block, batch norm and
    ReLU stand in front of both convolutions; a shortcut that changes shape is a 1x1 convolution of the first ReLU's output.
    Stages are named `stage1` to `stage3` and blocks `stage1/block0`, ...; their features are sums that may be negative, and the
    last `norm` and its ReLU follow them.

    Attributes:
      depth: number of layers, 10, 16, 22, 28, 40, ...
      widening: k.
      classes: number of classes.
      dropout: share of the activations between the two convolutions of a block that is dropped in training.
      convolution: how convolutions are computed, see `kdjax.models.cpu_convolution`.
      narrowed: output channels of layers that have fewer, by path; see `kdjax.models.narrow`.

    Raises:
      ValueError: the depth is not 6n + 4, or the widening is not positive.

    >>> import jax, jax.numpy as jnp
    >>> variables = jax.eval_shape(WideResNet(16, 2, classes=100).init, jax.random.key(0), jnp.ones((1, 32, 32, 3)))
    >>> sum(leaf.size for leaf in jax.tree.leaves(variables['params']))
    703284

    Reference:
      Zagoruyko, Komodakis. Wide Residual Networks. 2016. https://arxiv.org/abs/1605.07146
    """

    depth: int
    widening: int = 1
    classes: int = 10
    dropout: float = 0.0
    convolution: Convolution = jax.lax.conv_general_dilated
    narrowed: Mapping[str, int] = FrozenDict()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images [batch, height, width, channels] to logits [batch, classes]."""
        blocks, rest = divmod(self.depth - 4, 6)
        if rest or blocks < 1 or self.widening < 1:
            raise ValueError(
                f'WideResNet: depth must be 6n + 4 with n >= 1 (10, 16, 22, ...) and widening at least 1, '
                f'got {self.depth} and {self.widening}'
            )
        x = convolution(self.narrowed.get('stem', 16), 3, lowering=self.convolution, name='stem')(x)
        block = functools.partial(_Block, dropout=self.dropout, convolution=self.convolution)
        widths = (16, *(channels * self.widening for channels in (16, 32, 64)))
        for i, (incoming, width) in enumerate(itertools.pairwise(widths), start=1):
            name, stride = f'stage{i}', 1 if i == 1 else 2
            x = Stage(block, incoming, width, blocks, stride, within(self.narrowed, name), name=name)(x, train)
        x = nn.relu(batch_norm(train, 'norm')(x))
        return classify(self, jnp.mean(x, axis=(1, 2)), self.classes)


class _Block(nn.Module):
    incoming: int
    width: int
    stride: int
    narrowed: Mapping[str, int]
    dropout: float
    convolution: Convolution

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        def layer(name: str, size: int, stride: int = 1) -> nn.Conv:
            return convolution(self.narrowed.get(name, self.width), size, stride, lowering=self.convolution, name=name)

        activated = nn.relu(batch_norm(train, 'norm1')(x))
        y = layer('conv1', 3, self.stride)(activated)
        y = nn.relu(batch_norm(train, 'norm2')(y))
        y = nn.Dropout(self.dropout, deterministic=not train)(y)
        y = layer('conv2', 3)(y)
        # Where the standard network has a shortcut, the narrowed one has it too, whatever channels are left.
        if self.incoming != self.width or self.stride != 1:
            x = layer('shortcut', 1, self.stride)(activated)
        return x + y
