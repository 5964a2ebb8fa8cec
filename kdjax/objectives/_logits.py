"""Objectives on logits: the losses of logits and the labels' own cross-entropy."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from kdjax import losses
from kdjax.batches import Batch
from kdjax.metrics import Average
from kdjax.networks import Outputs, dense_logits
from kdjax.numerics import LOG_ZERO
from kdjax.objectives._arguments import batch_mean, require_logits
from kdjax.objectives._by_position import by_position
from kdjax.objectives._labels import check_classes, class_labels, labels_check, nan_outside
from kdjax.objectives._objective import Objective, Term, Weight, from_function, with_check
from kdjax.objectives._positions import counted_logits, logit_counts, zero_outside


def hard_labels(
    *, label_smoothing: Weight = 0.0, class_weights: ArrayLike | None = None, ignore: int | None = None
) -> Objective:
    """Cross-entropy with the labels, at temperature 1, over the examples that have one (labels that are not negative).

    A label beyond the classes is an error where its value is at hand, and makes the value NaN where it is traced.

    Args:
      label_smoothing: the share of the target that is spread evenly over all classes; a number or a schedule.
      class_weights: [classes], by how much examples of each class count; the mean divides by their sum, Σ w_y CE / Σ w_y, as
        torch's does. With smoothing an example's whole value has the weight of its label, where torch's code weighs the
        smoothed part by each class.
      ignore: a further label that stands for none, such as 255.
    """
    name = 'hard_labels'

    def cross_entropy(student: Outputs, teacher: Outputs, batch: Batch, *, label_smoothing: jax.Array) -> Average:
        del teacher
        logits = require_logits(name, 'student', student)
        labels, kept = class_labels(name, batch, logits, ignore=ignore)
        classes = logits.shape[-1]
        logits = zero_outside(kept[..., None], logits.astype(jnp.float32))
        smoothing = jnp.asarray(label_smoothing, jnp.float32)
        targets = (1 - smoothing) * jax.nn.one_hot(labels, classes) + smoothing / classes
        # A class at -inf is as in kdjax.losses: finite, also where it has a share of the target.
        logits = jnp.where(jnp.isneginf(logits), LOG_ZERO, logits)
        values = nan_outside(optax.losses.softmax_cross_entropy(logits, targets), labels, classes)
        return batch_mean(values, batch, kept, None if class_weights is None else _of_label(labels, classes))

    def _of_label(labels: jax.Array, classes: int) -> jax.Array:
        weights = jnp.asarray(class_weights, jnp.float32)
        if weights.shape != (classes,):
            raise ValueError(f'{name}: class_weights {weights.shape} must be ({classes},), one for each class')
        return jnp.take(weights, jnp.clip(labels, 0, classes - 1))

    objective = by_position(from_function(name, cross_entropy, label_smoothing=label_smoothing))
    return with_check(objective, labels_check(name, 'labels', ignore=ignore))


def soft_targets(*, temperature: Weight = 4.0) -> Objective:
    """KD, softened divergence from the teacher: `losses.soft_targets` of the logits.

    Hinton's recipe is `0.1 * hard_labels() + 0.9 * soft_targets()`.

    Args:
      temperature: a number or a schedule.
    """
    return _on_logits(losses.soft_targets, temperature=temperature)


def logit_mse() -> Objective:
    """The mean squared difference of the logits, `losses.logit_mse`."""

    def loss(student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        pair = require_logits('logit_mse', 'student', student), require_logits('logit_mse', 'teacher', teacher)
        return losses.logit_mse(*(counted_logits(batch, x) for x in pair))

    return by_position(from_function('logit_mse', loss))


def hard_targets() -> Objective:
    """DeiT's hard distillation, cross-entropy with the teacher's likeliest class: `losses.hard_targets` of the logits."""
    return _on_logits(losses.hard_targets)


def dist(*, beta: Weight = 1.0, gamma: Weight = 1.0, temperature: Weight = 1.0) -> Objective:
    """DIST, correlation of predictions within examples and within classes: `losses.dist` of the logits.

    A scalar: of the batch's weights it matters only which are 0.

    Args:
      beta: weight of the correlation of classes within an example; a number or a schedule.
      gamma: weight of the correlation of examples within a class; a number or a schedule.
      temperature: a number or a schedule.
    """

    def loss(student: Outputs, teacher: Outputs, batch: Batch, **hyperparameters: Any) -> jax.Array:
        logits = both_logits('dist', student, teacher, batch)
        return losses.dist(*logits, where=logit_counts(batch, logits[0].shape), **hyperparameters)

    return from_function('dist', loss, beta=beta, gamma=gamma, temperature=temperature)


def multi_level_logits(*, temperatures: Sequence[float] = (2.0, 3.0, 4.0, 5.0, 6.0)) -> Objective:
    """MLLD, predictions and their products between examples and between classes: `losses.multi_level_logits` of the logits.

    A scalar: of the batch's weights it matters only which are 0.

    Args:
      temperatures: one or more.
    """

    def loss(student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        logits = both_logits('multi_level_logits', student, teacher, batch)
        return losses.multi_level_logits(*logits, temperatures=temperatures, where=logit_counts(batch, logits[0].shape))

    return from_function('multi_level_logits', loss)


def standardize_logits(objective: Objective) -> Objective:
    """The same objective on standardized logits, `losses.standardize_logits` of student and teacher.

    The published recipe is `0.1 * hard_labels() + 9 * standardize_logits(soft_targets(temperature=2.0))`.

    Args:
      objective: an objective on logits.
    """

    def standardized(term: Term) -> Term:
        def apply(params: Any, state: Any, student: Outputs, teacher: Outputs, batch: Batch, *, step: jax.Array) -> Any:
            student, teacher = (
                Outputs(losses.standardize_logits(logits), outputs.features)
                for logits, outputs in zip(both_logits(term.name, student, teacher, batch), (student, teacher), strict=True)
            )
            return term.apply(params, state, student, teacher, batch, step=step)

        return term._replace(apply=apply)

    return Objective(tuple(standardized(term) for term in objective.terms))


def reverse_kl(*, temperature: Weight = 1.0) -> Objective:
    """MiniLLM's divergence, of the teacher from the student: `losses.reverse_kl` of the logits.

    Args:
      temperature: a number or a schedule.
    """
    return _on_logits(losses.reverse_kl, temperature=temperature)


def jensen_shannon(*, beta: Weight = 0.5, temperature: Weight = 1.0) -> Objective:
    """GKD's divergence, the generalised Jensen-Shannon divergence: `losses.jensen_shannon` of the logits.

    Args:
      beta: 0 is the forward, 1 the reverse divergence; a number or a schedule.
      temperature: a number or a schedule.
    """
    return _on_logits(losses.jensen_shannon, beta=beta, temperature=temperature)


def skewed_kl(*, alpha: Weight = 0.1, temperature: Weight = 1.0) -> Objective:
    """DistiLLM's divergence, of a mixture from the teacher: `losses.skewed_kl` of the logits.

    Args:
      alpha: the teacher's share of the mixture; a number or a schedule.
      temperature: a number or a schedule.
    """
    return _on_logits(losses.skewed_kl, alpha=alpha, temperature=temperature)


def skewed_reverse_kl(*, alpha: Weight = 0.1, temperature: Weight = 1.0) -> Objective:
    """DistiLLM's reverse divergence, of a mixture from the student: `losses.skewed_reverse_kl` of the logits.

    Args:
      alpha: the student's share of the mixture; a number or a schedule.
      temperature: a number or a schedule.
    """
    return _on_logits(losses.skewed_reverse_kl, alpha=alpha, temperature=temperature)


def total_variation(*, temperature: Weight = 1.0) -> Objective:
    """Total variation distance, as f-distill has it: `losses.total_variation` of the logits.

    Args:
      temperature: a number or a schedule.
    """
    return _on_logits(losses.total_variation, temperature=temperature)


def alpha_beta_divergence(*, alpha: Weight, beta: Weight, temperature: Weight = 1.0) -> Objective:
    """ABKD's divergence, a family between forward and reverse: `losses.alpha_beta_divergence` of the logits.

    Args:
      alpha: a number or a schedule.
      beta: a number or a schedule.
      temperature: a number or a schedule.
    """
    return _on_logits(losses.alpha_beta_divergence, alpha=alpha, beta=beta, temperature=temperature)


def adaptive_kl(*, mu: Weight = 0.5, temperature: Weight = 1.0) -> Objective:
    """AKL, forward and reverse divergence by the gaps of head and tail: `losses.adaptive_kl` of the logits.

    Args:
      mu: probability of the teacher's head; a number or a schedule.
      temperature: a number or a schedule.
    """
    return _on_logits(losses.adaptive_kl, mu=mu, temperature=temperature)


def taid(*, interpolation: Weight, temperature: Weight = 1.0) -> Objective:
    """TAID with a course of one's own: `losses.taid` of the logits; `adaptive_taid` has the paper's.

    Args:
      interpolation: the teacher's share of the target; a number or a schedule that rises.
      temperature: a number or a schedule.
    """
    return _on_logits(losses.taid, interpolation=interpolation, temperature=temperature)


def universal_logit(*, temperature: Weight = 1.0) -> Objective:
    """ULD, between networks over other classes: `losses.universal_logit` of the logits.

    Args:
      temperature: a number or a schedule.
    """
    return _on_logits(losses.universal_logit, temperature=temperature)


def decoupled_kd(*, alpha: Weight = 1.0, beta: Weight = 8.0, temperature: Weight = 4.0, ignore: int | None = None) -> Objective:
    """DKD, `losses.decoupled_kd`, over the examples that have a label (labels that are not negative).

    Args:
      alpha: weight of the labelled class against the rest; a number or a schedule.
      beta: weight of the rest among themselves; a number or a schedule.
      temperature: a number or a schedule.
      ignore: a further label that stands for none, such as 255.
    """
    return _on_labelled_logits(losses.decoupled_kd, ignore, alpha=alpha, beta=beta, temperature=temperature)


def normalized_kd(*, gamma: Weight = 1.5, temperature: Weight = 1.0, ignore: int | None = None) -> Objective:
    """NKD, `losses.normalized_kd`, over the examples that have a label.

    Args:
      gamma: weight of the classes other than the label; a number or a schedule.
      temperature: of those; a number or a schedule.
      ignore: a further label that stands for none, such as 255.
    """
    return _on_labelled_logits(losses.normalized_kd, ignore, gamma=gamma, temperature=temperature)


def weighted_soft_labels(*, temperature: Weight = 2.0, ignore: int | None = None) -> Objective:
    """WSLD, soft targets weighted by how far the student lags: `losses.weighted_soft_labels`, over the labelled examples.

    Args:
      temperature: a number or a schedule.
      ignore: a further label that stands for none, such as 255.
    """
    return _on_labelled_logits(losses.weighted_soft_labels, ignore, temperature=temperature)


def label_free_tuning(*, threshold: Weight = 0.2, temperature: Weight = 1.0, ignore: int | None = None) -> Objective:
    """MFT, soft targets corrected toward the label by a threshold, `losses.label_free_tuning`, over the labelled examples.

    It is all of the published loss; the teacher is the student before it was tuned.

    Args:
      threshold: by how much the label leads; a number or a schedule.
      temperature: a number or a schedule.
      ignore: a further label that stands for none, such as 255.
    """
    return _on_labelled_logits(losses.label_free_tuning, ignore, threshold=threshold, temperature=temperature)


def subset_soft_targets(classes: Sequence[int], *, temperature: Weight = 4.0) -> Objective:
    """UHC, soft targets of a teacher that knows only some of the student's classes: `losses.subset_soft_targets`.

    Args:
      classes: the student's index of each of the teacher's classes, in the teacher's order.
      temperature: a number or a schedule.
    """

    def loss(student: Outputs, teacher: Outputs, batch: Batch, **hyperparameters: Any) -> jax.Array:
        logits = both_logits('subset_soft_targets', student, teacher, batch)
        return losses.subset_soft_targets(*logits, np.asarray(classes, np.int32), **hyperparameters)

    return by_position(from_function('subset_soft_targets', loss, temperature=temperature))


def _on_labelled_logits(loss: Callable[..., jax.Array], ignore: int | None, **hyperparameters: Any) -> Objective:
    name = loss.__name__

    def function(student: Outputs, teacher: Outputs, batch: Batch, **resolved: Any) -> Average:
        logits = require_logits(name, 'student', student), require_logits(name, 'teacher', teacher)
        labels, kept = class_labels(name, batch, logits[0], ignore=ignore)
        pair = (zero_outside(kept[..., None], x) if x.shape[:-1] == kept.shape else x for x in logits)
        values = nan_outside(loss(*pair, labels, **resolved), labels, logits[0].shape[-1])
        return batch_mean(values, batch, kept)

    objective = by_position(from_function(name, function, **hyperparameters))
    return with_check(objective, labels_check(name, 'labels', ignore=ignore))


def _on_logits(loss: Callable[..., jax.Array], **hyperparameters: Any) -> Objective:
    name = loss.__name__

    def function(student: Outputs, teacher: Outputs, batch: Batch, **resolved: Any) -> jax.Array:
        return loss(*both_logits(name, student, teacher, batch), **resolved)

    return by_position(from_function(name, function, **hyperparameters))


def both_logits(term: str, student: Outputs, teacher: Outputs, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Both networks' logits over several classes, with zeros where they do not count."""
    pair = [dense_logits(require_logits(term, *side)) for side in (('student', student), ('teacher', teacher))]
    for logits in pair:
        check_classes(term, logits)
    return counted_logits(batch, pair[0]), counted_logits(batch, pair[1])
