"""The first layers of convolutional networks, which differ between small images and those of ImageNet."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax

from kdjax.models._layers import Convolution, batch_norm, convolution


class Stem(NamedTuple):
    """A convolution with batch norm and ReLU, and perhaps 3x3 max pooling.

    Attributes:
      width: channels.
      window: side of the convolution's kernel, odd.
      stride: of the convolution.
      pooling: stride of the max pooling, 1 for none.
    """

    width: int
    window: int = 3
    stride: int = 1
    pooling: int = 1


def apply_stem(
    stem: Stem,
    x: jax.Array,
    train: bool,
    *,
    width: int | None = None,
    lowering: Convolution = jax.lax.conv_general_dilated,
) -> jax.Array:
    """Adds the layers `stem` and `stem_norm` to the module in whose call this is called.

    Args:
      stem: what they are.
      x: images [batch, height, width, channels].
      train: whether batch norm uses the batch's statistics.
      width: channels where the stem was narrowed.
      lowering: how the convolution is computed.

    Raises:
      ValueError: the stem's numbers are out of range.
    """
    if min(stem) < 1 or stem.window % 2 == 0:
        raise ValueError(f'the stem must have positive numbers and an odd window, got {stem}')
    width = stem.width if width is None else width
    x = convolution(width, stem.window, stem.stride, lowering=lowering, name='stem')(x)
    x = nn.relu(batch_norm(train, 'stem_norm')(x))
    if stem.pooling > 1:
        around: Any = ((1, 1), (1, 1))  # which Flax takes, though its type says str
        x = nn.max_pool(x, (3, 3), (stem.pooling, stem.pooling), padding=around)
    return x
