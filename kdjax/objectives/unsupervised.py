"""Objectives that need no labels and no classes in common: reconstruction, attention distillation, diversity and size."""

from typing import Any

import jax

from kdjax import losses
from kdjax.batches import Batch
from kdjax.networks import Outputs
from kdjax.objectives.arguments import kept_examples, require_entry, require_feature, require_logits
from kdjax.objectives.lifting import connected, where_shapes_differ
from kdjax.objectives.objective import Objective, Weight, from_function


def reconstruction(student: str | None = None, teacher: str | None = None) -> Objective:
    """`losses.reconstruction`: squared distance of the student's output from what it should reproduce.

    Args:
      student: path of the student's feature; its logits, the output of an autoencoder say, if not given.
      teacher: path of the teacher's feature to reproduce; `'inputs'` for the inputs themselves, the teacher's logits if not
        given.
    """

    def pick(side: str, outputs: Outputs, path: str | None) -> Any:
        name = 'reconstruction'
        return require_logits(name, side, outputs) if path is None else require_feature(name, side, outputs, path)

    def loss(student_outputs: Outputs, teacher_outputs: Outputs, batch: Batch) -> jax.Array:
        inputs = teacher == 'inputs'
        target = require_entry('reconstruction', batch, 'inputs') if inputs else pick('teacher', teacher_outputs, teacher)
        return losses.reconstruction(pick('student', student_outputs, student), target)

    return from_function('reconstruction', loss)


def attention_distillation(student: str, teacher: str, *, variant: str = 'layer') -> Objective:
    """`losses.attention_distillation` between two layers, regressed to one shape where theirs differ.

    Args:
      student: path of the student's layer.
      teacher: path of the teacher's layer.
      variant: as in the loss.
    """

    def loss(regressed: jax.Array, target: jax.Array, batch: Batch) -> jax.Array:
        del batch
        return losses.attention_distillation(regressed, target, variant=variant)

    return connected('attention_distillation', loss, student, teacher, where_shapes_differ)


def activation_size(student: str) -> Objective:
    """`losses.activation_size` of a layer of the student, to be kept small: an objective beside accuracy.

    Args:
      student: path of the student's layer.
    """

    def loss(student_outputs: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        del teacher, batch
        return losses.activation_size(require_feature('activation_size', 'student', student_outputs, student))

    return from_function('activation_size', loss)


def diversity(**hyperparameters: Weight) -> Objective:
    """`losses.diversity` of the student's logits: confident for each example, diverse over the batch.

    Args:
      **hyperparameters: as in the loss; numbers or schedules.
    """

    def loss(student: Outputs, teacher: Outputs, batch: Batch, **resolved: Any) -> jax.Array:
        del teacher
        return losses.diversity(require_logits('diversity', 'student', student), where=kept_examples(batch), **resolved)

    return from_function('diversity', loss, **hyperparameters)
