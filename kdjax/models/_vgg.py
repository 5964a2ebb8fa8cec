"""VGG networks for small images."""

from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from kdjax.models._layers import batch_norm, classify, convolution, max_pool
from kdjax.models._narrowing import within


class VGG(nn.Module):
    """Stages of 3x3 convolutions with batch norm and ReLU, each ended by 2x2 max pooling, then dense layers.

    The default is VGG16 as CIFAR tables have it, with one hidden dense layer; `hidden=()` leaves the classifier alone. VGG8 and
    VGG13 have 1 and 2 convolutions in every stage. A side of one pixel is not pooled, and the dense layers read the mean over
    positions, so images of any size will do; of 32x32 pixels, five stages leave one position. Stages are named `stage0`,
    `stage1`, ..., their features are taken after the pooling; convolutions `stage0/conv0`, ..., taken before the norm; dense
    layers `hidden0`, ..., taken before the ReLU.

    Attributes:
      stages: (channels, number of convolutions) of each stage.
      hidden: widths of the dense layers before the last.
      classes: number of classes.
      use_bias: whether convolutions have a bias, as those behind published numbers do, although a norm follows.
      dropout: share of the dense activations that is dropped in training.
      narrowed: output channels of layers that have fewer, by path; see `kdjax.models.narrow`.

    Raises:
      ValueError: a stage is not a pair of positive numbers, or there are none.

    >>> import jax, jax.numpy as jnp
    >>> variables = jax.eval_shape(VGG(hidden=()).init, jax.random.key(0), jnp.ones((1, 32, 32, 3)))
    >>> sum(leaf.size for leaf in jax.tree.leaves(variables['params']))
    14728266

    Reference:
      Simonyan, Zisserman. Very Deep Convolutional Networks for Large-Scale Image Recognition. 2015.
      https://arxiv.org/abs/1409.1556
    """

    stages: Sequence[tuple[int, int]] = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
    hidden: Sequence[int] = (512,)
    classes: int = 10
    use_bias: bool = True
    dropout: float = 0.0
    narrowed: Mapping[str, int] = FrozenDict()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images [batch, height, width, channels] to logits [batch, classes]."""
        if not self.stages or any(len(stage) != 2 or min(stage) < 1 for stage in self.stages):
            raise ValueError(f'VGG: stages must be pairs (channels, number of convolutions), at least one, got {self.stages}')
        for i, (channels, convolutions) in enumerate(self.stages):
            name = f'stage{i}'
            x = _Stage(channels, convolutions, self.use_bias, within(self.narrowed, name), name=name)(x, train)
        x = jnp.mean(x, axis=(1, 2))
        for i, width in enumerate(self.hidden):
            name = f'hidden{i}'
            x = nn.relu(nn.Dense(self.narrowed.get(name, width), name=name)(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return classify(self, x, self.classes)


class _Stage(nn.Module):
    channels: int
    convolutions: int
    use_bias: bool
    narrowed: Mapping[str, int]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for i in range(self.convolutions):
            name = f'conv{i}'
            x = convolution(self.narrowed.get(name, self.channels), 3, use_bias=self.use_bias, name=name)(x)
            x = batch_norm(train, f'norm{i}')(x)
            if i == self.convolutions - 1:
                self.sow('intermediates', 'preact', x)
            x = nn.relu(x)
        return max_pool(x)
