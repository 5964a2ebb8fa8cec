"""ShuffleNet and ShuffleNetV2, light networks that mix the channels of groups by shuffling them.

Channels cannot be removed from them, so they have no field `narrowed`: what is shuffled must keep its groups.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdjax.models._layers import batch_norm, classify, convolution, last_sown
from kdjax.models._stems import Stem, apply_stem


def shuffle_channels(x: jax.Array, groups: int) -> jax.Array:
    """Deals the channels of every group out in turns: channel j of group i comes to j · groups + i.

    Args:
      x: [..., channels].
      groups: number of groups, which must divide the channels.

    >>> import jax.numpy as jnp
    >>> print(shuffle_channels(jnp.array([0, 1, 2, 10, 11, 12]), 2))
    [ 0 10  1 11  2 12]
    """
    return jnp.swapaxes(x.reshape(*x.shape[:-1], groups, -1), -1, -2).reshape(x.shape)


class ShuffleNet(nn.Module):
    """ShuffleNetV1: a stem and three stages of units with grouped 1x1 convolutions and channel shuffle.

    A unit is a grouped 1x1 convolution to a quarter of its channels, shuffle, a 3x3 depthwise convolution and a grouped 1x1
    one, all with batch norm, the first with ReLU; then it adds its input. The first unit of a stage halves the size and appends
    its channels to those of its input, average-pooled; the first convolution of all has no groups.

    The default is the `ShuffleV1` of CIFAR tables, with 3 groups and a 1x1 stem. There the first unit of a stage has a quarter
    of the channels that it appends in the middle, and a quarter of all in the authors' network, which for ImageNet is

        ShuffleNet(1000, stages=((240, 4, 60), (480, 8, 120), (960, 4, 240)), stem=Stem(24, stride=2, pooling=2))

    Stages are named `stage1` to `stage3` and units `stage1/unit0`, ...; their features are taken after the last ReLU. The
    tables have a ReLU after the depthwise convolution too, and the paper has none, as here.

    Attributes:
      classes: number of classes.
      stages: (channels, number of units, channels in the middle of the first unit) of each stage.
      groups: number of groups.
      stem: the first convolution.

    Raises:
      ValueError: a stage is not three positive numbers, or the groups do not divide channels.

    >>> import jax, jax.numpy as jnp
    >>> variables = jax.eval_shape(ShuffleNet(100).init, jax.random.key(0), jnp.ones((1, 32, 32, 3)))
    >>> sum(leaf.size for leaf in jax.tree.leaves(variables['params']))
    949258

    Reference:
      Zhang, Zhou, Lin, Sun. ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices. 2018.
      https://arxiv.org/abs/1707.01083
    """

    classes: int = 10
    stages: Sequence[tuple[int, int, int]] = ((240, 4, 54), (480, 8, 60), (960, 4, 120))
    groups: int = 3
    stem: Stem = Stem(24, window=1)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images [batch, height, width, channels] to logits [batch, classes]."""
        _check_stages(self.stages, self.groups, self.stem.width)
        x = apply_stem(self.stem, x, train)
        for i, (width, units, middle) in enumerate(self.stages, start=1):
            x = _ShuffleStage(width, units, middle, self.groups, 1 if i == 1 else self.groups, name=f'stage{i}')(x, train)
        return classify(self, jnp.mean(x, axis=(1, 2)), self.classes)


