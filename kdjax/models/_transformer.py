"""Transformers for images."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from kdjax.models._attention import Attention
from kdjax.models._layers import classify
from kdjax.models._narrowing import within


class VisionTransformer(nn.Module):
    """Patches as tokens, blocks of attention and MLP with norms before them, and the mean token's class.

    Blocks are named `block0`, `block1`, ... and give hidden states [batch, tokens, width]. What each block's attention computes
    is tapped as `block0/attention/scores` [batch, heads, tokens, tokens], before the softmax, and `block0/attention/values`
    [batch, heads, tokens, width / heads].

    Attributes:
      depth: number of blocks.
      width: of the tokens.
      heads: of the attention; they divide the width.
      patches: how many there are along each side of the image; they divide it.
      classes: number of classes.
      narrowed: hidden widths of MLPs that have fewer than 4 times the width, by the path of their first layer, such as
        `block0/expand`; see `kdjax.models.narrow`.

    >>> import jax, jax.numpy as jnp
    >>> from kdjax import networks
    >>> network = networks.from_linen(VisionTransformer(depth=2, width=32, heads=4), features='block1/attention/scores')
    >>> outputs, _ = network.apply(network.init(jax.random.key(0), jnp.ones((1, 8, 8, 1))), jnp.ones((1, 8, 8, 1)))
    >>> outputs.features['block1/attention/scores'].shape
    (1, 4, 16, 16)

    Reference:
      Dosovitskiy et al. An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale. 2021.
      https://arxiv.org/abs/2010.11929
    """

    depth: int
    width: int
    heads: int
    patches: int = 4
    classes: int = 10
    narrowed: Mapping[str, int] = FrozenDict()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images [batch, height, width, channels] to logits [batch, classes].

        Raises:
          ValueError: patches do not divide the image, or heads the width.
        """
        if x.shape[1] % self.patches or x.shape[2] % self.patches or self.width % self.heads:
            raise ValueError(
                f'VisionTransformer: {self.patches} patches a side must divide the image {x.shape[1:3]}, '
                f'and {self.heads} heads the width {self.width}'
            )
        patch = x.shape[1] // self.patches, x.shape[2] // self.patches
        x = nn.Conv(self.width, patch, patch, name='embed')(x)
        x = x.reshape(x.shape[0], -1, self.width)
        x = x + self.param('positions', nn.initializers.normal(0.02), (1, *x.shape[1:]))
        for i in range(self.depth):
            name = f'block{i}'
            x = _Block(self.heads, within(self.narrowed, name), name=name)(x)
        return classify(self, jnp.mean(nn.LayerNorm(name='norm')(x), axis=1), self.classes)


class _Block(nn.Module):
    heads: int
    narrowed: Mapping[str, int]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        x = x + Attention(self.heads, name='attention')(nn.LayerNorm(name='norm1')(x))
        hidden = self.narrowed.get('expand', 4 * width)
        y = nn.gelu(nn.Dense(hidden, name='expand')(nn.LayerNorm(name='norm2')(x)))
        return x + nn.Dense(width, name='reduce')(y)
