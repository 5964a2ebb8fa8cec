"""TAID as in the paper: its target moves from the student to the teacher as fast as the student follows."""

from typing import Any

import jax
import jax.numpy as jnp

from kdjax import losses
from kdjax.batches import Batch
from kdjax.metrics import Average
from kdjax.networks import Outputs, sum_in_chunks
from kdjax.objectives._arguments import batch_mean, require_logits
from kdjax.objectives._labels import check_classes
from kdjax.objectives._logits import both_logits
from kdjax.objectives._objective import Objective, Term


def adaptive_taid(
    steps: int, *, begin: float = 0.4, end: float = 1.0, rate: float = 5e-4, momentum: float = 0.99, temperature: float = 1.0
) -> Objective:
    """TAID as in the paper: the teacher's share rises in a line over the run, and faster while the loss falls.

    With the loss L_n of a step, m_n = μ·m_(n-1) + (1 - μ)·(L_(n-1) - L_n) / L_(n-1), and the share is
    max(begin + (end - begin)·n / N, λ_(n-1) + rate · sigmoid(m_n) · (1 - n / N)), at most `end`. The loss of a step is that
    of the share before it. Share, momentum and last loss are the state; `losses.taid` is the loss.

    Args:
      steps: N, of the run.
      begin: the share at the start.
      end: the share at the end.
      rate: how much it may gain in a step.
      momentum: μ, of the relative fall of the loss.
      temperature: of both softmaxes.

    Raises:
      ValueError: an argument is out of range.

    Reference:
      Shing, Misaki, Bao, Yokoi, Akiba. TAID: Temporally Adaptive Interpolated Distillation for Efficient Knowledge Transfer in
      Language Models. 2025. https://arxiv.org/abs/2501.16937
    """
    if steps < 1 or not 0 <= begin <= end <= 1 or rate < 0 or not 0 <= momentum < 1:
        raise ValueError(
            'adaptive_taid: steps must be at least 1, 0 <= begin <= end <= 1, rate at least 0 and momentum from 0 to below 1, '
            f'got {steps}, {begin}, {end}, {rate} and {momentum}'
        )

    def init(key: jax.Array, student: Outputs, teacher: Outputs, batch: Batch) -> tuple[Any, Any]:
        del key, batch
        for side, outputs in (('student', student), ('teacher', teacher)):
            check_classes('taid', require_logits('taid', side, outputs))
        # Before the first step there is no loss that could have fallen.
        return {}, {'interpolation': jnp.float32(begin), 'momentum': jnp.float32(0), 'loss': jnp.float32(jnp.inf)}

    def apply(
        params: Any, state: Any, student: Outputs, teacher: Outputs, batch: Batch, *, step: jax.Array
    ) -> tuple[Average, dict[str, Average], Any]:
        del params
        share = state['interpolation']

        def loss(student: Outputs, teacher: Outputs, batch: Batch) -> Average:
            logits = both_logits('taid', student, teacher, batch)
            return batch_mean(losses.taid(*logits, interpolation=share, temperature=temperature), batch)

        found = sum_in_chunks(loss, (student, teacher), batch)
        total, count = jax.lax.stop_gradient((jnp.asarray(found.total), jnp.asarray(found.count)))
        value = jnp.where(count > 0, total / jnp.where(count > 0, count, 1.0), state['loss'])
        known = jnp.isfinite(state['loss']) & (state['loss'] > 0)
        fall = jnp.where(known, (jnp.where(known, state['loss'], 1.0) - value) / jnp.where(known, state['loss'], 1.0), 0.0)
        moved = jnp.where(known, momentum * state['momentum'] + (1 - momentum) * fall, state['momentum'])
        progress = jnp.clip((jnp.asarray(step, jnp.float32) + 1) / steps, 0.0, 1.0)
        gained = jnp.where(known, rate * jax.nn.sigmoid(moved) * (1 - progress), 0.0)
        line = begin + (end - begin) * progress
        new = {'interpolation': jnp.minimum(jnp.maximum(line, share + gained), end), 'momentum': moved, 'loss': value}
        return found, {'interpolation': Average(share, jnp.float32(1))}, new

    return Objective((Term('taid', init, apply),))
