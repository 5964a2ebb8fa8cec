"""What terms ask of a batch and of the networks' outputs, with one-line errors where it is not there."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kdjax.batches import Batch, counts, weights_of
from kdjax.metrics import Average, mean
from kdjax.networks import Outputs


def batch_mean(values: jax.Array, batch: Batch, where: jax.Array | None = None, weights: jax.Array | None = None) -> Average:
    """The mean of values [batch, ...] over what counts in the batch and over `where`, by the weights of the batch.

    Σ w·v / Σ w, with w = `batch['weights']` times `weights`, 1 where there are none. What does not count may be anything, NaN
    too, but for its gradient: NaN times 0 is NaN, so set what the values are made of to zero there with `counted_features`.

    Args:
      values: [batch, ...]; a scalar is taken as it is.
      batch: the batch.
      where: booleans of the shape of the values: what else must be true of what counts.
      weights: further weights of that shape.
    """
    if values.ndim == 0:
        return mean(values)
    kept, found = counts(batch, values.shape), weights_of(batch, values.shape)
    everywhere = jnp.ones(values.shape, jnp.bool_)
    for each in (kept, where):
        everywhere = everywhere if each is None else everywhere & each
    if found is None and weights is None:
        return mean(values, everywhere)
    factors = [x.astype(jnp.float32) for x in (found, weights) if x is not None]
    total = jnp.where(everywhere, math.prod(factors), 0.0)
    return Average(jnp.sum(total * jnp.where(everywhere, values.astype(jnp.float32), 0.0)), jnp.sum(total))


def require_labels(term: str, batch: Batch) -> jax.Array:
    """The labels of a batch."""
    return require_entry(term, batch, 'labels')


def require_entry(term: str, batch: Batch, name: str) -> jax.Array:
    """An array of the batch."""
    if name not in batch:
        raise ValueError(f"{term} needs batch['{name}']; the batch has {', '.join(sorted(batch))}")
    return batch[name]


def require_logits(term: str, side: str, outputs: Outputs) -> jax.Array:
    """The logits of the student or the teacher."""
    if outputs.logits is None:
        raise ValueError(f'{term} needs the logits of a {side}, and there are none')
    return outputs.logits


def require_feature(term: str, side: str, outputs: Outputs, path: str) -> jax.Array:
    """A feature of the student or the teacher."""
    if path not in outputs.features:
        tapped = ', '.join(sorted(outputs.features)) or 'none'
        raise ValueError(
            f'{term}: the {side} gives no feature {path!r} (it gives: {tapped}); name it in features= where the network is made'
        )
    return outputs.features[path]


def feature_pair(term: str, student_path: str, teacher_path: str) -> Callable[[Outputs, Outputs], tuple[Any, Any]]:
    """The function that picks the two features which a term compares."""

    def features(student: Outputs, teacher: Outputs) -> tuple[Any, Any]:
        return (
            require_feature(term, 'student', student, student_path),
            require_feature(term, 'teacher', teacher, teacher_path),
        )

    return features


def feature_pairs(
    term: str, student_paths: Sequence[str], teacher_paths: Sequence[str]
) -> Callable[[Outputs, Outputs], tuple[tuple[Any, ...], tuple[Any, ...]]]:
    """The function that picks all the student's features which a term compares, and as many of the teacher's."""
    if len(student_paths) != len(teacher_paths) or not student_paths:
        raise ValueError(
            f'{term}: name as many layers of the teacher as of the student; got {student_paths} and {teacher_paths}'
        )

    def features(student: Outputs, teacher: Outputs) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return (
            tuple(require_feature(term, 'student', student, path) for path in student_paths),
            tuple(require_feature(term, 'teacher', teacher, path) for path in teacher_paths),
        )

    return features
