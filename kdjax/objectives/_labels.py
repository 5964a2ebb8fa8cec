"""Labels as classes: what they must be, which of them count, and what stands for one that is no class.

A label beyond the classes is a mistake, and must not become a plausible number: where its value is at hand, an eager call or a
check on the host, it is an error, and where it is traced the value is NaN.
"""

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from kdjax.batches import Batch, counts
from kdjax.networks import Outputs
from kdjax.objectives._arguments import require_entry, require_logits
from kdjax.objectives._objective import Check


def class_labels(
    term: str, batch: Batch, logits: Any, *, entry: str = 'labels', ignore: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Labels of logits [batch, ..., classes] as int32, -1 where they do not count, and where they do.

    A label counts where the batch does, and it is neither negative nor `ignore`.

    Raises:
      ValueError: they are not integers of the shape of the logits without classes, there are no two classes, or, if values are
        at hand, a label that counts is beyond the classes.
    """
    labels = require_entry(term, batch, entry)
    if labels.shape != logits.shape[:-1]:
        raise ValueError(f'{term}: {entry} {labels.shape} do not fit logits {logits.shape}')
    check_classes(term, logits)
    kept = indices_that_count(term, batch, entry, labels, logits.shape[-1], ignore)
    return jnp.where(kept, jnp.asarray(labels).astype(jnp.int32), -1), kept


def check_classes(term: str, logits: Any) -> None:
    """Raises where logits are of one class, whose softmax is 1 whatever the network says."""
    if logits.shape[-1] < 2:
        raise ValueError(
            f'{term} compares classes, and logits {logits.shape} have {logits.shape[-1]}: take binary_labels for one yes or '
            'no, regression for a number'
        )


def indices_that_count(term: str, batch: Batch, entry: str, indices: Any, size: int, ignore: int | None = None) -> jax.Array:
    """Where an entry of the batch holds an index that counts: one that is not negative or `ignore`, where the batch counts.

    Raises:
      ValueError: they are not integers, or one that counts is not below `size`, if values are at hand.
    """
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise ValueError(f"{term}: batch['{entry}'] must be integers from 0, got {indices.dtype}")
    kept = (indices >= 0) if ignore is None else (indices >= 0) & (indices != ignore)
    counted = counts(batch, indices.shape)
    kept = jnp.asarray(kept if counted is None else kept & counted)
    raise_where(
        kept & (indices >= size), indices, f"{term}: batch['{entry}'] must be below {size}, or negative where there is none"
    )
    return kept


def raise_where(wrong: jax.Array, indices: Any, message: str) -> None:
    """Raises the message with the first of the indices that are wrong, if values are at hand and there is one."""
    if isinstance(wrong, jax.core.Tracer):
        return
    found = np.asarray(indices)[np.asarray(wrong)]
    if found.size:
        raise ValueError(f'{message}, got {found[0]} ({found.size} such)')


def nan_outside(values: jax.Array, indices: jax.Array, size: int) -> jax.Array:
    """Values, and NaN, which their gradients are too, where an index is not below `size`."""
    return values * jnp.where(indices < size, jnp.float32(1.0), jnp.float32(jnp.nan))


def labels_check(term: str, *entries: str, ignore: int | None = None) -> Check:
    """The check of a term's labels where values are at hand."""

    def check(student: Outputs, teacher: Outputs, batch: Batch) -> None:
        del teacher
        logits = require_logits(term, 'student', student)
        for entry in entries:
            # The outputs are those of one batch, and the labels may be of all the data.
            shape = (*np.shape(require_entry(term, batch, entry))[:1], *logits.shape[1:])
            class_labels(term, batch, jax.ShapeDtypeStruct(shape, logits.dtype), entry=entry, ignore=ignore)

    return check
