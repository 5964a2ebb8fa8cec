"""What the tests of objectives with connectors share: arrays, parameters, and the connectors written out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.networks import Outputs

# These programs are large and run a few times.
compile_quickly = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def arrays(shapes, seed=0):
    """Normal draws under the names of the shapes."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def shapes_of(tree):
    """The shapes of a tree, without its numbers."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def abstract_init(objective, student, teacher, batch):
    """Shapes of the parameters and the state."""
    shapes = shapes_of((student, teacher, batch))
    return jax.eval_shape(lambda: objective.init(jax.random.key(0), *shapes))


def random_params(objective, student, teacher, batch, seed=3):
    """Random parameters, biases included; the parameters' own draw would take a second for every shape."""
    rng = np.random.default_rng(seed)
    params, _ = abstract_init(objective, student, teacher, batch)
    return jax.tree.map(lambda x: (0.3 * rng.normal(size=x.shape)).astype(x.dtype), params)


def init_error(objective, student, teacher, batch):
    """The one-line message of the ValueError that init raises."""
    with pytest.raises(ValueError, match=r'\S') as error:
        abstract_init(objective, student, teacher, batch)
    message = str(error.value).split('\n--------------------\n')[0]
    assert '\n' not in message
    return message


def features(**named):
    """Outputs without logits."""
    return Outputs(None, named)


def convolution(params, x):
    """A matrix product with the windows, of odd size and padded with zeros, of [batch, height, width, channels]."""
    kernel = params['kernel']
    size, (height, width) = kernel.shape[0], x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (size // 2,) * 2, (size // 2,) * 2, (0, 0)))
    windows = [padded[:, i : i + height, j : j + width] for i in range(size) for j in range(size)]
    product = jnp.concatenate(windows, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])
    return product + params['bias'].reshape(1, 1, 1, -1) if 'bias' in params else product


def batch_norm(params, x):
    """γ (x - mean) / sqrt(var + 1e-5) + β, with statistics over all but the channels."""
    axes = tuple(range(x.ndim - 1))
    scale, bias = (params[name].reshape((1,) * (x.ndim - 1) + (-1,)) for name in ('scale', 'bias'))
    deviation = x - x.mean(axes, keepdims=True)
    return scale * deviation / jnp.sqrt((deviation**2).mean(axes, keepdims=True) + 1e-5) + bias
