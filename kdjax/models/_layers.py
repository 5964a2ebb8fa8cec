"""Layers that the convolutional models share."""

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdjax.models._narrowing import within

Convolution = Callable[..., jax.Array]
"""How convolutions are computed: `jax.lax.conv_general_dilated`, or one of `kdjax.models.*_convolution`."""


def convolution(
    width: int,
    size: int,
    stride: int = 1,
    *,
    groups: int = 1,
    use_bias: bool = False,
    lowering: Convolution = jax.lax.conv_general_dilated,
    name: str,
) -> nn.Conv:
    """A square convolution that keeps the size of images but for its stride, with the normal initialization of He et al.

    Reference:
      He, Zhang, Ren, Sun. Delving Deep into Rectifiers. 2015. https://arxiv.org/abs/1502.01852
    """
    return nn.Conv(
        width,
        (size, size),
        (stride, stride),
        # Explicit padding: 'SAME' pads a strided convolution on one side only, unlike the networks behind published numbers.
        padding=size // 2,
        feature_group_count=groups,
        use_bias=use_bias,
        # Fans count the outputs of all groups, while an input reaches those of its own only.
        kernel_init=nn.initializers.variance_scaling(2.0 * groups, 'fan_out', 'normal'),
        name=name,
        conv_general_dilated=lowering,
    )


def batch_norm(train: bool, name: str) -> nn.BatchNorm:
    """Batch norm that uses the batch's statistics in training and moving averages of them in evaluation."""
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, name=name)


def max_pool(x: jax.Array) -> jax.Array:
    """The largest of every 2x2 positions of images [batch, height, width, channels].

    An odd row or column at the end is left out; a side of one pixel stays. Equal positions share the gradient.
    """
    # Flax's pooling is a reduction over windows, whose gradient takes XLA six times as long on CPUs.
    for axis in (1, 2):
        even = x.shape[axis] // 2 * 2
        if even:
            x = jnp.maximum(*(jax.lax.slice_in_dim(x, start, even, 2, axis) for start in (0, 1)))
    return x


class Stage(nn.Module):
    """Blocks of one width, one after the other, of which the first takes other channels and may change the size.

    Attributes:
      block: makes a block, `block(incoming=, width=, stride=, narrowed=, name=)`, which is called with images and `train`.
      incoming: channels of the input.
      width: channels of every block.
      blocks: how many, named `block0`, ....
      stride: of the first.
      narrowed: output channels of layers that have fewer, by path below the stage.

    What the last block taps as `preact` is the stage's too; its output where no ReLU ends it.
    """

    block: Callable[..., nn.Module]
    incoming: int
    width: int
    blocks: int
    stride: int
    narrowed: Mapping[str, int]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps images [batch, height, width, incoming] to [batch, height / stride, width / stride, width]."""
        for i in range(self.blocks):
            incoming, stride = (self.incoming, self.stride) if i == 0 else (self.width, 1)
            name = f'block{i}'
            narrowed = within(self.narrowed, name)
            block = self.block(incoming=incoming, width=self.width, stride=stride, narrowed=narrowed, name=name)
            x = block(x, train)
        self.sow('intermediates', 'preact', last_sown(block, 'preact', x))
        return x


def last_sown(module: nn.Module, name: str, otherwise: jax.Array) -> jax.Array:
    """What a submodule that was called has sown under a name; something else where it has not, or nobody collects it."""
    return module.get_variable('intermediates', name)[-1] if module.has_variable('intermediates', name) else otherwise


def classify(module: nn.Module, embedding: jax.Array, classes: int) -> jax.Array:
    """Logits from the embedding [batch, channels], which is tapped as `pooled`."""
    module.sow('intermediates', 'pooled', embedding)
    return nn.Dense(classes, name='head')(embedding)
