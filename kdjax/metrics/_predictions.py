"""What metrics ask of outputs and batches: logits, labels and which positions count, with one-line errors."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.batches import Batch, counts, weights_of
from kdjax.metrics._averages import Average, mean
from kdjax.networks import Outputs, sum_in_chunks

Metric = TypeVar('Metric', bound=Callable[[Outputs, Batch], Any])


class Predictions(NamedTuple):
    """Logits and labels of the positions of a batch, of which some count.

    Attributes:
      logits: [batch, ..., classes], float32; zeros where a position does not count.
      labels: [batch, ...], int32, from 0 to classes - 1; 0 where a position does not count.
      kept: [batch, ...], the positions that count.
      weights: [batch, ...], by how much they do, or None.
      valid: [batch, ...], whether the position has a right value; where it has not, metrics are NaN.
    """

    logits: jax.Array
    labels: jax.Array
    kept: jax.Array
    weights: jax.Array | None
    valid: jax.Array

    def mean(self, values: jax.Array) -> Average:
        """The mean of one value for each position."""
        return mean(jnp.where(self.valid, values.astype(jnp.float32), jnp.nan), self.kept, self.weights)

    def add_up(self, values: jax.Array, groups: jax.Array, number: int) -> jax.Array:
        """The weighted sums of values in groups 0 to number - 1, float32 [number]; NaN if any position is not valid."""
        values = jnp.where(self.kept, values, jnp.zeros_like(values))
        if self.weights is not None:
            values = values.astype(jnp.float32) * self.weights
        # Ones are counted as integers: a sum of floats stands still at sixteen million.
        sums = jnp.zeros(number, values.dtype).at[groups.reshape(-1)].add(values.reshape(-1)).astype(jnp.float32)
        return jnp.where(jnp.all(self.valid | ~self.kept), sums, jnp.nan)


def in_chunks(metric: Metric) -> Metric:
    """The same metric, which takes the logits of `networks.linear_head` too, a chunk of positions at a time."""

    @functools.wraps(metric)
    def chunked(outputs: Outputs, batch: Batch) -> Any:
        return sum_in_chunks(metric, (outputs,), batch)

    return cast(Metric, chunked)


def logits_of(metric: str, outputs: Outputs) -> jax.Array:
    """The logits in float32."""
    if outputs.logits is None:
        raise ValueError(f'{metric} needs logits, and the network gives none')
    return jnp.asarray(outputs.logits).astype(jnp.float32)


def class_logits(metric: str, outputs: Outputs) -> jax.Array:
    """The logits [batch, ..., classes] of at least two classes."""
    logits = logits_of(metric, outputs)
    if logits.ndim < 2 or logits.shape[-1] < 2:
        raise ValueError(
            f'{metric} compares classes, and logits {logits.shape} have one: binary_accuracy is for single logits, '
            'squared_error for numbers'
        )
    return logits


def entry_of(metric: str, batch: Batch, name: str) -> Any:
    """An array of the batch."""
    if name not in batch:
        raise ValueError(f"{metric} needs batch['{name}']; the batch has {', '.join(sorted(batch))}")
    return jnp.asarray(batch[name])


def predictions(metric: str, outputs: Outputs, batch: Batch, ignore: int | None = None) -> Predictions:
    """The predictions of a batch where it has labels.

    Raises:
      ValueError: logits or labels are missing or do not fit, labels are not integers, or one that counts, where its value is
        known, is beyond the classes.
    """
    logits, labels = class_logits(metric, outputs), entry_of(metric, batch, 'labels')
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f'{metric}: labels must be integer class indices, got {labels.dtype}')
    if labels.shape != logits.shape[:-1]:
        raise ValueError(f'{metric}: labels {labels.shape} must have the shape of the logits without classes, {logits.shape}')
    labels = labels.astype(jnp.int32)  # -100 does not fit all integers
    labelled = labels >= 0 if ignore is None else (labels >= 0) & (labels != ignore)
    kept, weights = counted(batch, labels.shape, labelled)
    labels = jnp.where(kept, labels, 0)
    classes = logits.shape[-1]
    highest = _known_maximum(labels)
    if highest >= classes:
        raise ValueError(
            f'{metric}: labels go up to {highest}, the logits have {classes} classes, counted from 0: give ignore={highest} if '
            'it stands for no label, or mask it'
        )
    logits, finite = finite_where(logits, kept)
    return Predictions(logits, jnp.minimum(labels, classes - 1), kept, weights, finite & (labels < classes))


def counted(batch: Batch, shape: tuple[int, ...], where: jax.Array | None = None) -> tuple[jax.Array, jax.Array | None]:
    """Which values of a shape count, by the batch and by `where`, and by how much; both of that shape."""
    kept, weights = counts(batch, shape), weights_of(batch, shape)
    kept = jnp.ones(shape, jnp.bool_) if kept is None else jnp.broadcast_to(kept, shape)
    return kept if where is None else kept & where, None if weights is None else jnp.broadcast_to(weights, shape)


def finite_where(logits: jax.Array, kept: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logits with zeros where a position does not count, and where the largest is a number: -inf only rules classes out."""
    logits = jnp.where(kept[..., None], logits, 0.0)
    return logits, jnp.isfinite(jnp.max(logits, axis=-1))


def _known_maximum(labels: jax.Array) -> int:
    """The largest label, or -1 if there is none or it is only known when the program runs."""
    try:
        return int(np.max(np.asarray(labels), initial=-1))
    except jax.errors.JAXTypeError:
        return -1


def class_numbers(logits: jax.Array) -> jax.Array:
    """The number of its class, for every logit."""
    return jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)


def label_logits(p: Predictions) -> jax.Array:
    """The logit of the label's class. A sum of which the rest is zero: no gather, so nothing moves between devices."""
    return jnp.sum(jnp.where(class_numbers(p.logits) == p.labels[..., None], p.logits, 0.0), axis=-1)
