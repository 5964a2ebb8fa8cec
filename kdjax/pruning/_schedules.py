"""Sparsity as a function of the step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def one_shot(sparsity: float, step: int) -> Callable[[Any], jax.Array]:
    """All at once: 0 before `step`, `sparsity` from then on.

    Args:
      sparsity: in [0, 1].
      step: the step at which pruning happens.

    Returns:
      A schedule: step -> sparsity, a float32 scalar.

    Raises:
      ValueError: `sparsity` lies outside [0, 1] or `step` is negative.

    >>> schedule = one_shot(0.8, step=10)
    >>> print(schedule(9), schedule(10))
    0.0 0.8
    """
    if not 0 <= sparsity <= 1:
        raise ValueError(f'one_shot: sparsity must be between 0 and 1, got {sparsity}')
    if step < 0:
        raise ValueError(f'one_shot: step must not be negative, got {step}')
    return lambda now: jnp.where(jnp.asarray(now, jnp.int32) >= step, sparsity, 0.0).astype(jnp.float32)


def iterative(final: float, *, rounds: int, every: int, begin: int = 0) -> Callable[[Any], jax.Array]:
    """Rounds of pruning, each of which prunes the same share of the weights that are left.

    s(t) = 1 - (1 - final)^(k / rounds) in round k = 1, 2, ..., `rounds`, which starts at step `begin` + (k - 1) · `every`; 0
    before, `final` from the last round on. With `rewinding` this is the search for lottery tickets.

    Args:
      final: sparsity after the last round, in [0, 1].
      rounds: number of rounds.
      every: steps of a round.
      begin: step at which the first round starts.

    Returns:
      A schedule: step -> sparsity, a float32 scalar.

    Raises:
      ValueError: `final` lies outside [0, 1], `rounds` or `every` is not positive, or `begin` is negative.

    >>> schedule = iterative(0.75, rounds=2, every=10, begin=10)
    >>> print(schedule(9), schedule(10), schedule(20))
    0.0 0.5 0.75

    Reference:
      Frankle, Carbin. The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks. 2019.
      https://arxiv.org/abs/1803.03635
    """
    if not 0 <= final <= 1:
        raise ValueError(f'iterative: final must be between 0 and 1, got {final}')
    if rounds < 1 or every < 1 or begin < 0:
        raise ValueError(f'iterative: need rounds >= 1, every >= 1 and begin >= 0, got {rounds}, {every} and {begin}')
    sparsities = [1 - (1 - final) ** (k / rounds) for k in range(rounds)] + [final]

    def schedule(step: Any) -> jax.Array:
        k = jnp.clip((jnp.asarray(step, jnp.int32) - begin) // every + 1, 0, rounds)
        return jnp.asarray(sparsities, jnp.float32)[k]

    return schedule


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
