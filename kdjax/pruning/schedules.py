"""Sparsity as a function of the step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def cubic(final: float, *, begin: int, end: int, initial: float = 0.0, every: int = 1) -> Callable[[Any], jax.Array]:
    """Sparsity that rises fast at first and slowly at the end, when few redundant weights are left.

    s(t) = final + (initial - final) · (1 - (t - begin) / (end - begin))³ from `begin` to `end`; 0 before, `final` after.

    Args:
      final: sparsity from step `end` on, in [0, 1].
      begin: step at which pruning starts, with `initial`.
      end: step at which `final` is reached, whatever `every`.
      initial: sparsity at `begin`.
      every: steps between two increases.

    Returns:
      A schedule: step -> sparsity, a float32 scalar.

    Raises:
      ValueError: `end` is not after `begin`, a sparsity lies outside [0, 1], it would fall, or `every` is not positive.

    >>> schedule = cubic(0.8, begin=0, end=100)
    >>> print(schedule(0), schedule(50), schedule(100))
    0.0 0.7 0.8

    Reference:
      Zhu, Gupta. To prune, or not to prune: exploring the efficacy of pruning for model compression. 2017.
      https://arxiv.org/abs/1710.01878
    """
    if not 0 <= initial <= final <= 1:
        raise ValueError(f'cubic: need 0 <= initial <= final <= 1, got initial {initial} and final {final}')
    if not 0 <= begin < end:
        raise ValueError(f'cubic: end must come after begin, got begin {begin} and end {end}')
    if every < 1:
        raise ValueError(f'cubic: every must be at least 1, got {every}')

    def schedule(step: Any) -> jax.Array:
        step = jnp.asarray(step, jnp.int32)
        since = (step - begin) // every * every
        progress = jnp.clip(since.astype(jnp.float32) / (end - begin), 0.0, 1.0)
        sparsity = jnp.where(step >= end, final, final + (initial - final) * (1.0 - progress) ** 3)
        return jnp.where(step < begin, 0.0, sparsity).astype(jnp.float32)

    return schedule
