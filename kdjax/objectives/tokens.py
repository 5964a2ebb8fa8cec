"""Objectives on tokens: hidden states and heads of transformers, over the tokens that `batch['mask']` [batch, length] keeps.

Which student layer learns from which teacher layer is data: `over_layers(hidden_cosine, uniform_layers(student, teacher))`.
"""

from typing import Any

import jax

from kdjax import losses
from kdjax.batches import Batch
from kdjax.networks import Outputs
from kdjax.objectives.arguments import feature_pair, kept_elements
from kdjax.objectives.connectors import Regressor, apply_connector, init_connector
from kdjax.objectives.objective import Objective, from_function, with_parameters


def hidden_cosine(student: str, teacher: str) -> Objective:
    """`losses.hidden_cosine` of two layers [batch, length, width], after a trained projection where their widths differ.

    Args:
      student: path of the student's layer.
      teacher: path of the teacher's layer.
    """
    features = feature_pair('hidden_cosine', student, teacher)

    def projection(source: Any, target: Any) -> Regressor | None:
        return None if source.shape == target.shape else Regressor(tuple(target.shape))

    def init(key: jax.Array, student: Outputs, teacher: Outputs, batch: Batch) -> Any:
        del batch
        source, target = features(student, teacher)
        module = projection(source, target)
        return {} if module is None else init_connector(module, key, source)

    def loss(params: Any, student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        source, target = features(student, teacher)
        module = projection(source, target)
        projected = source if module is None else apply_connector(module, params, source)
        return losses.hidden_cosine(projected, target, where=_tokens(batch, target.shape[:2]))

    return with_parameters('hidden_cosine', init, loss)


def attention_maps(student: str, teacher: str, *, variant: str = 'mean_square') -> Objective:
    """`losses.attention_maps` of two layers' attention [batch, heads, length, length].

    Args:
      student: path of the student's layer.
      teacher: path of the teacher's layer.
      variant: as in the loss.
    """
    return _on_heads('attention_maps', student, teacher, variant=variant)


def value_relations(student: str, teacher: str) -> Objective:
    """`losses.value_relations` of two layers' values [batch, heads, length, width].

    Args:
      student: path of the student's layer.
      teacher: path of the teacher's layer.
    """
    return _on_heads('value_relations', student, teacher)


def _on_heads(name: str, student: str, teacher: str, **hyperparameters: Any) -> Objective:
    features = feature_pair(name, student, teacher)

    def function(student: Outputs, teacher: Outputs, batch: Batch, **resolved: Any) -> jax.Array:
        source, target = features(student, teacher)
        where = _tokens(batch, (target.shape[0], target.shape[2]))
        return getattr(losses, name)(source, target, where=where, **resolved)

    return from_function(name, function, **hyperparameters)


def _tokens(batch: Batch, shape: tuple[int, ...]) -> jax.Array | None:
    return jax.numpy.broadcast_to(kept_elements(batch, shape), shape) if 'mask' in batch else None
