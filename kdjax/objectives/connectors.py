"""Connectors: small trained modules between student and teacher, which training throws away at the end."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class Regressor(nn.Module):
    """Brings an activation to the shape of another: FitNets' regressor.

    Images: a 1x1 convolution where the sizes agree; a strided one where the student's image is a whole number of times
    larger, a transposed one where it is smaller; a convolution without padding for other sizes larger than the target.
    Everything else, [batch, ..., width]: a dense layer on the last axis. Then, with `normalize`, batch norm and ReLU, as in
    the published CIFAR code. The batch norm always uses the batch's own statistics, since the module never runs outside
    training.

    Attributes:
      shape: the shape to reach, with the batch axis.
      normalize: whether batch norm and ReLU follow.
    """

    shape: tuple[int, ...]
    normalize: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Maps [batch, ..., channels] to `shape`; batch norm counts the examples in `mask`, broadcastable to `shape`.

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
        return nn.relu(nn.BatchNorm(use_running_average=False)(x, mask=mask)) if self.normalize else x

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


def init_connector(module: nn.Module, key: jax.Array, *inputs: jax.ShapeDtypeStruct) -> dict:
    """Makes a connector's parameters from shapes alone."""
    shapes = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in inputs]
    return dict(module.lazy_init(key, *shapes)['params'])


def apply_connector(module: nn.Module, params: dict, *inputs: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Runs a connector in float32, whatever precision the network computes in."""
    inputs = [x.astype(jnp.float32) for x in inputs]
    output, _ = module.apply({'params': params}, *inputs, mask=mask, mutable=['batch_stats'])
    return output
