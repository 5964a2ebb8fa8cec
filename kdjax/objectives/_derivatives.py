"""Objectives on derivatives of the networks, which transformations of the networks make features."""

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
        source, target = jacobians(student, teacher)
        # Products are [batch, directions, ...], and the rest as the inputs. All directions count, even where no input does.
        where = feature_counts(batch, (target.shape[0], *target.shape[2:]))
        where = None if where is None else where[:, None]
        return losses.jacobian(zero_outside(where, source), zero_outside(where, target))

    return from_function('jacobian', loss)


def loss_gradient_attention(student: str, teacher: str) -> Objective:
    """LwM, learning without memorizing: `losses.loss_gradient_attention` for the class that the teacher finds most likely.

    Both networks need `class_gradients=` of the layer, see `networks.from_linen`.

    Args:
      student: path of the student's layer.
      teacher: path of the teacher's layer.
    """
    name = 'loss_gradient_attention'
    features = feature_pair(name, student, teacher)
    gradients = feature_pair(name, f'{student}/class_gradients', f'{teacher}/class_gradients')

    def loss(student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        examples = counted_examples(batch)
        where = None if examples is None else examples[:, None, None]
        labels = jnp.argmax(counted_logits(batch, require_logits(name, 'teacher', teacher)), axis=-1)
        source, target = counted_features(batch, *features(student, teacher))
        source_gradients, target_gradients = (zero_outside(where, x) for x in gradients(student, teacher))
        return losses.loss_gradient_attention(source, target, source_gradients, target_gradients, labels)

    return from_function(name, loss)