def _check_stages(stages: Sequence[tuple[int, int, int]], groups: int, incoming: int) -> None:
    if not stages or any(len(stage) != 3 or min(stage) < 1 for stage in stages):
        raise ValueError(f'ShuffleNet: stages must be (channels, units, channels in the middle of the first), got {stages}')
    for width, _, middle in stages:
        if width <= incoming or any(channels % groups for channels in (width, width - incoming, width // 4, middle)):
            raise ValueError(
                f'ShuffleNet: {groups} groups must divide the {width} channels of a stage, a quarter of them, the {middle} in '
                f'the middle of its first unit, and those that it appends to {incoming}'
            )
        incoming = width


class _ShuffleStage(nn.Module):
    width: int
    units: int
    middle: int
    groups: int
    first_groups: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        added = self.width - x.shape[-1]
        y = _Unit(added, self.middle, self.first_groups, self.groups, 2, name='unit0')(x, train)
        # Flax's avg_pool divides by an int64, which fails for users who forbid implicit promotion.
        pooled = nn.pool(x, 0.0, jax.lax.add, (3, 3), (2, 2), ((1, 1), (1, 1))) / 9.0
        x = jnp.concatenate([y, pooled], axis=-1)
        for i in range(1, self.units):
            x = nn.relu(x)
            x = x + _Unit(self.width, self.width // 4, self.groups, self.groups, 1, name=f'unit{i}')(x, train)
        self.sow('intermediates', 'preact', x)
        return nn.relu(x)


class _Unit(nn.Module):
    """The branch with parameters, before it meets the unit's input."""

    width: int
    middle: int
    first_groups: int
    groups: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = convolution(self.middle, 1, groups=self.first_groups, name='reduce')(x)
        x = nn.relu(batch_norm(train, 'reduce_norm')(x))
        x = shuffle_channels(x, self.first_groups)
        x = convolution(self.middle, 3, self.stride, groups=self.middle, name='depthwise')(x)
        x = batch_norm(train, 'depthwise_norm')(x)
        x = convolution(self.width, 1, groups=self.groups, name='expand')(x)
        return batch_norm(train, 'expand_norm')(x)


class ShuffleNetV2(nn.Module):
    """A stem, three stages of units that leave half of their channels alone, a 1x1 convolution, and the mean position's class.

    A unit sends one half of its channels through a 1x1, a 3x3 depthwise and another 1x1 convolution, and shuffles both halves
    together. The first unit of a stage halves the size: it sends all of its input through these, and through a depthwise and a
    1x1 convolution beside them. All convolutions have batch norm, and the 1x1 ones ReLU.

    The default is the `ShuffleV2` of CIFAR tables, of width 1.0 with a 1x1 stem. For ImageNet the stem is
    `Stem(24, stride=2, pooling=2)`. Stages are named `stage1` to `stage3` and units `stage1/unit0`, ....

    Attributes:
      classes: number of classes.
      stages: (channels, number of units) of each stage; (48, 96, 192) channels for width 0.5, (176, 352, 704) for 1.5.
      stem: the first convolution.
      last: channels of the last one.

    Raises:
      ValueError: the channels of a stage are odd.

    >>> import jax, jax.numpy as jnp
    >>> variables = jax.eval_shape(ShuffleNetV2(100).init, jax.random.key(0), jnp.ones((1, 32, 32, 3)))
    >>> sum(leaf.size for leaf in jax.tree.leaves(variables['params']))
    1355528

    Reference:
      Ma, Zhang, Zheng, Sun. ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design. 2018.
      https://arxiv.org/abs/1807.11164
    """

    classes: int = 10
    stages: Sequence[tuple[int, int]] = ((116, 4), (232, 8), (464, 4))
    stem: Stem = Stem(24, window=1)
    last: int = 1024

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images [batch, height, width, channels] to logits [batch, classes]."""
        if not self.stages or any(width % 2 or units < 1 for width, units in self.stages):
            raise ValueError(f'ShuffleNetV2: stages must be (an even number of channels, units), got {self.stages}')
        x = apply_stem(self.stem, x, train)
        for i, (width, units) in enumerate(self.stages, start=1):
            x = _SplitStage(width, units, name=f'stage{i}')(x, train)
        x = convolution(self.last, 1, name='last')(x)
        x = nn.relu(batch_norm(train, 'last_norm')(x))
        return classify(self, jnp.mean(x, axis=(1, 2)), self.classes)


class _SplitStage(nn.Module):
    width: int
    units: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        half = self.width // 2
        for i in range(self.units):
            branch = _Branch(half, 2 if i == 0 else 1, name=f'unit{i}')
            left = _Shortcut(half, name='shortcut')(x, train) if i == 0 else x[..., :half]
            right = branch(x if i == 0 else x[..., half:], train)
            x = shuffle_channels(jnp.concatenate([left, right], axis=-1), 2)
        # The half that a unit leaves alone comes from the one before it, and stays as it was there.
        before = jnp.concatenate([left, last_sown(branch, 'preact', right)], axis=-1)
        self.sow('intermediates', 'preact', shuffle_channels(before, 2))
        return x


class _Branch(nn.Module):
    width: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = convolution(self.width, 1, name='first')(x)
        x = nn.relu(batch_norm(train, 'first_norm')(x))
        x = convolution(self.width, 3, self.stride, groups=self.width, name='depthwise')(x)
        x = batch_norm(train, 'depthwise_norm')(x)
        x = convolution(self.width, 1, name='second')(x)
        x = batch_norm(train, 'second_norm')(x)
        self.sow('intermediates', 'preact', x)
        return nn.relu(x)


class _Shortcut(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        channels = x.shape[-1]
        x = convolution(channels, 3, 2, groups=channels, name='depthwise')(x)
        x = batch_norm(train, 'depthwise_norm')(x)
        x = convolution(self.width, 1, name='project')(x)
        return nn.relu(batch_norm(train, 'project_norm')(x))
