"""Grad-CAM's weights: the derivatives of a network's logits by the channels of a layer, whatever framework it comes from."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kdjax.networks._linear_logits import dense_logits
from kdjax.networks._network import Outputs


def class_gradients(
    maker: str, path: str, activation: jax.Array, forward: Callable[[Callable[[jax.Array], jax.Array]], Any]
) -> jax.Array:
    """The derivative of each logit by each channel of a layer, its mean over positions: [batch, classes, channels].

    Args:
      maker: the function that makes the network, for the error.
      path: the layer's.
      activation: what the layer returned.
      forward: `forward(perturb)` is what the network returns where `perturb` is applied to what the layer returns.

    Raises:
      ValueError: the layer was not called once, so that there is no one activation to differentiate by.
    """
    calls = 0

    def logits(perturbation: jax.Array) -> jax.Array:
        def perturb(output: jax.Array) -> jax.Array:
            nonlocal calls
            calls += 1
            return output + perturbation

        result = forward(perturb)
        return dense_logits(result.logits if isinstance(result, Outputs) else result)

    values, pullback = jax.vjp(logits, jnp.zeros_like(activation))
    if calls != 1:
        raise ValueError(f'{maker}: class_gradients of {path!r} need a submodule that is called once, not {calls} times')
    classes = jnp.eye(values.shape[-1], dtype=values.dtype)
    gradients = jax.vmap(lambda one: pullback(jnp.broadcast_to(one, values.shape))[0], out_axes=1)(classes)
    return jnp.mean(gradients, axis=tuple(range(2, gradients.ndim - 1)))


def check_tapped(maker: str, class_gradients: tuple[str, ...], features: tuple[str, ...]) -> None:
    """Raises where the gradients are asked for by a layer that is no feature."""
    untapped = [path for path in class_gradients if path not in features]
    if untapped:
        raise ValueError(f'{maker}: class_gradients of {untapped[0]!r} need that path in features too')
