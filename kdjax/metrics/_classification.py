"""Metrics of networks that choose one class for each position: an image, a token, a pixel, a task.

Each function here makes a metric, `metric(outputs, batch) -> sums`, for `training.evaluator` or for a step of one's own. What
does not count, by `batch['mask']`, `batch['weights']` and the labels (negative, or equal to `ignore`), may be anything. A label
beyond the classes is an error where its value is at hand and makes the metric NaN in a traced function; logits that are NaN or
inf make it NaN too.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kdjax.batches import Batch
from kdjax.meshes import on_any_mesh
from kdjax.metrics._averages import Average, Sums
from kdjax.metrics._predictions import (
    Predictions,
    class_logits,
    class_numbers,
    counted,
    entry_of,
    finite_where,
    in_chunks,
    label_logits,
    predictions,
)
from kdjax.networks import Outputs

Metric = Callable[[Outputs, Batch], Sums]
"""`metric(outputs, batch) -> sums`: a function of a network's outputs [batch, ...] and the batch that they are of."""


def accuracy(*, ignore: int | None = None) -> Metric:
    """The share of labels whose class has the largest logit; of equal logits, the first counts as the largest.

    Args:
      ignore: a label, beside the negative ones, that stands for none, such as 255.

    Raises:
      ValueError: from the metric: no logits of two classes or more, or labels that are missing, are not integers or do not fit.

    >>> outputs = Outputs(jnp.array([[2., 1.], [0., 3.], [1., 0.]]))
    >>> accuracy()(outputs, {'labels': jnp.array([0, 0, -1])}).compute()
    0.5
    """

    @on_any_mesh
    @in_chunks
    def accuracy(outputs: Outputs, batch: Batch) -> Average:
        p = predictions('accuracy', outputs, batch, ignore)
        return p.mean(jnp.argmax(p.logits, axis=-1) == p.labels)

    return accuracy


def top_k_accuracy(k: int, *, ignore: int | None = None) -> Metric:
    """The share of labels whose class is among the `k` largest logits; of equal logits, earlier ones count as larger.

    Args:
      k: at least 1; with 1 it is `accuracy`.
      ignore: a label, beside the negative ones, that stands for none.

    Raises:
      ValueError: `k` is less than 1, or, from the metric, there are fewer classes, or as in `accuracy`.

    >>> outputs = Outputs(jnp.array([[3., 2., 1.], [3., 2., 1.]]))
    >>> top_k_accuracy(2)(outputs, {'labels': jnp.array([1, 2])}).compute()
    0.5
    """
    if k < 1:
        raise ValueError(f'top_k_accuracy: k must be at least 1, got {k}')
    name = f'top_{k}_accuracy'

    @on_any_mesh
    @in_chunks
    def metric(outputs: Outputs, batch: Batch) -> Average:
        p = predictions(name, outputs, batch, ignore)
        classes = p.logits.shape[-1]
        if k > classes:
            raise ValueError(f'{name}: the logits have {classes} classes')
        own, number = label_logits(p)[..., None], class_numbers(p.logits)
        ahead = (p.logits > own) | ((p.logits == own) & (number < p.labels[..., None]))
        return p.mean(jnp.sum(ahead, axis=-1) < k)

    metric.__name__ = name
    return metric


class CalibrationError(NamedTuple):
    """Σ_bins |gap| / count, of the sums in each bin of what is correct less the confidence in it."""

    gaps: ArrayLike
    count: ArrayLike

    def compute(self) -> float:
        """The error; NaN where nothing was counted."""
        return float(Average(np.abs(np.asarray(self.gaps, np.float64)).sum(), self.count).compute())


def calibration_error(*, bins: int = 15, ignore: int | None = None) -> Metric:
    """The expected calibration error, Σ_bins |accuracy - confidence| · share, over equally wide bins of the confidence.

    Args:
      bins: how many; bin i has the confidences from i / bins, not included, to (i + 1) / bins.
      ignore: a label, beside the negative ones, that stands for none.

    Raises:
      ValueError: `bins` is less than 1, or, from the metric, as in `accuracy`.

    >>> outputs = Outputs(jnp.log(jnp.array([[0.75, 0.25], [0.75, 0.25]])))
    >>> round(calibration_error()(outputs, {'labels': jnp.array([0, 0])}).compute(), 3)
    0.25

    Reference:
      Guo, Pleiss, Sun, Weinberger. On Calibration of Modern Neural Networks. 2017. https://arxiv.org/abs/1706.04599
    """
    if bins < 1:
        raise ValueError(f'calibration_error: bins must be at least 1, got {bins}')

    @on_any_mesh
    @in_chunks
    def calibration_error(outputs: Outputs, batch: Batch) -> CalibrationError:
        p = predictions('calibration_error', outputs, batch, ignore)
        correct = (jnp.argmax(p.logits, axis=-1) == p.labels).astype(jnp.float32)
        confidence = jnp.max(jax.nn.softmax(p.logits, axis=-1), axis=-1)
        bin_of = jnp.clip(jnp.ceil(confidence * bins).astype(jnp.int32) - 1, 0, bins - 1)
        # A sum for each bin, not a scatter, which would add millions of pixels to one float one by one.
        inside = bin_of[..., None] == jax.lax.broadcasted_iota(jnp.int32, (*bin_of.shape, bins), bin_of.ndim)
        gaps = jax.vmap(p.mean, in_axes=-1)(jnp.where(inside, (correct - confidence)[..., None], 0.0))
        return CalibrationError(gaps.total, p.mean(correct).count)

    return calibration_error


def agreement() -> Metric:
    """The share of positions where the network's largest logit is that of `batch['teacher_logits']`, with labels or without.

    These are what the evaluator's teacher computes, or what `training.record_teacher` has recorded.

    Raises:
      ValueError: from the metric: no logits of two classes or more, or the teacher's have another shape.

    Reference:
      Stanton, Izmailov, Kirichenko, Alemi, Wilson. Does Knowledge Distillation Really Work? 2021.
      https://arxiv.org/abs/2106.05945

    >>> outputs = Outputs(jnp.array([[2., 1.], [0., 3.]]))
    >>> agreement()(outputs, {'teacher_logits': jnp.array([[5., 1.], [5., 1.]])}).compute()
    0.5
    """

    @on_any_mesh
    @in_chunks
    def agreement(outputs: Outputs, batch: Batch) -> Average:
        logits = class_logits('agreement', outputs)
        teacher = entry_of('agreement', batch, 'teacher_logits').astype(jnp.float32)
        if teacher.shape != logits.shape:
            raise ValueError(
                f"agreement: batch['teacher_logits'] {teacher.shape} must have the shape of the logits, {logits.shape}"
            )
        kept, weights = counted(batch, logits.shape[:-1])
        (logits, valid), (teacher, valid_too) = finite_where(logits, kept), finite_where(teacher, kept)
        p = Predictions(logits, jnp.argmax(teacher, axis=-1), kept, weights, valid & valid_too)
        return p.mean(jnp.argmax(logits, axis=-1) == p.labels)

    return agreement
