"""What terms ask of a batch and of the networks' outputs, with one-line errors where it is not there."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kdjax.batches import Batch
from kdjax.metrics import Average, mean
from kdjax.networks import Outputs


def batch_mean(values: jax.Array, batch: Batch, where: jax.Array | None = None) -> Average:
    """The mean of values [batch, ...] over what `batch['mask']` keeps and over `where`; a scalar is taken as it is."""
    if values.ndim == 0:
        return mean(values)
    kept = jnp.ones(values.shape, jnp.bool_) if where is None else where
    if 'mask' in batch:
        kept = kept & kept_elements(batch, values.shape)
    return mean(values, kept)


def kept_elements(batch: Batch, shape: tuple[int, ...]) -> jax.Array:
    """`batch['mask']`, of examples [batch] or tokens [batch, length], in a shape that broadcasts to values of shape `shape`.

    Values with fewer axes than the mask, one per example where the mask is of tokens, are kept where any token is.

    Raises:
      ValueError: the mask is not boolean, or its axes are not those of the values.
    """
    mask = batch['mask']
    if mask.dtype == jnp.bool_ and mask.ndim > 0:
        if mask.shape == shape[: mask.ndim]:
            return mask.reshape(*mask.shape, *(1,) * (len(shape) - mask.ndim))
        if mask.shape[: len(shape)] == shape:
            return jnp.any(mask, axis=tuple(range(len(shape), mask.ndim)))
    raise ValueError(
        f"batch['mask'] must be boolean, of examples {shape[:1]} or of tokens [batch, length], for values of shape {shape}; "
        f'got {mask.dtype} {mask.shape}'
    )


def mask_of(batch: Batch, shape: tuple[int, ...]) -> jax.Array | None:
    """`kept_elements`, or None for a batch without a mask."""
    return kept_elements(batch, shape) if 'mask' in batch else None


def kept_examples(batch: Batch) -> jax.Array | None:
    """The examples [batch] of which `batch['mask']` keeps anything; None without a mask."""
    return kept_elements(batch, batch['mask'].shape[:1]) if 'mask' in batch else None


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
