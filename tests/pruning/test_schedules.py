"""Schedules are their formulas at every step, and never fall."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import pruning


def zhu_gupta(step: int, final: float, begin: int, end: int, initial: float, every: int) -> float:
    if step < begin:
        return 0.0
    if step >= end:
        return final
    since = (step - begin) // every * every
    return final + (initial - final) * (1 - since / (end - begin)) ** 3


@pytest.mark.parametrize(
    'final, begin, end, initial, every',
    [
        (0.9, 0, 100, 0.0, 1),
        (0.8, 10, 30, 0.0, 1),
        (0.95, 5, 47, 0.25, 10),
        (0.5, 3, 4, 0.5, 1),
        (1.0, 2, 50, 0.0, 100),
        (0.0, 0, 9, 0.0, 1),
    ],
)
def test_cubic_is_the_formula_at_every_step(final: float, begin: int, end: int, initial: float, every: int) -> None:
    schedule = pruning.cubic(final, begin=begin, end=end, initial=initial, every=every)
    steps = np.arange(end + 20)
    got = jax.jit(jax.vmap(schedule))(steps)
    assert got.dtype == jnp.float32
    wanted = [zhu_gupta(int(step), final, begin, end, initial, every) for step in steps]
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)
    assert np.all(got[:begin] == 0)
    assert np.all(got[end:] == np.float32(final))
    assert np.all(np.diff(got) >= 0)
    assert got.max() <= np.float32(final)


def test_cubic_rises_only_every_so_many_steps_and_at_the_end() -> None:
    got = np.asarray(jax.vmap(pruning.cubic(0.9, begin=4, end=26, initial=0.1, every=6))(np.arange(40)))
    assert (np.flatnonzero(np.diff(got)) + 1).tolist() == [4, 10, 16, 22, 26]


@pytest.mark.parametrize(
    'step', [7, np.int64(7), np.int32(7), np.array(7), jnp.int32(7), jnp.uint32(7)], ids=lambda s: type(s).__name__
)
def test_cubic_takes_any_integer_step(step) -> None:
    np.testing.assert_allclose(pruning.cubic(0.8, begin=0, end=14)(step), 0.7, rtol=1e-6)


@pytest.mark.parametrize(
    'options, message',
    [
        ({'final': 1.1, 'begin': 0, 'end': 1}, 'need 0 <= initial <= final <= 1, got initial 0.0 and final 1.1'),
        ({'final': 0.5, 'begin': 0, 'end': 1, 'initial': 0.6}, 'need 0 <= initial <= final <= 1'),
        ({'final': 0.5, 'begin': 0, 'end': 1, 'initial': -0.1}, 'need 0 <= initial <= final <= 1'),
        ({'final': float('nan'), 'begin': 0, 'end': 1}, 'need 0 <= initial <= final <= 1'),
        ({'final': 0.5, 'begin': 5, 'end': 5}, 'end must come after begin, got begin 5 and end 5'),
        ({'final': 0.5, 'begin': -1, 'end': 5}, 'end must come after begin'),
        ({'final': 0.5, 'begin': 0, 'end': 5, 'every': 0}, 'every must be at least 1, got 0'),
    ],
)
def test_cubic_rejects_what_cannot_be_scheduled(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pruning.cubic(**options)


@pytest.mark.parametrize('final, rounds, every, begin', [(0.9, 4, 5, 3), (0.36, 2, 1, 0), (1.0, 3, 4, 0), (0.0, 2, 3, 1)])
def test_iterative_prunes_the_same_share_of_what_is_left_in_every_round(
    final: float, rounds: int, every: int, begin: int
) -> None:
    got = jax.jit(jax.vmap(pruning.iterative(final, rounds=rounds, every=every, begin=begin)))(np.arange(30))
    assert got.dtype == jnp.float32
    done = [sum(step >= begin + k * every for k in range(rounds)) for step in range(30)]
    wanted = [0.0 if k == 0 else 1 - (1 - final) ** (k / rounds) for k in done]
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
    assert np.all(np.diff(got) >= 0)
    assert got[-1] == np.float32(final)


def test_iterative_by_hand() -> None:
    """Half of the weights stay in every round."""
    got = jax.vmap(pruning.iterative(0.875, rounds=3, every=2, begin=2))(np.arange(8))
    np.testing.assert_array_equal(got, [0, 0, 0.5, 0.5, 0.75, 0.75, 0.875, 0.875])


@pytest.mark.parametrize('step', [0, 4])
def test_one_shot_is_a_step(step: int) -> None:
    got = jax.jit(jax.vmap(pruning.one_shot(0.7, step)))(np.arange(9))
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, np.where(np.arange(9) >= step, np.float32(0.7), 0))


@pytest.mark.parametrize(
    'schedule, message',
    [
        (lambda: pruning.one_shot(1.5, 0), 'one_shot: sparsity must be between 0 and 1, got 1.5'),
        (lambda: pruning.one_shot(0.5, -1), 'one_shot: step must not be negative, got -1'),
        (lambda: pruning.iterative(float('nan'), rounds=1, every=1), 'iterative: final must be between 0 and 1, got nan'),
        (lambda: pruning.iterative(0.5, rounds=0, every=1), 'iterative: need rounds >= 1, every >= 1 and begin >= 0, got 0, 1'),
        (lambda: pruning.iterative(0.5, rounds=1, every=0), 'iterative: need rounds >= 1'),
        (lambda: pruning.iterative(0.5, rounds=1, every=1, begin=-1), 'iterative: need rounds >= 1'),
    ],
)
def test_one_shot_and_iterative_reject_what_cannot_be_scheduled(schedule, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule()
