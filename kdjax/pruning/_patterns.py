"""Masks with a pattern that hardware can use: N of every M weights, and whole blocks."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kdjax.pruning._masks import MaskFunction, Masks, global_masks
from kdjax.pruning._scores import Scores


def n_m_masks(n: int, m: int, *, axis: int = -2) -> MaskFunction:
    """Of every m consecutive weights along an axis the n with the largest scores stay; of equal scores the first.

    Where the sparsity is a schedule, round(sparsity · m) of every m go, at most m - n. The axis is by default the inputs of a
    dense kernel [in, out] and the input channels of a convolution: the axis that a product sums over.

    Args:
      n: how many of every m weights stay.
      m: weights of a group; it divides the length of the axis.
      axis: the axis along which weights are grouped.

    Returns:
      A function `(scores, sparsity) -> masks` for `prune`. A sparsity that is known at trace time must be 1 - n / m.

    Raises:
      ValueError: n is not in [0, m]; when called: an array lacks the axis, or m does not divide it, or a sparsity that is known
        at trace time is not 1 - n / m.

    >>> import jax.numpy as jnp
    >>> print(n_m_masks(2, 4)({'kernel': jnp.array([[1.], [3.], [2.], [3.]])}, 0.5)['kernel'].ravel())
    [False  True False  True]

    Reference:
      Mishra, Latorre, Pool, Stosic, Stosic, Venkatesh, Yu, Micikevicius. Accelerating Sparse Deep Neural Networks. 2021.
      https://arxiv.org/abs/2104.08378
    """
    if not 0 <= n <= m or m < 1:
        raise ValueError(f'n_m_masks: need 0 <= n <= m and m >= 1, got n {n} and m {m}')

    def masks(scores: Scores, sparsity: Any) -> Masks:
        if isinstance(sparsity, (int, float)):
            if not math.isclose(sparsity, 1 - n / m, abs_tol=1e-6):
                raise ValueError(
                    f'n_m_masks: {n} of {m} is a sparsity of {1 - n / m:.6g}, got {sparsity}; give that, or a schedule'
                )
            kept = n
        else:
            pruned = jnp.round(jnp.asarray(sparsity, jnp.float32) * m).astype(jnp.int32)
            kept = jnp.maximum(m - pruned, n)
        return {path: _largest_of_groups(path, score, kept, m, axis) for path, score in scores.items()}

    return masks


def block_masks(shape: Sequence[int], masks: MaskFunction = global_masks) -> MaskFunction:
    """Whole blocks stay or go; a block's score is the sum of its scores.

    Args:
      shape: lengths of a block along the last axes; along the axes before these it is 1. Each divides the axis.
      masks: which blocks stay, of their scores; the sparsity is the share of blocks.

    Returns:
      A function `(scores, sparsity) -> masks` for `prune`.

    Raises:
      ValueError: a length is not positive; when called: an array does not divide into blocks.

    >>> import jax.numpy as jnp
    >>> print(block_masks((1, 2))({'kernel': jnp.array([[1., 4., 2., 2.], [3., 3., 0., 1.]])}, 0.5)['kernel'])
    [[ True  True False False]
     [ True  True False False]]

    Reference:
      Narang, Undersander, Diamos. Block-Sparse Recurrent Neural Networks. 2017. https://arxiv.org/abs/1711.02782
    """
    shape = tuple(shape)
    if not shape or min(shape) < 1:
        raise ValueError(f'block_masks: lengths of a block must be positive, got {shape}')

    def of_blocks(scores: Scores, sparsity: Any) -> Masks:
        blocks = {path: _block_shape(path, score, shape) for path, score in scores.items()}
        kept = masks({path: _sum_of_blocks(score, blocks[path]) for path, score in scores.items()}, sparsity)
        return {path: _repeat_blocks(mask, blocks[path]) for path, mask in kept.items()}

    return of_blocks


def _largest_of_groups(path: str, score: jax.Array, kept: Any, m: int, axis: int) -> jax.Array:
    if not -score.ndim <= axis < score.ndim or score.shape[axis] % m:
        raise ValueError(
            f'n_m_masks: {path} has scores of shape {score.shape}, whose axis {axis} does not divide into groups of {m}'
        )
    axis %= score.ndim
    groups = score.reshape(*score.shape[:axis], score.shape[axis] // m, m, *score.shape[axis + 1 :])
    # Each of the m against each: groups are small, and this is exact where scores tie.
    one, other = jnp.expand_dims(groups, axis + 2), jnp.expand_dims(groups, axis + 1)
    pairs = jnp.broadcast_shapes(one.shape, other.shape)
    first = jax.lax.broadcasted_iota(jnp.int32, pairs, axis + 2) < jax.lax.broadcasted_iota(jnp.int32, pairs, axis + 1)
    rank = jnp.sum((other > one) | ((other == one) & first), axis=axis + 2, dtype=jnp.int32)
    return (rank < kept).reshape(score.shape)


def _block_shape(path: str, score: jax.Array, shape: tuple[int, ...]) -> tuple[int, ...]:
    block = (1,) * (score.ndim - len(shape)) + shape
    if len(block) != score.ndim or any(length % b for length, b in zip(score.shape, block, strict=True)):
        raise ValueError(f'block_masks: {path} has scores of shape {score.shape}, which do not divide into blocks of {shape}')
    return block


def _sum_of_blocks(score: jax.Array, block: tuple[int, ...]) -> jax.Array:
    pairs = [(length // b, b) for length, b in zip(score.shape, block, strict=True)]
    return jnp.sum(score.reshape([length for pair in pairs for length in pair]), axis=tuple(range(1, 2 * score.ndim, 2)))


def _repeat_blocks(mask: jax.Array, block: tuple[int, ...]) -> jax.Array:
    for axis, length in enumerate(block):
        mask = jnp.repeat(mask, length, axis=axis)
    return mask
