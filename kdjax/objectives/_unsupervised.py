"""Objectives that need no labels and no classes in common: reconstruction, attention distillation, diversity and size."""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from kdjax import losses
from kdjax.batches import Batch, counts
from kdjax.networks import Outputs
from kdjax.objectives._arguments import require_entry, require_feature, require_logits
from kdjax.objectives._labels import check_classes
from kdjax.objectives._lifting import connected, where_shapes_differ
from kdjax.objectives._objective import Objective, Weight, from_function
from kdjax.objectives._positions import counted_features, counted_logits, feature_counts


def reconstruction(student: str | None = None, teacher: str | None = None) -> Objective:
    """`losses.reconstruction`: squared distance of the student's output from what it should reproduce.

    Args:
      student: path of the student's feature; if not given, its logits, which may be the output of an autoencoder.
      teacher: path of the teacher's feature to reproduce; `'inputs'` for the inputs themselves, the teacher's logits if not
        given.
    """

    def pick(side: str, outputs: Outputs, path: str | None) -> Any:
        name = 'reconstruction'
        return require_logits(name, side, outputs) if path is None else require_feature(name, side, outputs, path)

    def loss(student_outputs: Outputs, teacher_outputs: Outputs, batch: Batch) -> jax.Array:
        inputs = teacher == 'inputs'
        target = require_entry('reconstruction', batch, 'inputs') if inputs else pick('teacher', teacher_outputs, teacher)
        if not hasattr(target, 'shape'):
            raise ValueError('reconstruction: the inputs are several arrays: make a feature of the one to reproduce')
        made, target = counted_features(batch, pick('student', student_outputs, student), jnp.asarray(target))
        return losses.reconstruction(made, target, where=feature_counts(batch, made.shape))

    return from_function('reconstruction', loss)


def attention_distillation(student: str, teacher: str, *, variant: Literal['layer', 'inner_product'] = 'layer') -> Objective:
    """`losses.attention_distillation` between two layers, regressed to one shape where theirs differ.

    Args:
      student: path of the student's layer.
      teacher: path of the teacher's layer.
      variant: as in the loss.
    """
    return connected(
        'attention_distillation', losses.attention_distillation, student, teacher, where_shapes_differ, variant=variant
    )


def activation_size(student: str) -> Objective:
    """`losses.activation_size` of a layer of the student, to be kept small: an objective beside accuracy.

    Args:
      student: path of the student's layer.
    """

    def loss(student_outputs: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        del teacher
        (feature,) = counted_features(batch, require_feature('activation_size', 'student', student_outputs, student))
        return losses.activation_size(feature)

    return from_function('activation_size', loss)


def diversity(**hyperparameters: Weight) -> Objective:
    """`losses.diversity` of the student's logits: confident for each example, diverse over the batch.

    Positions [batch, positions, classes] are examples too. A scalar: of the batch's weights it matters only which are 0.

    Args:
      **hyperparameters: as in the loss; numbers or schedules.
    """

    def loss(student: Outputs, teacher: Outputs, batch: Batch, **resolved: Any) -> jax.Array:
        del teacher
        logits = counted_logits(batch, require_logits('diversity', 'student', student))
        check_classes('diversity', logits)
        where = counts(batch, logits.shape[:-1])
        where = None if where is None else jnp.broadcast_to(where, logits.shape[:-1]).reshape(-1)
        return losses.diversity(logits.reshape(-1, logits.shape[-1]), where=where, **resolved)

    return from_function('diversity', loss, **hyperparameters)
