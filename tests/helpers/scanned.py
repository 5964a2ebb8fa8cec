"""A network whose layers are one scanned layer with stacked kernels, for tests of transformations."""

import flax.linen as nn
import jax


class _Layer(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return nn.relu(nn.Dense(self.width, name='dense')(x)), None


class ScannedMLP(nn.Module):
    """`embed`, then `depth` dense layers with ReLU under `layers/dense`, kernels [depth, width, width], then `head`.

    With `rematerialized`, the backward pass computes each layer again.
    """

    depth: int
    width: int
    classes: int = 10
    rematerialized: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layer = nn.remat(_Layer, prevent_cse=False) if self.rematerialized else _Layer
        layers = nn.scan(layer, variable_axes={'params': 0}, split_rngs={'params': True}, length=self.depth)
        x = nn.Dense(self.width, name='embed')(x.reshape(x.shape[0], -1))
        x, _ = layers(self.width, name='layers')(x, None)
        return nn.Dense(self.classes, name='head')(x)
