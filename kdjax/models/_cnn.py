"""Plain convolutional networks."""

from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
from flax.core import FrozenDict

from kdjax.models._layers import Convolution, classify, max_pool
from kdjax.models._narrowing import within


class CNN(nn.Module):
    """3x3 convolutions, each with ReLU and 2x2 max pooling, then dense layers.

    `CNN((64, 128), (512,))` is the teacher and `CNN((32, 64), (256,))` the student of the CIFAR-10 pair. Stages are named
    `stage0`, `stage1`, ...; their features are taken after the pooling.

    Attributes:
      channels: channels of the convolutions.
      hidden: widths of the dense layers before the last.
      classes: number of classes.
      dropout: share of the dense activations that is dropped in training.
      convolution: how convolutions are computed, see `kdjax.models.cpu_convolution`.
      narrowed: output channels of layers that have fewer, by path; see `kdjax.models.narrow`.

    >>> import jax, jax.numpy as jnp
    >>> module = CNN((64, 128), (512,))
    >>> variables = jax.eval_shape(module.init, jax.random.key(0), jnp.ones((1, 32, 32, 3)))
    >>> sum(leaf.size for leaf in jax.tree.leaves(variables))
    4275594
    """

    channels: Sequence[int]
    hidden: Sequence[int]
    classes: int = 10
    dropout: float = 0.0
    convolution: Convolution = jax.lax.conv_general_dilated
    narrowed: Mapping[str, int] = FrozenDict()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images [batch, height, width, channels] to logits [batch, classes]."""
        for i, channels in enumerate(self.channels):
            name = f'stage{i}'
            x = _Stage(channels, self.convolution, within(self.narrowed, name), name=name)(x)
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.hidden):
            name = f'hidden{i}'
            x = nn.relu(nn.Dense(self.narrowed.get(name, width), name=name)(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return classify(self, x, self.classes)


class _Stage(nn.Module):
    channels: int
    convolution: Convolution
    narrowed: Mapping[str, int]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = self.narrowed.get('conv', self.channels)
        x = nn.Conv(channels, (3, 3), conv_general_dilated=self.convolution, name='conv')(x)
        self.sow('intermediates', 'preact', x)
        return max_pool(nn.relu(x))
