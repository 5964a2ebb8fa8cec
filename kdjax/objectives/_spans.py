"""Objectives between networks with other tokens, over spans of text at whose ends both have one.

`data.align_tokens` makes the spans, and `networks.preprocess` picks the tokens of each network from inputs that have both.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import losses, numerics
from kdjax.batches import Batch, counts, weights_of
from kdjax.metrics import Average
from kdjax.networks import Outputs
from kdjax.objectives._arguments import batch_mean, require_entry, require_logits
from kdjax.objectives._labels import check_classes, raise_where
from kdjax.objectives._objective import Check, Objective, Weight, from_function, with_check
from kdjax.objectives._positions import zero_outside


class _Side(NamedTuple):
    """A network's logits, what they predict, and the spans of that; zeros and -1 outside of spans that count."""

    logits: jax.Array
    labels: jax.Array
    spans: jax.Array


def span_universal_logit(*, temperature: Weight = 1.0) -> Objective:
    """GOLD's form of ULD, between networks over other tokens: `losses.span_universal_logit`, the mean over spans.

    The batch has `'labels'` [batch, length], which the student's logits predict, `'teacher_labels'` [batch, other length], and
    the spans of both, `'student_spans'` and `'teacher_spans'`, as `data.align_tokens` makes them. Mask and weights are those of
    the student's tokens: a span counts where all of its tokens do, by the largest of their weights, and where no label of it is
    negative. All logits are computed, also those of a linear head.

    Args:
      temperature: a number or a schedule.
    """
    name = 'span_universal_logit'

    def loss(student: Outputs, teacher: Outputs, batch: Batch, *, temperature: jax.Array) -> Average:
        one, other, there, weights = _spans(name, student, teacher, batch)
        entries = [x for pair in zip(one, other, strict=True) for x in pair]
        return batch_mean(losses.span_universal_logit(*entries, temperature=temperature), {}, there, weights)

    return with_check(from_function(name, loss, temperature=temperature), _check(name))


def approximate_likelihood_matching(*, temperature: Weight = 1.0) -> Objective:
    """ALM, between networks over other tokens: `losses.approximate_likelihood_matching` of the text, the mean over spans.

    Needs in the batch what `span_universal_logit` needs.

    Args:
      temperature: of the probabilities of spans, often 100; a number or a schedule.
    """
    name = 'approximate_likelihood_matching'

    def loss(student: Outputs, teacher: Outputs, batch: Batch, *, temperature: jax.Array) -> Average:
        one, other, there, weights = _spans(name, student, teacher, batch)
        pair = [losses.span_log_probabilities(_of_labels(name, x), x.spans, there.shape[1]) for x in (one, other)]
        values = losses.approximate_likelihood_matching(*pair, temperature=temperature, where=there)
        return batch_mean(values, {}, there, weights)

    return with_check(from_function(name, loss, temperature=temperature), _check(name))


def _spans(name: str, student: Outputs, teacher: Outputs, batch: Batch) -> tuple[_Side, _Side, jax.Array, jax.Array | None]:
    """Both sides, which spans [batch, spans] count, and their weights."""
    sides = [_side(name, side, outputs, batch) for side, outputs in (('student', student), ('teacher', teacher))]
    number = min(side.spans.shape[1] for side in sides)
    there = jnp.ones((len(sides[0].spans), number), jnp.bool_)
    for side, counted in zip(sides, (counts(batch, sides[0].spans.shape), None), strict=True):
        kept = side.labels >= 0 if counted is None else (side.labels >= 0) & counted
        there &= (_most(kept, side.spans, number) > 0) & (_most(~kept, side.spans, number) == 0)
    found = weights_of(batch, sides[0].spans.shape)
    weights = None if found is None else _most(jnp.broadcast_to(found, sides[0].spans.shape), sides[0].spans, number)
    one, other = (_inside(side, there) for side in sides)
    return one, other, there, weights


def _side(name: str, side: str, outputs: Outputs, batch: Batch) -> _Side:
    """As the batch has it."""
    logits = require_logits(name, side, outputs)
    check_classes(name, logits)
    entries = ('labels' if side == 'student' else 'teacher_labels', f'{side}_spans')
    labels, spans = (require_entry(name, batch, entry) for entry in entries)
    for entry, x in zip(entries, (labels, spans), strict=True):
        if len(logits.shape) != 3 or x.shape != logits.shape[:2] or not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(
                f"{name}: batch['{entry}'] must be integers [batch, length] as the {side}'s logits [batch, length, classes], "
                f'got {x.dtype} {x.shape} and {logits.shape}'
            )
    return _Side(logits, labels, spans)


def _inside(side: _Side, there: jax.Array) -> _Side:
    """With zeros, -1 and -1 outside of the spans that count."""
    number = there.shape[1]
    spans = jnp.asarray(side.spans).astype(jnp.int32)
    inside = (spans >= 0) & (spans < number)
    inside &= jnp.take_along_axis(there, jnp.clip(spans, 0, number - 1), axis=1)
    labels = jnp.where(inside, jnp.asarray(side.labels).astype(jnp.int32), -1)
    return _Side(zero_outside(inside[..., None], side.logits), labels, jnp.where(inside, spans, -1))


def _most(x: jax.Array, spans: Any, number: int) -> jax.Array:
    """The largest of values [batch, length], none of them negative, over the tokens of each span, [batch, spans]."""
    spans = jnp.asarray(spans).astype(jnp.int32)
    columns = jnp.where((spans >= 0) & (spans < number), spans, number)
    rows = jnp.arange(len(spans), dtype=jnp.int32)[:, None]
    return jnp.zeros((len(spans), number), jnp.float32).at[rows, columns].max(x.astype(jnp.float32), mode='drop')


def _of_labels(name: str, side: _Side) -> jax.Array:
    """Log-probabilities of the labels; NaN where one is beyond the classes."""
    log_p = numerics.log_softmax(numerics.as_float32(name, side.logits))
    chosen = jnp.take_along_axis(log_p, jnp.clip(side.labels, 0, log_p.shape[-1] - 1)[..., None], axis=-1)[..., 0]
    return jnp.where(side.labels < log_p.shape[-1], chosen, jnp.nan)


def _check(name: str) -> Check:
    """Raises where a label of a span, of values at hand, is beyond the classes."""

    def check(student: Outputs, teacher: Outputs, batch: Batch) -> None:
        for side, outputs in (('student', student), ('teacher', teacher)):
            logits = require_logits(name, side, outputs)
            entry = 'labels' if side == 'student' else 'teacher_labels'
            labels, spans = (np.asarray(require_entry(name, batch, key)) for key in (entry, f'{side}_spans'))
            # The outputs are those of one batch, and the labels may be of all the data.
            _side(name, side, Outputs(jax.ShapeDtypeStruct((len(labels), *logits.shape[1:]), logits.dtype)), batch)
            number = min(np.shape(batch['student_spans'])[1], np.shape(batch['teacher_spans'])[1])
            wrong = (spans >= 0) & (spans < number) & (labels >= logits.shape[-1])
            raise_where(wrong, labels, f"{name}: batch['{entry}'] must be below {logits.shape[-1]} in a span")

    return check
