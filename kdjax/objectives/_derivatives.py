"""Objectives on derivatives of the networks, which transformations of the networks make features."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kdjax import losses
from kdjax.batches import Batch, counted_examples
from kdjax.networks import Outputs
from kdjax.objectives._arguments import feature_pair, require_logits
from kdjax.objectives._objective import Objective, from_function
from kdjax.objectives._positions import counted_features, counted_logits, feature_counts, zero_outside


def jacobian() -> Objective:
    """Sobolev training: `losses.jacobian` of two networks that `networks.tap_jacobian` has given their derivatives.

    The derivatives by those inputs [batch, positions, channels] that count are compared.
    """
    jacobians = feature_pair('jacobian', 'jacobian', 'jacobian')

    def loss(student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        pair = [x.astype(jnp.float32) for x in jacobians(student, teacher)]
        if pair[0].shape != pair[1].shape:
            raise ValueError(
                f'jacobian: student {pair[0].shape} and teacher {pair[1].shape} must have the same directions and inputs'
            )
        # [batch, directions, ...], and the rest as the inputs.
        where = feature_counts(batch, (pair[0].shape[0], *pair[0].shape[2:]))
        pair = [zero_outside(None if where is None else where[:, None], x) for x in pair]
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
        examples = counted_examples(batch)
        where = None if examples is None else examples[:, None, None]
        labels = jnp.argmax(counted_logits(batch, require_logits(name, 'teacher', teacher)), axis=-1)
        heads = [functools.partial(_linear_head, class_gradients=zero_outside(where, w)) for w in weights(student, teacher)]
        source, target = counted_features(batch, *features(student, teacher))
        return losses.loss_gradient_attention(heads[0], heads[1], source, target, labels)

    return from_function(name, loss)


def _linear_head(features: jax.Array, class_gradients: Any) -> jax.Array:
    """The linear function of a feature map [batch, height, width, channels] with this derivative at every position."""
    totals = jnp.sum(features.astype(jnp.float32), axis=(1, 2))
    return jnp.einsum('bc,bkc->bk', totals, class_gradients.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
