"""Connectors: small trained modules between student and teacher, which training throws away at the end.

They run in float32 and always in training mode: a batch norm uses the batch's own statistics, since no connector is ever
evaluated. A mask [batch, positions, 1] says what such a batch norm counts, and what a convolution after it may see: zeros
elsewhere, as beyond the edge of an image.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdjax.objectives._positions import zero_outside


class Regressor(nn.Module):
    """Brings an activation to the shape of another: FitNets' regressor.

    Images: a 1x1 convolution where the sizes agree; a strided one where the student's image is a whole number of times
    larger, a transposed one where it is smaller; a convolution without padding for other sizes larger than the target.
    Everything else, [batch, ..., width]: a dense layer on the last axis.

    Attributes:
      shape: the shape to reach, with the batch axis.
      normalize: whether batch norm follows.
    """

    shape: tuple[int, ...]
    normalize: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Maps [batch, ..., channels] to `shape`.

        Raises:
          ValueError: no connector leads from the one shape to the other.
        """
        channels = self.shape[-1]
        if x.ndim == 4 and len(self.shape) == 4:
            x = self._resize(x, channels)
        elif x.shape[:-1] == self.shape[:-1]:
            x = nn.Dense(channels)(x)
        if x.shape != self.shape:
            raise ValueError(f'no regressor leads from an activation {x.shape} to {self.shape}: choose layers of like sizes')
        return nn.BatchNorm(use_running_average=False)(x, mask=mask) if self.normalize else x

    def _resize(self, x: jax.Array, channels: int) -> jax.Array:
        sizes, targets = x.shape[1:3], self.shape[1:3]
        if sizes == targets:
            return nn.Conv(channels, (1, 1))(x)
        if all(size % target == 0 for size, target in zip(sizes, targets, strict=True)):
            strides = tuple(size // target for size, target in zip(sizes, targets, strict=True))
            return nn.Conv(channels, tuple(s + 1 if s > 1 else 1 for s in strides), strides)(x)
        if all(target % size == 0 for size, target in zip(sizes, targets, strict=True)):
            strides = tuple(target // size for size, target in zip(sizes, targets, strict=True))
            return nn.ConvTranspose(channels, tuple(2 * s for s in strides), strides)(x)
        if all(size >= target for size, target in zip(sizes, targets, strict=True)):
            window = tuple(size - target + 1 for size, target in zip(sizes, targets, strict=True))
            return nn.Conv(channels, window, padding='VALID')(x)
        return x


class Convolutions(nn.Module):
    """Convolutions of one size, with an activation between them, and after the last if that is asked for.

    Attributes:
      channels: of each convolution.
      size: of the windows.
      activation: what stands between.
      transposed: whether the convolutions are transposed ones.
      use_bias: whether they have one, which before a batch norm would have no say.
      normalize: whether batch norm stands before each activation.
      activate_last: whether the activation also follows the last one.
    """

    channels: tuple[int, ...]
    size: int
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    transposed: bool = False
    use_bias: bool = True
    normalize: bool = False
    activate_last: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Maps [batch, positions, channels], images or tokens, to [batch, positions, channels of the last]."""
        convolution = nn.ConvTranspose if self.transposed else nn.Conv
        for i, channels in enumerate(self.channels):
            activated = i < len(self.channels) - 1 or self.activate_last
            use_bias = self.use_bias and not (activated and self.normalize)
            x = convolution(channels, (self.size,) * (x.ndim - 2), use_bias=use_bias)(zero_outside(mask, x))
            if activated and self.normalize:
                x = nn.BatchNorm(use_running_average=False)(x, mask=mask)
            x = self.activation(x) if activated else x
        return x


class Embedding(nn.Module):
    """A linear map of an embedding.

    Attributes:
      width: of the embedding.
    """

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [batch, channels] to [batch, width]."""
        return nn.Dense(self.width)(x)


def init_connector(module: nn.Module, key: jax.Array, *inputs: jax.ShapeDtypeStruct) -> dict:
    """Makes a connector's parameters from shapes alone."""
    shapes = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in inputs]
    variables = module.lazy_init(key, *shapes)
    return dict(variables['params']) if 'params' in variables else {}


def apply_connector(module: nn.Module, params: dict, *inputs: jax.Array, mask: Any = None) -> Any:
    """Runs a connector in float32, whatever precision the network computes in.

    Inputs are zero where they do not count, see `counted_features`; `mask` is for connectors that take one, or several.
    """
    inputs = tuple(x.astype(jnp.float32) for x in inputs)
    # Statistics of no examples would be NaN; the loss of such a batch is 0 whatever they are.
    masked = {} if mask is None else {'mask': jax.tree.map(lambda each: each | ~jnp.any(each), mask)}
    output, _ = module.apply({'params': params}, *inputs, **masked, mutable=['batch_stats'])
    return output
