"""Objectives for several labels at a time and for numbers: the losses of `kdjax.losses` of those names.

Logits are [batch, positions, outputs] and `batch['labels']` has their shape; those of one output may lack the last axis.
`batch['mask']` is of examples or positions, or has the shape of the logits and says which single labels there are.
`batch['weights']` are of examples or positions. A position of which no label is kept does not count.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kdjax import losses
from kdjax.batches import Batch, counts
from kdjax.metrics import Average
from kdjax.networks import Outputs
from kdjax.objectives._arguments import batch_mean, require_labels, require_logits
from kdjax.objectives._by_position import by_position
from kdjax.objectives._objective import Objective, Weight, from_function, with_check


def binary_labels(*, class_weights: ArrayLike | None = None) -> Objective:
    """Cross-entropy with yes or no for each class, `losses.binary_labels`: the mean over classes, then over examples.

    Labels are booleans, integers 0 and 1, of which negative ones are not known, or probabilities. An example of which no label
    is known does not count. Of one logit it is the loss of a binary classifier.

    Args:
      class_weights: [classes], by how much each counts in the mean over classes; 0 leaves a class out.
    """
    name = 'binary_labels'

    def loss(student: Outputs, teacher: Outputs, batch: Batch) -> Average:
        del teacher
        logits, labels, where = _targets(name, student, batch)
        values = losses.binary_labels(logits, labels, class_weights=class_weights, where=where)
        known = jnp.broadcast_to(True if class_weights is None else jnp.asarray(class_weights) != 0, logits.shape)
        if jnp.issubdtype(labels.dtype, jnp.integer):
            known = known & (labels >= 0)
        return _mean(values, batch, known if where is None else known & where)

    def check(student: Outputs, teacher: Outputs, batch: Batch) -> None:
        del teacher
        # The outputs are those of one batch, and the labels may be of all the data.
        logits = require_logits(name, 'student', student)
        shape = (*np.shape(require_labels(name, batch))[:1], *logits.shape[1:])
        _, labels, where = _targets(name, Outputs(np.zeros(shape, np.float32)), batch)
        losses.binary_labels(np.zeros(shape, np.float32), labels, class_weights=class_weights, where=where)

    return with_check(by_position(from_function(name, loss)), check)


def binary_soft_targets(*, temperature: Weight = 1.0) -> Objective:
    """MLD, divergence from the teacher's yes or no for each class: `losses.binary_soft_targets` of the logits.

    Args:
      temperature: a number or a schedule.
    """
    name = 'binary_soft_targets'

    def loss(student: Outputs, teacher: Outputs, batch: Batch, **hyperparameters: Any) -> Average:
        logits = require_logits(name, 'student', student), require_logits(name, 'teacher', teacher)
        where = _counts(name, batch, logits[0].shape)
        return _mean(losses.binary_soft_targets(*logits, where=where, **hyperparameters), batch, where)

    return by_position(from_function(name, loss, temperature=temperature))


def regression(*, delta: Weight | None = None) -> Objective:
    """Squared distance of the logits from the labels, or Huber's, `losses.regression`; labels are floating point.

    Args:
      delta: Huber's, from which on the loss is linear; a number or a schedule. None for the square.
    """
    name = 'regression'

    def loss(student: Outputs, teacher: Outputs, batch: Batch, **hyperparameters: Any) -> Average:
        del teacher
        logits, labels, where = _targets(name, student, batch)
        return _mean(losses.regression(logits, labels, where=where, **hyperparameters), batch, where)

    return by_position(from_function(name, loss, delta=delta))


def bounded_regression(*, margin: Weight = 0.0) -> Objective:
    """Squared distance of the logits from the labels where the teacher does better, `losses.bounded_regression`.

    The published recipe is `regression(delta=1.0) + 0.5 * bounded_regression()`.

    Args:
      margin: by how much the student must do better than the teacher to be left alone; a number or a schedule.
    """
    name = 'bounded_regression'

    def loss(student: Outputs, teacher: Outputs, batch: Batch, **hyperparameters: Any) -> Average:
        logits, labels, where = _targets(name, student, batch)
        bound = require_logits(name, 'teacher', teacher)
        return _mean(losses.bounded_regression(logits, bound, labels, where=where, **hyperparameters), batch, where)

    return by_position(from_function(name, loss, margin=margin))


def _targets(name: str, student: Outputs, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Logits, labels of their shape, and which of them count."""
    logits, labels = require_logits(name, 'student', student), require_labels(name, batch)
    if logits.shape[-1:] == (1,) and labels.shape == logits.shape[:-1]:
        labels = labels[..., None]
    if labels.shape != logits.shape:
        raise ValueError(f"{name}: batch['labels'] must have the shape of the logits, {logits.shape}, got {labels.shape}")
    return logits, labels, _counts(name, batch, logits.shape)


def _counts(name: str, batch: Batch, shape: tuple[int, ...]) -> jax.Array | None:
    """Which logits count, in a shape that broadcasts to theirs; None where all do."""
    if len(shape) < 2:
        raise ValueError(f'{name}: logits must be [batch, ..., outputs], got {shape}')
    if 'weights' in batch and batch['weights'].ndim >= len(shape):
        raise ValueError(
            f"{name}: batch['weights'] must be of examples or positions, {shape[:-1]}, got {batch['weights'].shape}"
        )
    return counts(batch, shape)


def _mean(values: jax.Array, batch: Batch, where: jax.Array | None) -> Average:
    """The mean over the positions of which a label is kept."""
    return batch_mean(values, batch, None if where is None else jnp.broadcast_to(jnp.any(where, axis=-1), values.shape))
