"""N of every M weights and whole blocks, with exact counts under ties."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import pruning

RNG = np.random.default_rng(0)
# Few values, so that most groups have ties.
TIED = RNG.integers(0, 4, (3, 2, 8, 5)).astype(np.float32)


def largest_of_groups(scores: np.ndarray, kept: int, m: int, axis: int) -> np.ndarray:
    """Group by group, by a stable sort."""
    moved = np.moveaxis(scores, axis, -1)
    groups = moved.reshape(-1, m)
    mask = np.zeros(groups.shape, bool)
    for row, order in zip(mask, np.argsort(-groups, axis=1, kind='stable'), strict=True):
        row[order[:kept]] = True
    return np.moveaxis(mask.reshape(moved.shape), -1, axis)


@pytest.mark.parametrize('n, m, axis', [(2, 4, -2), (1, 4, 2), (3, 8, -2), (1, 2, 1), (2, 5, 3), (0, 3, 0), (3, 3, 0)])
def test_of_every_m_the_n_largest_stay_and_the_first_of_ties(n: int, m: int, axis: int) -> None:
    masks = jax.jit(lambda scores: pruning.n_m_masks(n, m, axis=axis)(scores, 1 - n / m))({'kernel': TIED})
    np.testing.assert_array_equal(masks['kernel'], largest_of_groups(TIED, n, m, axis))


def test_two_of_four_are_inputs_of_a_dense_kernel_by_default() -> None:
    kernel = jnp.array([[4.0, 1.0], [1.0, 1.0], [3.0, 1.0], [2.0, 2.0]])
    mask = pruning.n_m_masks(2, 4)(pruning.magnitude({'kernel': kernel}), 0.5)['kernel']
    np.testing.assert_array_equal(mask, [[True, True], [False, False], [True, False], [False, True]])


def test_a_traced_sparsity_says_how_many_of_every_m_go_and_more_never_spares_a_weight() -> None:
    masks = jax.jit(lambda sparsity: pruning.n_m_masks(3, 8)({'kernel': TIED}, sparsity)['kernel'])
    found = {sparsity: np.asarray(masks(jnp.float32(sparsity))) for sparsity in (0.0, 0.125, 0.3, 0.5, 0.625, 0.9, 1.0)}
    for sparsity, mask in found.items():
        kept = max(8 - round(sparsity * 8), 3)
        np.testing.assert_array_equal(mask, largest_of_groups(TIED, kept, 8, -2))
    for less, more in itertools.pairwise(found.values()):
        assert not np.any(more & ~less)


@pytest.mark.parametrize('shape, block', [((2, 1), (1, 1, 2, 1)), ((3, 1, 4, 5), (3, 1, 4, 5)), ((5,), (1, 1, 1, 5))])
@pytest.mark.parametrize('sparsity', [0.5, 0.25])
def test_blocks_of_the_largest_sums_stay_whole(shape: Any, block: tuple[int, ...], sparsity: float) -> None:
    pairs = [pair for length, b in zip(TIED.shape, block, strict=True) for pair in (length // b, b)]
    sums = TIED.reshape(pairs).sum((1, 3, 5, 7))
    kept = np.zeros(sums.size, bool)
    kept[np.argsort(-sums.ravel(), kind='stable')[: sums.size - round(sparsity * sums.size)]] = True
    wanted = np.kron(kept.reshape(sums.shape), np.ones(block, bool))
    got = jax.jit(lambda scores: pruning.block_masks(shape)(scores, sparsity))({'kernel': TIED})['kernel']
    np.testing.assert_array_equal(got, wanted)


def test_other_masks_choose_among_blocks() -> None:
    """Over all arrays together, array by array, or one of every two blocks."""
    scores = {'a': jnp.array([[1.0, 2.0], [3.0, 4.0]]), 'b': jnp.array([[5.0, 6.0], [7.0, 8.0]])}
    both, none, first, second = [[1, 1], [1, 1]], [[0, 0], [0, 0]], [[1, 1], [0, 0]], [[0, 0], [1, 1]]
    for masks, a, b in (
        (pruning.global_masks, none, both),
        (pruning.layer_masks, second, second),
        (pruning.n_m_masks(1, 2), second, second),
        (lambda s, _: {path: -x > -4 for path, x in s.items()}, first, none),
    ):
        found = jax.jit(lambda scores: pruning.block_masks((1, 2), masks)(scores, 0.5))(scores)  # noqa: B023
        np.testing.assert_array_equal(found['a'], a)
        np.testing.assert_array_equal(found['b'], b)


@pytest.mark.parametrize(
    'masks, sparsity, message',
    [
        (
            pruning.n_m_masks(2, 3),
            1 / 3,
            r'n_m_masks: kernel has scores of shape \(4, 6\), whose axis -2 does not divide .* of 3',
        ),
        (pruning.n_m_masks(2, 4, axis=2), 0.5, 'n_m_masks: kernel .* axis 2 does not divide'),
        (pruning.n_m_masks(2, 4), 0.6, 'n_m_masks: 2 of 4 is a sparsity of 0.5, got 0.6; give that, or a schedule'),
        (pruning.block_masks((3, 2)), 0.5, r'block_masks: kernel has scores of shape \(4, 6\), .* blocks of \(3, 2\)'),
        (pruning.block_masks((1, 2, 2)), 0.5, r'block_masks: kernel .* blocks of \(1, 2, 2\)'),
    ],
)
def test_what_does_not_fit_is_an_error(masks: Any, sparsity: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        masks({'kernel': jnp.ones((4, 6))}, sparsity)


def test_what_is_no_pattern_is_an_error() -> None:
    for n, m in ((5, 4), (-1, 4), (0, 0)):
        with pytest.raises(ValueError, match=f'n_m_masks: need 0 <= n <= m and m >= 1, got n {n} and m {m}'):
            pruning.n_m_masks(n, m)
    for shape in ((), (0, 2)):
        with pytest.raises(ValueError, match='block_masks: lengths of a block must be positive'):
            pruning.block_masks(shape)
