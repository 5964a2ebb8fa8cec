"""Which parameters are kernels, by what the network does with them."""

from collections.abc import Mapping
from typing import Any

from kdjax import jaxprs
from kdjax.networks import Network


def product_kernels(network: Network, variables: Mapping[str, Any], inputs: Any) -> tuple[str, ...]:
    """The parameters that the network multiplies its inputs by and sums, whatever they are called: `leaves` for `prune`.

    They are found in the network's jaxpr, where dense layers, convolutions and attention are products. Biases, scales of norms
    and learned positions are none, however many axes they have; neither are tables of embeddings, unless the head multiplies by
    one too. Of an operand that several parameters make, as a kernel and its gain do, the largest counts. Products that do not
    depend on the inputs are not looked at.

    Args:
      network: any; it is traced with `train=False`.
      variables: arrays or shapes.
      inputs: a batch of inputs, any pytree; only its shapes count.

    Returns:
      Their paths in the parameters, sorted.

    Raises:
      ValueError: the network has no such parameter, or a product within control flow other than calls and scans.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, optax
    >>> from kdjax import networks, pruning
    >>> network = networks.from_linen(nn.Sequential([nn.Embed(9, 4), nn.LayerNorm(), nn.Dense(3)]))
    >>> tokens = jnp.zeros((2, 5), jnp.int32)
    >>> leaves = product_kernels(network, network.init(jax.random.key(0), tokens), tokens)
    >>> leaves
    ('layers_2/kernel',)
    >>> optimizer = pruning.prune(optax.adam(1e-3), 0.5, leaves=leaves)
    """
    program, _, _ = jaxprs.trace_network(network, variables, inputs)
    # A product without a sum, such as an einsum with a norm's scale, only scales.
    found = {
        p.path for p in jaxprs.products(program) if p.path is not None and p.weights is not None and p.contracted(p.weights)
    }
    if not found:
        raise ValueError('product_kernels: the network multiplies its inputs by no parameter; name the arrays to prune')
    return tuple(sorted(found))
