"""What the tests of models share: shapes without computing, and variables without compiling."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kdjax import networks

CIFAR = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)


def abstract_variables(module: nn.Module, inputs: jax.Array | jax.ShapeDtypeStruct = CIFAR) -> dict:
    return jax.eval_shape(networks.from_linen(module).init, jax.random.key(0), inputs)


def number_of_parameters(module: nn.Module) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_variables(module)['params']))


def shapes_of(module: nn.Module, features: tuple[str, ...], inputs: jax.ShapeDtypeStruct = CIFAR) -> dict[str, tuple[int, ...]]:
    """Of the logits and the features, for two CIFAR images unless said otherwise."""
    network = networks.from_linen(module, features=features)
    outputs, _ = jax.eval_shape(network.apply, abstract_variables(module, inputs), inputs)
    return {'logits': outputs.logits.shape} | {path: value.shape for path, value in outputs.features.items()}


def filled(module: nn.Module, inputs: jax.Array) -> dict:
    """Variables as `init` shapes them, drawn by numpy: kernels that keep the size of activations, vectors positive."""
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if len(leaf.shape) < 2:
            return jnp.asarray(rng.uniform(0.5, 1.0, leaf.shape), leaf.dtype)
        return jnp.asarray(rng.standard_normal(leaf.shape) * np.sqrt(2 / np.prod(leaf.shape[:-1])), leaf.dtype)

    return jax.tree.map(draw, abstract_variables(module, inputs))
