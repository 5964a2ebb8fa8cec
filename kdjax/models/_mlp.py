"""Multilayer perceptrons."""

from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
from flax.core import FrozenDict

from kdjax.models._layers import classify


class MLP(nn.Module):
    """Dense layers with ReLU and dropout between them, on flattened inputs.

    Hidden layers are named `hidden0`, `hidden1`, ...; their features are taken before the ReLU.

    Attributes:
      hidden: widths of the hidden layers.
      classes: number of classes.
      dropout: share of the hidden activations that is dropped in training.
      narrowed: output channels of layers that have fewer, by path; see `kdjax.models.narrow`.

    >>> import jax, jax.numpy as jnp
    >>> module = MLP((1200, 1200), classes=10)
    >>> variables = jax.eval_shape(module.init, jax.random.key(0), jnp.ones((1, 28, 28, 1)))
    >>> sum(leaf.size for leaf in jax.tree.leaves(variables))
    2395210
    """

    hidden: Sequence[int]
    classes: int = 10
    dropout: float = 0.0
    narrowed: Mapping[str, int] = FrozenDict()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps inputs [batch, ...] to logits [batch, classes]."""
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.hidden):
            name = f'hidden{i}'
            x = nn.relu(nn.Dense(self.narrowed.get(name, width), name=name)(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return classify(self, x, self.classes)
