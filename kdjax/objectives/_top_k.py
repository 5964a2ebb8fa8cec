"""Objectives with a teacher of whom only the largest logits were kept."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kdjax import losses
from kdjax.batches import Batch, rest_entry
from kdjax.networks import Outputs
from kdjax.objectives._arguments import require_entry, require_logits
from kdjax.objectives._by_position import by_position
from kdjax.objectives._objective import Objective, Weight, from_function
from kdjax.objectives._positions import logit_counts, zero_outside


def top_k_reverse_kl(*, temperature: float = 1.0) -> Objective:
    """Reverse divergence of a teacher of whom only the largest logits were kept: `losses.top_k_reverse_kl`.

    Needs no teacher network, but in the batch what `top_k_soft_targets` needs.

    Args:
      temperature: the one that `rest` was computed with; 1 for what an inference server returned, see
        `losses.top_k_from_log_probabilities`.
    """
    return _on_largest(losses.top_k_reverse_kl, temperature)


def top_k_jensen_shannon(*, beta: Weight = 0.5, temperature: float = 1.0) -> Objective:
    """GKD's divergence of a teacher of whom only the largest logits were kept: `losses.top_k_jensen_shannon`.

    Needs no teacher network, but in the batch what `top_k_soft_targets` needs.

    Args:
      beta: 0 is the forward, 1 the reverse divergence; a number or a schedule.
      temperature: the one that `rest` was computed with; 1 for what an inference server returned.
    """
    return _on_largest(losses.top_k_jensen_shannon, temperature, beta=beta)


def top_k_soft_targets(*, temperature: float = 4.0) -> Objective:
    """Soft targets of a teacher of whom only the largest logits were kept: `losses.top_k_soft_targets`.

    Needs no teacher network: `batch['top_logits']`, `batch['top_indices']` [batch, ..., k] and `batch['rest']` [batch, ...] are
    what `losses.top_k_logits` made of its logits, at the same temperature. Logits in half precision and indices of any integer
    type will do. Of a recording for several temperatures `batch['rest_at_4']` and the like is found by the temperature.

    Args:
      temperature: the one that `rest` was computed with.

    Raises:
      ValueError: where it is used, if the batch lacks these, or has what was recorded for other temperatures.
    """
    return _on_largest(losses.top_k_soft_targets, temperature)


def _on_largest(function: Callable[..., jax.Array], temperature: float, **hyperparameters: Any) -> Objective:
    name = function.__name__

    def loss(student: Outputs, teacher: Outputs, batch: Batch, **resolved: Any) -> jax.Array:
        del teacher
        top_logits, top_indices = (jnp.asarray(require_entry(name, batch, entry)) for entry in ('top_logits', 'top_indices'))
        rest = jnp.asarray(_rest(name, batch, temperature))
        logits = require_logits(name, 'student', student)
        where = logit_counts(batch, logits.shape)
        logits, top_logits, top_indices = (zero_outside(where, x) for x in (logits, top_logits, top_indices))
        rest = zero_outside(None if where is None else where[..., 0], rest)
        return function(logits, top_logits, top_indices, rest, temperature=temperature, **resolved)

    return by_position(from_function(name, loss, **hyperparameters))


def _rest(name: str, batch: Batch, temperature: float) -> Any:
    """The mass of the rest at a temperature."""
    recorded = sorted(entry for entry in batch if entry.startswith(rest_entry('')))
    if 'rest' in batch or not recorded:
        return require_entry(name, batch, 'rest')
    if rest_entry(temperature) not in batch:
        raise ValueError(
            f'{name}: the teacher was not recorded for temperature {temperature}; the batch has {", ".join(recorded)}'
        )
    return batch[rest_entry(temperature)]
