"""Objectives on logits: the losses of `kdjax.losses.logits` and the labels' own cross-entropy."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kdjax import losses
from kdjax.batches import Batch
from kdjax.losses.numerics import LOG_ZERO
from kdjax.metrics import Mean
from kdjax.networks import Outputs
from kdjax.objectives.objective import (
    Objective,
    Weight,
    batch_mean,
    from_function,
    require_labels,
    require_logits,
)


def hard_labels(*, label_smoothing: Weight = 0.0) -> Objective:
    """Cross-entropy with the labels, at temperature 1, over the examples that have one (labels that are not negative).

    Args:
      label_smoothing: the share of the target that is spread evenly over all classes; a number or a schedule.
    """

    def cross_entropy(student: Outputs, teacher: Outputs, batch: Batch, *, label_smoothing: jax.Array) -> Mean:
        del teacher
        logits = require_logits('hard_labels', 'student', student).astype(jnp.float32)
        labels = require_labels('hard_labels', batch)
        if labels.shape != logits.shape[:-1]:
            raise ValueError(f'hard_labels: labels {labels.shape} do not fit logits {logits.shape}')
        smoothing = jnp.asarray(label_smoothing, jnp.float32)
        targets = (1 - smoothing) * jax.nn.one_hot(labels, logits.shape[-1]) + smoothing / logits.shape[-1]
        # A class at -inf is as in kdjax.losses: finite, also where it has a share of the target.
        logits = jnp.where(jnp.isneginf(logits), LOG_ZERO, logits)
        return batch_mean(optax.losses.softmax_cross_entropy(logits, targets), batch, labels >= 0)

    return from_function('hard_labels', cross_entropy, label_smoothing=label_smoothing)


def soft_targets(*, temperature: Weight = 4.0) -> Objective:
    """Softened divergence from the teacher: `losses.soft_targets` of the logits.

    Hinton's recipe is `0.1 * hard_labels() + 0.9 * soft_targets()`.

    Args:
      temperature: a number or a schedule.
    """
    return _on_logits(losses.soft_targets, temperature=temperature)


def logit_mse() -> Objective:
    """The mean squared difference of the logits, `losses.logit_mse`."""
    return _on_logits(losses.logit_mse)


def reverse_kl(*, temperature: Weight = 1.0) -> Objective:
    """Divergence of the teacher from the student: `losses.reverse_kl` of the logits.

    Args:
      temperature: a number or a schedule.
    """
    return _on_logits(losses.reverse_kl, temperature=temperature)


def jensen_shannon(*, beta: Weight = 0.5, temperature: Weight = 1.0) -> Objective:
    """Generalised Jensen-Shannon divergence: `losses.jensen_shannon` of the logits.

    Args:
      beta: 0 is the forward, 1 the reverse divergence; a number or a schedule.
      temperature: a number or a schedule.
    """
    return _on_logits(losses.jensen_shannon, beta=beta, temperature=temperature)


def skewed_kl(*, alpha: Weight = 0.1, temperature: Weight = 1.0) -> Objective:
    """Divergence of a mixture from the teacher: `losses.skewed_kl` of the logits.

    Args:
      alpha: the teacher's share of the mixture; a number or a schedule.
      temperature: a number or a schedule.
    """
    return _on_logits(losses.skewed_kl, alpha=alpha, temperature=temperature)


def decoupled_kd(*, alpha: Weight = 1.0, beta: Weight = 8.0, temperature: Weight = 4.0) -> Objective:
    """Decoupled distillation, `losses.decoupled_kd`, over the examples that have a label (labels that are not negative).

    Args:
      alpha: weight of the labelled class against the rest; a number or a schedule.
      beta: weight of the rest among themselves; a number or a schedule.
      temperature: a number or a schedule.
    """

    def loss(student: Outputs, teacher: Outputs, batch: Batch, **hyperparameters: Any) -> Mean:
        labels = require_labels('decoupled_kd', batch)
        values = losses.decoupled_kd(*_logits('decoupled_kd', student, teacher), labels, **hyperparameters)
        return batch_mean(values, batch, labels >= 0)

    return from_function('decoupled_kd', loss, alpha=alpha, beta=beta, temperature=temperature)


def _on_logits(loss: Callable[..., jax.Array], **hyperparameters: Any) -> Objective:
    name = loss.__name__
    return from_function(
        name, lambda student, teacher, batch, **resolved: loss(*_logits(name, student, teacher), **resolved), **hyperparameters
    )


def _logits(term: str, student: Outputs, teacher: Outputs) -> tuple[jax.Array, jax.Array]:
    return require_logits(term, 'student', student), require_logits(term, 'teacher', teacher)
