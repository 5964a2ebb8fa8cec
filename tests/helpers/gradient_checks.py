"""Gradients of a loss, which the tests find by its name, and finite differences of an oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import losses


def value_and_gradients(name, *arrays, **options):
    """What a loss returns, and the gradients of its sum with respect to the arrays, as numpy arrays."""
    return jax.device_get(with_gradients(name, *arrays, **options))


def with_gradients(name, *arrays, **options):
    """`value_and_gradients` on the device, compiled. Options are traced if they are arrays or floats."""
    static = {key: x for key, x in options.items() if x is None or isinstance(x, (str, int, tuple))}
    traced = {key: x for key, x in options.items() if key not in static}
    return jitted(name, tuple(static.items()), arrays, traced)


@functools.partial(jax.jit, static_argnums=(0, 1))
def jitted(name, static, arrays, traced):
    values, pullback = jax.vjp(functools.partial(getattr(losses, name), **dict(static), **traced), *arrays)
    return values, *pullback(jnp.ones_like(values))


def central_difference(function, x, step=1e-6):
    """The gradient of a function with scalar values."""
    gradient = np.zeros(x.shape)
    for index in np.ndindex(x.shape):
        moved = np.zeros(x.shape)
        moved[index] = step
        gradient[index] = (function(x + moved) - function(x - moved)) / (2 * step)
    return gradient
