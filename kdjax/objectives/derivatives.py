"""Objectives on derivatives of the networks, which transformations of the networks make features."""

from typing import Any

import jax
import jax.numpy as jnp

from kdjax import losses
from kdjax.batches import Batch
from kdjax.networks import Outputs
from kdjax.objectives.arguments import feature_pair, require_logits
from kdjax.objectives.objective import Objective, from_function


def jacobian() -> Objective:
    """Sobolev training: `losses.jacobian` of two networks that `networks.tap_jacobian` has given their derivatives."""
    jacobians = feature_pair('jacobian', 'jacobian', 'jacobian')

    def loss(student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        del batch
        pair = [x.astype(jnp.float32) for x in jacobians(student, teacher)]
        if pair[0].shape != pair[1].shape:
            raise ValueError(
                f'jacobian: student {pair[0].shape} and teacher {pair[1].shape} must have the same directions and inputs'
            )
        squares = jnp.square(pair[0] - pair[1])
        return jnp.mean(jnp.sum(squares.reshape(*squares.shape[:2], -1), axis=-1), axis=-1)

    return from_function('jacobian', loss)


def loss_gradient_attention(student: str, teacher: str) -> Objective:
    """Learning without memorizing: `losses.loss_gradient_attention` for the class that the teacher finds most likely.

    Both networks need `class_gradients=` of the layer, see `networks.from_linen`.

    Args:
      student: path of the student's layer.
      teacher: path of the teacher's layer.
    """
    name = 'loss_gradient_attention'
    features = feature_pair(name, student, teacher)
    weights = feature_pair(name, f'{student}/class_gradients', f'{teacher}/class_gradients')

    def loss(student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        del batch
        labels = jnp.argmax(require_logits(name, 'teacher', teacher), axis=-1)
        heads = [lambda x, w=w: _linear_head(x, w) for w in weights(student, teacher)]
        return losses.loss_gradient_attention(*heads, *features(student, teacher), labels)

    return from_function(name, loss)


def _linear_head(features: jax.Array, class_gradients: Any) -> jax.Array:
    """The linear function of a feature map [batch, height, width, channels] with this derivative at every position."""
    totals = jnp.sum(features.astype(jnp.float32), axis=(1, 2))
    return jnp.einsum('bc,bkc->bk', totals, class_gradients.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
