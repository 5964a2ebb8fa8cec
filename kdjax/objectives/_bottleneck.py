"""The bottleneck of three convolutions that SimKD and SemCKD train between a student's map and a teacher's."""

from typing import Any

import flax.linen as nn
import jax

from kdjax.objectives._positions import zero_outside


class Bottleneck(nn.Module):
    """Convolutions of 1, 3 and 1 positions, without bias, with batch norm and ReLU between them.

    Attributes:
      hidden: channels between.
      channels: of the result.
      activate_last: whether batch norm and ReLU also follow the last one.
    """

    hidden: int
    channels: int
    activate_last: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None, *, train: bool = True) -> jax.Array:
        """Maps [batch, positions, channels], images or tokens, to as many positions.

        Args:
          x: the student's map.
          mask: [batch, positions, 1]: what batch norm counts and convolutions see.
          train: whether batch norm uses the batch's statistics, or those that it has gathered.
        """
        for i, (channels, size) in enumerate(((self.hidden, 1), (self.hidden, 3), (self.channels, 1))):
            x = nn.Conv(channels, (size,) * (x.ndim - 2), use_bias=False)(zero_outside(mask, x))
            if i < 2 or self.activate_last:
                x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x, mask=mask))
        return x


def require_positions(term: str, *layers: Any) -> None:
    """Raises unless all layers are maps: an embedding has no positions for a convolution."""
    for layer in layers:
        if len(layer.shape) < 3:
            raise ValueError(f'{term}: layers must be images or tokens [batch, positions, channels], got {layer.shape}')
