"""A network, images and variables for the tests of artefacts."""

from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from kdjax import models, networks

FILES = ['load.py', 'manifest.json', 'model.stablehlo', 'weights.safetensors']
IMAGES = np.random.default_rng(0).standard_normal((7, 8, 8, 1)).astype(np.float32)
CNN = networks.from_linen(models.CNN((8, 16), (32,)))


def random_variables(network: networks.Network, inputs: Any = IMAGES, seed: int = 0) -> dict[str, Any]:
    """Positive numbers in the shapes of the network's variables, so that variances are some too."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(network.init, jax.random.key(0), inputs)
    return jax.tree.map(lambda leaf: jnp.asarray(abs(rng.standard_normal(leaf.shape)) * 0.1, leaf.dtype), shapes)
