"""Metrics of how often which class is taken for which: those of segmentation, and of classes that are not equally frequent."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kdjax.batches import Batch
from kdjax.meshes import on_any_mesh
from kdjax.metrics._averages import Average
from kdjax.metrics._classification import Metric
from kdjax.metrics._predictions import in_chunks, predictions
from kdjax.networks import Outputs


class ConfusionMatrix(NamedTuple):
    """How often a label, by row, was predicted as a class, by column: [classes, classes]."""

    counts: ArrayLike

    def compute(self) -> np.ndarray:
        """The counts in float64, sums of weights where there are weights."""
        return np.asarray(self.counts, np.float64)


def confusion_matrix(*, ignore: int | None = None) -> Callable[[Outputs, Batch], ConfusionMatrix]:
    """Counts how often each label (row) was predicted as each class (column), that of the largest logit.

    What is computed is an array, which logs of single numbers leave out.

    Args:
      ignore: a label, beside the negative ones, that stands for none.

    Raises:
      ValueError: from the metric, as in `accuracy`.

    >>> outputs = Outputs(jnp.array([[2., 1.], [0., 3.], [0., 3.]]))
    >>> confusion_matrix()(outputs, {'labels': jnp.array([0, 0, 1])}).compute()
    array([[1., 1.],
           [0., 1.]])
    """

    @on_any_mesh
    @in_chunks
    def confusion_matrix(outputs: Outputs, batch: Batch) -> ConfusionMatrix:
        p = predictions('confusion_matrix', outputs, batch, ignore)
        classes = p.logits.shape[-1]
        cell = p.labels * classes + jnp.argmax(p.logits, axis=-1)
        return ConfusionMatrix(p.add_up(jnp.ones_like(cell), cell, classes**2).reshape(classes, classes))

    return confusion_matrix


class IntersectionOverUnion(NamedTuple):
    """For every class, [classes], the positions that have it as label and prediction, and those that have it as either."""

    intersection: ArrayLike
    union: ArrayLike

    def compute(self) -> float:
        """The mean over the classes that occur; NaN where none does. `Average(*self).compute()` has one for each class."""
        ratios = np.asarray(Average(*self).compute())
        occurs = np.asarray(self.union) != 0
        return float(ratios[occurs].mean()) if occurs.any() else float('nan')


def intersection_over_union(*, ignore: int | None = None) -> Metric:
    """Intersection over union, or Jaccard index, of labels and predictions: mean over classes of |both| / |either|.

    The sets are of all positions of the data set; classes that are neither a label nor predicted anywhere are left out.

    Args:
      ignore: a label, beside the negative ones, that stands for none; predictions there do not count either.

    Raises:
      ValueError: from the metric, as in `accuracy`.

    >>> outputs = Outputs(jnp.array([[2., 1., 0.], [0., 3., 0.], [0., 3., 0.]]))
    >>> intersection_over_union()(outputs, {'labels': jnp.array([0, 0, 1])}).compute()
    0.5

    Reference:
      Everingham et al. The Pascal Visual Object Classes Challenge: A Retrospective. 2015.
      https://doi.org/10.1007/s11263-014-0733-5
    """

    @on_any_mesh
    def intersection_over_union(outputs: Outputs, batch: Batch) -> IntersectionOverUnion:
        counts = matrix(outputs, batch).counts
        both = jnp.diagonal(counts)
        return IntersectionOverUnion(both, jnp.sum(counts, axis=0) + jnp.sum(counts, axis=1) - both)

    matrix = confusion_matrix(ignore=ignore)
    return intersection_over_union
