"""Metrics of networks that predict numbers: their logits are compared with `batch['labels']`, floats of the same shape.

Those of a network with one output may leave out its axis. A mask and weights are those of positions [batch, ...], or have one
entry for every number. What is missing is masked: a label that is NaN and counts makes the metric NaN.
"""

import jax
import jax.numpy as jnp

from kdjax.batches import Batch
from kdjax.meshes import on_any_mesh
from kdjax.metrics._averages import Average, mean
from kdjax.metrics._classification import Metric
from kdjax.metrics._predictions import counted, entry_of, in_chunks, logits_of
from kdjax.networks import Outputs


def squared_error() -> Metric:
    """The mean of (prediction - label)², over all outputs of all positions.

    Raises:
      ValueError: from the metric: labels are missing, are not floating point, or do not have the shape of the predictions.

    >>> squared_error()(Outputs(jnp.array([[1.], [3.]])), {'labels': jnp.array([0., 0.])}).compute()
    5.0
    """

    @on_any_mesh
    @in_chunks
    def squared_error(outputs: Outputs, batch: Batch) -> Average:
        return _mean(jnp.square(_differences('squared_error', outputs, batch)), batch)

    return squared_error


def absolute_error() -> Metric:
    """The mean of |prediction - label|, over all outputs of all positions.

    Raises:
      ValueError: from the metric, as in `squared_error`.

    >>> absolute_error()(Outputs(jnp.array([[1.], [3.]])), {'labels': jnp.array([0., 0.])}).compute()
    2.0
    """

    @on_any_mesh
    @in_chunks
    def absolute_error(outputs: Outputs, batch: Batch) -> Average:
        return _mean(jnp.abs(_differences('absolute_error', outputs, batch)), batch)

    return absolute_error


def _differences(metric: str, outputs: Outputs, batch: Batch) -> jax.Array:
    predicted, labels = logits_of(metric, outputs), entry_of(metric, batch, 'labels')
    if labels.shape == predicted.shape[:-1] and predicted.shape[-1] == 1:
        labels = labels[..., None]
    if labels.shape != predicted.shape or not jnp.issubdtype(labels.dtype, jnp.floating):
        raise ValueError(
            f'{metric}: labels must be floating point, of the shape of the predictions {predicted.shape}, got {labels.dtype} '
            f'{labels.shape}'
        )
    return predicted - labels.astype(jnp.float32)


def _mean(values: jax.Array, batch: Batch) -> Average:
    return mean(values, *counted(batch, values.shape))
