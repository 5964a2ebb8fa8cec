"""Metrics of networks with a yes or no for every class: logits [batch, ..., classes] of independent sigmoids.

Labels have the shape of the logits, and those of a single logit may leave out its axis: booleans, or numbers that are 1, 0, or
negative where it is not known. A mask and weights are those of positions [batch, ...], or have one entry for every label.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.batches import Batch
from kdjax.meshes import on_any_mesh
from kdjax.metrics._averages import Average, mean
from kdjax.metrics._classification import Metric
from kdjax.metrics._predictions import counted, entry_of, in_chunks, logits_of
from kdjax.networks import Outputs


def binary_accuracy(*, threshold: float = 0.5) -> Metric:
    """The share of all labels that are on the right side: 1 where sigmoid(z) > threshold, 0 elsewhere.

    Args:
      threshold: a probability, between 0 and 1.

    Raises:
      ValueError: the threshold is not between 0 and 1, or, from the metric, labels are missing, do not fit or are no labels.

    >>> outputs = Outputs(jnp.array([[2., -1., 3.]]))
    >>> binary_accuracy()(outputs, {'labels': jnp.array([[1, 1, -1]])}).compute()
    0.5
    """
    if not 0 < threshold < 1:
        raise ValueError(f'binary_accuracy: threshold must be between 0 and 1, got {threshold}')
    border = math.log(threshold) - math.log1p(-threshold)

    @on_any_mesh
    @in_chunks
    def binary_accuracy(outputs: Outputs, batch: Batch) -> Average:
        logits, labels, known, valid = _sigmoids('binary_accuracy', outputs, batch)
        kept, weights = counted(batch, logits.shape, known)
        right = ((logits > border) == (labels == 1)).astype(jnp.float32)
        return mean(jnp.where(valid, right, jnp.nan), kept, weights)

    return binary_accuracy


def label_ranking_average_precision() -> Metric:
    """How far the true labels of a position rank above the false ones: 1 where all do; mean over positions with a true label.

    LRAP = 1 / |Y| Σ_{c in Y} |{d in Y: z_d >= z_c}| / |{d: z_d >= z_c}|, with Y the true labels of a position.

    Raises:
      ValueError: from the metric: labels are missing, do not fit or are no labels.

    >>> outputs = Outputs(jnp.array([[3., 2., 1.]]))
    >>> label_ranking_average_precision()(outputs, {'labels': jnp.array([[1, 0, 1]])}).compute()
    0.8333

    Reference:
      Tsoumakas, Katakis, Vlahavas. Mining Multi-label Data. 2010. https://doi.org/10.1007/978-0-387-09823-4_34
    """

    @on_any_mesh
    @in_chunks
    def label_ranking_average_precision(outputs: Outputs, batch: Batch) -> Average:
        logits, labels, known, valid = _sigmoids('label_ranking_average_precision', outputs, batch)
        true = known & (labels == 1)
        kept, weights = counted(batch, logits.shape[:-1], jnp.any(true, axis=-1))
        # [..., c, d]: whether d ranks at least as high as c.
        above = (logits[..., None, :] >= logits[..., None]) & known[..., None, :]
        precision = jnp.sum(above & true[..., None, :], axis=-1) / jnp.maximum(jnp.sum(above, axis=-1), 1)
        values = jnp.sum(precision, axis=-1, where=true) / jnp.maximum(jnp.sum(true, axis=-1, dtype=jnp.float32), 1.0)
        return mean(jnp.where(jnp.all(valid | ~known, axis=-1), values, jnp.nan), kept, weights)

    return label_ranking_average_precision


def _sigmoids(metric: str, outputs: Outputs, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Logits, labels, which of them are known, and which are valid, all of one shape."""
    logits, labels = logits_of(metric, outputs), entry_of(metric, batch, 'labels')
    if labels.shape == logits.shape[:-1] and logits.shape[-1] == 1:
        labels = labels[..., None]
    if labels.shape != logits.shape or jnp.issubdtype(labels.dtype, jnp.complexfloating):
        raise ValueError(f'{metric}: labels {labels.dtype} {labels.shape} must be 1 or 0 for each logit of {logits.shape}')
    labels = labels.astype(jnp.float32)
    known = ~(labels < 0)
    right = (labels == 0) | (labels == 1)
    wrong = _first(labels, known & ~right & counted(batch, labels.shape)[0])
    if wrong is not None:
        raise ValueError(f'{metric}: labels must be 1, 0, or negative where they are not known, got {wrong:g}')
    return logits, labels, known, right & (logits < jnp.inf)


def _first(values: jax.Array, where: jax.Array) -> float | None:
    """The first value for which `where` is true; None if there is none, or it is only known when the program runs."""
    try:
        found = np.asarray(values)[np.asarray(where)]
    except jax.errors.JAXTypeError:
        return None
    return float(found[0]) if found.size else None
