"""Objectives on tokens: hidden states and heads of transformers, over the tokens that `batch['mask']` [batch, length] keeps.

Which student layer learns from which teacher layer is data: `over_layers(hidden_cosine, uniform_layers(student, teacher))`.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax

from kdjax import losses
from kdjax.batches import Batch
from kdjax.networks import Outputs
from kdjax.objectives._arguments import feature_pair
from kdjax.objectives._lifting import connected, where_shapes_differ
from kdjax.objectives._objective import Objective, from_function
from kdjax.objectives._positions import position_counts


def hidden_cosine(student: str, teacher: str) -> Objective:
    """DistilBERT: `losses.hidden_cosine` of two layers [batch, length, width], projected where their widths differ.

    Args:
      student: path of the student's layer.
      teacher: path of the teacher's layer.
    """

    def loss(projected: jax.Array, target: jax.Array, *, where: jax.Array | None) -> jax.Array:
        return losses.hidden_cosine(projected, target, where=None if where is None else where[..., 0])

    return connected('hidden_cosine', loss, student, teacher, where_shapes_differ)


def attention_maps(student: str, teacher: str, *, variant: Literal['mean_square', 'kl'] = 'mean_square') -> Objective:
    """TinyBERT, MiniLM: `losses.attention_maps` of two layers' attention [batch, heads, length, length].

    Args:
      student: path of the student's layer.
      teacher: path of the teacher's layer.
      variant: as in the loss.
    """
    return _on_heads(losses.attention_maps, student, teacher, variant=variant)


def value_relations(student: str, teacher: str) -> Objective:
    """MiniLM: `losses.value_relations` of two layers' values [batch, heads, length, width].

    Args:
      student: path of the student's layer.
      teacher: path of the teacher's layer.
    """
    return _on_heads(losses.value_relations, student, teacher)


def _on_heads(loss: Callable[..., jax.Array], student: str, teacher: str, **hyperparameters: Any) -> Objective:
    features = feature_pair(loss.__name__, student, teacher)

    def function(student: Outputs, teacher: Outputs, batch: Batch, **resolved: Any) -> jax.Array:
        source, target = features(student, teacher)
        where = position_counts(batch, (target.shape[0], *target.shape[2:]))
        return loss(source, target, where=where, **resolved)

    return from_function(loss.__name__, function, **hyperparameters)
