"""Objectives on text that was sampled, of which only the labels' own log-probabilities count."""

from typing import Literal

import jax
import jax.numpy as jnp

from kdjax import losses, numerics
from kdjax.batches import Batch
from kdjax.metrics import Average
from kdjax.networks import Outputs, dense_logits
from kdjax.objectives._arguments import batch_mean, require_entry, require_logits
from kdjax.objectives._by_position import by_position
from kdjax.objectives._labels import class_labels, labels_check, nan_outside
from kdjax.objectives._objective import Objective, from_function, with_check
from kdjax.objectives._positions import zero_outside


def sampled_reverse_kl(*, estimator: Literal['k1', 'k2', 'k3'] = 'k3', ignore: int | None = None) -> Objective:
    """Schulman's estimators of the reverse divergence, `losses.sampled_reverse_kl` of the labels, which the student sampled.

    For batches that `generation.completions` has made. What a server returns of a teacher, log-probabilities of the tokens
    alone, goes to the loss itself.

    Args:
      estimator: `'k1'`, `'k2'` or `'k3'`; as a loss, `'k2'` has the gradient of the reverse divergence.
      ignore: a further label that stands for none.
    """
    name = 'sampled_reverse_kl'

    def loss(student: Outputs, teacher: Outputs, batch: Batch) -> Average:
        log_s, log_t, labels, kept = _of_labels(name, student, teacher, batch, ignore)
        values = losses.sampled_reverse_kl(log_s, log_t, estimator=estimator, where=kept)
        return batch_mean(nan_outside(values, labels, require_logits(name, 'student', student).shape[-1]), batch, kept)

    return with_check(by_position(from_function(name, loss)), labels_check(name, 'labels', ignore=ignore))


def policy_gradient(*, sampler: str | None = None, ignore: int | None = None) -> Objective:
    """MiniLLM's surrogate for the reverse divergence of sequences, `losses.policy_gradient` of the labels that were sampled.

    MiniLLM is `regimes.on_policy` with `over_positions(policy_gradient() + reverse_kl(), 'completion')`: this is the gradient
    of the tokens still to come, and `reverse_kl` that of the token itself. Its value means nothing. Logits are [batch, length,
    classes], and are all computed, also those of a linear head.

    Args:
      sampler: the entry of the batch with the log-probabilities [batch, length] of whatever sampled the labels; None if it was
        the student as it is.
      ignore: a further label that stands for none.
    """
    name = 'policy_gradient'

    def loss(student: Outputs, teacher: Outputs, batch: Batch) -> Average:
        if len(require_logits(name, 'student', student).shape) != 3:
            raise ValueError(f'{name} needs logits [batch, length, classes], got {student.logits.shape}')
        log_s, log_t, labels, kept = _of_labels(name, student, teacher, batch, ignore)
        found = None if sampler is None else zero_outside(kept, jnp.asarray(require_entry(name, batch, sampler)))
        values = losses.policy_gradient(log_s, log_t, sampler=found, where=kept)
        return batch_mean(nan_outside(values, labels, student.logits.shape[-1]), batch, kept)

    return with_check(from_function(name, loss), labels_check(name, 'labels', ignore=ignore))


def _of_labels(
    name: str, student: Outputs, teacher: Outputs, batch: Batch, ignore: int | None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Both networks' log-probabilities of the labels, the labels, and which of them count."""
    pair = [dense_logits(require_logits(name, side, x)) for side, x in (('student', student), ('teacher', teacher))]
    labels, kept = class_labels(name, batch, pair[0], ignore=ignore)
    if pair[0].shape != pair[1].shape:
        raise ValueError(f'{name}: student {pair[0].shape} and teacher {pair[1].shape} must have logits of one shape')
    chosen = jax.nn.one_hot(labels, pair[0].shape[-1], dtype=jnp.bool_)

    def of(logits: jax.Array) -> jax.Array:
        log_p = numerics.log_softmax(numerics.as_float32(name, zero_outside(kept[..., None], logits)))
        return jnp.sum(jnp.where(chosen, log_p, 0.0), axis=-1)

    return of(pair[0]), of(pair[1]), labels, kept
