"""How a network is computed, not what: with activations computed again instead of kept."""

from collections.abc import Callable
from typing import Any

import jax

from kdjax.networks._network import Network, Outputs, unchanged
from kdjax.paths import leaves_with_paths, map_with_paths


def rematerialize(network: Network, policy: Callable[..., bool] | None = None) -> Network:
    """Keeps no activations of a network for the backward pass, which computes them again: less memory, a forward pass more.

    Args:
      network: the network.
      policy: which intermediate values are kept all the same, one of `jax.checkpoint_policies`; none if not given.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> from kdjax.networks import from_linen
    >>> network = rematerialize(from_linen(nn.Dense(3)))
    >>> network.apply(network.init(jax.random.key(0), jnp.ones((2, 5))), jnp.ones((2, 5)))[0].logits.shape
    (2, 3)

    Reference:
      Chen, Xu, Zhang, Guestrin. Training Deep Nets with Sublinear Memory Cost. 2016. https://arxiv.org/abs/1604.06174
    """

    def apply(
        variables: dict[str, Any], inputs: Any, *, train: bool = False, rng: jax.Array | None = None
    ) -> tuple[Outputs, dict[str, Any]]:
        same: set[str] = set()

        def run(variables: Any, inputs: Any, rng: Any) -> tuple[Outputs, dict[str, Any]]:
            outputs, state = network.apply(variables, inputs, train=train, rng=rng)
            same.update(unchanged(state, variables))
            return outputs, state

        outputs, state = jax.checkpoint(run, policy=policy)(variables, inputs, rng)
        # What stays the same does so as the same array, and not as what the checkpoint makes of it: `in_parts` looks.
        before = leaves_with_paths(variables)
        return outputs, map_with_paths(lambda path, leaf: before[path] if path in same else leaf, state)

    return Network(network.init, apply)
