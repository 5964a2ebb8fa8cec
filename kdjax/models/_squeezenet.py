"""SqueezeNet, a small network without batch norm and without dense layers."""

from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from kdjax.models._layers import convolution, last_sown
from kdjax.models._narrowing import within


class SqueezeNet(nn.Module):
    """A stem, stages of fire modules with 3x3 max pooling at stride 2 between them, and a 1x1 convolution to the classes.

    A fire module squeezes its input to few channels by a 1x1 convolution, and expands these by a 1x1 and a 3x3 one, side by
    side, to twice its `expand`; all convolutions have a bias and ReLU, the last one too, as published: a logit is a mean of
    ReLUs. The default is SqueezeNet 1.1 for small images, with a stem at full size that is not pooled. For ImageNet, versions
    1.1 and 1.0 are

        SqueezeNet(1000, stride=2, pooling=2)
        SqueezeNet(
            1000, stem=96, window=7, stride=2, pooling=2,
            stages=(((16, 64), (16, 64), (32, 128)), ((32, 128), (48, 192), (48, 192), (64, 256)), ((64, 256),)),
        )

    Stages are named `stage1`, ... and fire modules `stage1/fire0`, ..., with convolutions `squeeze`, `expand1` and `expand3`. A
    stage's features are taken before the pooling.

    Attributes:
      classes: number of classes.
      stages: (squeeze, expand) of each fire module of each stage.
      stem: channels of the first convolution.
      window: side of its kernel.
      stride: of it.
      pooling: stride of the max pooling behind it, 1 for none.
      dropout: share of the last activations that is dropped in training.
      narrowed: output channels of layers that have fewer, by path; see `kdjax.models.narrow`.

    Raises:
      ValueError: a stage has no fire modules, or one is not a pair of positive numbers.

    >>> import jax, jax.numpy as jnp
    >>> module = SqueezeNet(1000, stride=2, pooling=2)
    >>> variables = jax.eval_shape(module.init, jax.random.key(0), jnp.ones((1, 224, 224, 3)))
    >>> sum(leaf.size for leaf in jax.tree.leaves(variables['params']))
    1235496

    Reference:
      Iandola, Han, Moskewicz, Ashraf, Dally, Keutzer. SqueezeNet: AlexNet-level accuracy with 50x fewer parameters and <0.5MB
      model size. 2016. https://arxiv.org/abs/1602.07360
    """

    classes: int = 10
    stages: Sequence[Sequence[tuple[int, int]]] = (
        ((16, 64), (16, 64)),
        ((32, 128), (32, 128)),
        ((48, 192), (48, 192), (64, 256), (64, 256)),
    )
    stem: int = 64
    window: int = 3
    stride: int = 1
    pooling: int = 1
    dropout: float = 0.0
    narrowed: Mapping[str, int] = FrozenDict()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images [batch, height, width, channels] to logits [batch, classes]."""
        fires = [fire for stage in self.stages for fire in stage]
        if not all(self.stages) or not fires or any(len(fire) != 2 or min(fire) < 1 for fire in fires):
            raise ValueError(f'SqueezeNet: a stage must be (squeeze, expand) of each fire module, got {self.stages}')
        width = self.narrowed.get('stem', self.stem)
        x = nn.relu(convolution(width, self.window, self.stride, use_bias=True, name='stem')(x))
        x = _pool(x, self.pooling)
        for i, stage in enumerate(self.stages, start=1):
            name = f'stage{i}'
            x = _pool(x, 1 if i == 1 else 2)
            x = _Stage(stage, within(self.narrowed, name), name=name)(x)
        self.sow('intermediates', 'pooled', jnp.mean(x, axis=(1, 2)))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return jnp.mean(nn.relu(convolution(self.classes, 1, use_bias=True, name='head')(x)), axis=(1, 2))


class _Stage(nn.Module):
    fires: Sequence[tuple[int, int]]
    narrowed: Mapping[str, int]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i, (squeeze, expand) in enumerate(self.fires):
            name = f'fire{i}'
            fire = _Fire(squeeze, expand, within(self.narrowed, name), name=name)
            x = fire(x)
        self.sow('intermediates', 'preact', last_sown(fire, 'preact', x))
        return x


class _Fire(nn.Module):
    squeeze: int
    expand: int
    narrowed: Mapping[str, int]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def layer(name: str, width: int, size: int) -> nn.Conv:
            return convolution(self.narrowed.get(name, width), size, use_bias=True, name=name)

        x = nn.relu(layer('squeeze', self.squeeze, 1)(x))
        x = jnp.concatenate([layer('expand1', self.expand, 1)(x), layer('expand3', self.expand, 3)(x)], axis=-1)
        self.sow('intermediates', 'preact', x)
        return nn.relu(x)


def _pool(x: jax.Array, stride: int) -> jax.Array:
    # Odd sides are rounded up, as in the published network.
    return x if stride == 1 else nn.max_pool(x, (3, 3), (stride, stride), padding='SAME')
