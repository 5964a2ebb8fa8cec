"""From scores to masks: which weights stay, over all arrays together or array by array, with the exact count, ties included."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.pruning._scores import Scores

Masks = dict[str, jax.Array]
"""True for the weights that stay, by the path of their array; shapes broadcast to those of the weights."""

MaskFunction = Callable[[Scores, Any], Masks]
"""`(scores, sparsity) -> masks`."""


def global_masks(scores: Scores, sparsity: Any) -> Masks:
    """Prunes the lowest scores of all arrays together.

    Of n scores, round(sparsity · n) go, exactly; among equal scores those that come later go first. The number is computed in
    float32 where the sparsity is traced, which for more than 16 million scores may be off by a few. Arrays may be sharded, and
    are not gathered.

    Args:
      scores: by path, any shapes.
      sparsity: the share to prune, in [0, 1].

    Returns:
      Masks of the scores' shapes.

    Raises:
      ValueError: a sparsity that is known at trace time lies outside [0, 1].

    >>> import jax.numpy as jnp
    >>> print(global_masks({'a': jnp.array([3., 1.]), 'b': jnp.array([1., 2.])}, 0.5)['a'])
    [ True False]
    """
    arrays = list(scores.values())
    kept = keep_largest(arrays, _number_kept(sum(array.size for array in arrays), sparsity))
    return dict(zip(scores, kept, strict=True))


def layer_masks(scores: Scores, sparsity: Any) -> Masks:
    """Prunes the same share of every array, the uniform distribution: round(sparsity · n) of its n scores, exactly.

    Args:
      scores: by path, any shapes.
      sparsity: the share to prune, in [0, 1].

    Returns:
      Masks of the scores' shapes.

    Raises:
      ValueError: a sparsity that is known at trace time lies outside [0, 1].

    >>> import jax.numpy as jnp
    >>> print(layer_masks({'a': jnp.array([3., 1.]), 'b': jnp.array([1., 2.])}, 0.5)['b'])
    [False  True]
    """
    return {path: keep_largest([array], _number_kept(array.size, sparsity))[0] for path, array in scores.items()}


def erk_masks(scores: Scores, sparsity: Any) -> Masks:
    """Prunes larger arrays more, by the Erdős–Rényi-kernel distribution.

    An array of shape (d₁, d₂, ...) keeps the share min(1, ε · Σd / Πd), with one ε for all arrays, such that of all n scores
    round(sparsity · n) go, exactly. In numbers, it keeps ε · Σd scores, rounded, at most all. Within an array the lowest go. An
    array's number never grows with the sparsity.

    Args:
      scores: by path, any shapes; the d are lengths of the scores' axes.
      sparsity: the share to prune of all arrays together, in [0, 1].

    Returns:
      Masks of the scores' shapes.

    Raises:
      ValueError: a sparsity that is known at trace time lies outside [0, 1].

    >>> import jax.numpy as jnp
    >>> masks = erk_masks({'small': jnp.ones((2, 2)), 'large': jnp.ones((10, 10))}, 0.75)
    >>> print(masks['small'].sum(), masks['large'].sum())
    4 22

    Reference:
      Evci, Gale, Menick, Castro, Elsen. Rigging the Lottery: Making All Tickets Winners. 2020.
      https://arxiv.org/abs/1911.11134
    """
    sizes = [array.size for array in scores.values()]
    numbers = _erk_numbers(sizes, [sum(array.shape) for array in scores.values()], _number_kept(sum(sizes), sparsity))
    return {path: keep_largest([array], number)[0] for (path, array), number in zip(scores.items(), numbers, strict=True)}


def _erk_numbers(sizes: list[int], weights: list[int], number: Any) -> jax.Array:
    """Splits `number` among arrays: min(size, round(ε · weight)), with what ties at the last ε going to the first arrays.

    Largest remainders would round as well, but there an array may get more when the number falls.
    """
    limits = jnp.asarray(sizes, jnp.int32)
    scaled = jnp.asarray(weights, jnp.float32)

    def shares(bits: jax.Array) -> jax.Array:
        epsilon = jax.lax.bitcast_convert_type(bits, jnp.float32)
        return jnp.minimum(limits, jnp.minimum(jnp.floor(epsilon * scaled + 0.5), 2.0**30).astype(jnp.int32))

    largest = np.float32(np.finfo(np.float32).max).view(np.uint32)
    epsilon = _largest_integer(lambda bits: (bits <= largest) & (jnp.sum(shares(bits)) <= number), 31)
    below, gains = shares(epsilon), shares(jnp.minimum(epsilon + 1, largest)) - shares(epsilon)
    missing = number - jnp.sum(below) - (jnp.cumsum(gains) - gains)
    return below + jnp.clip(missing, 0, gains)


def keep_largest(arrays: list[jax.Array], number: Any) -> list[jax.Array]:
    """Masks that keep exactly `number` of the largest entries of all arrays together; of equal entries the first are kept.

    The threshold is found bit by bit, with 32 counts and no sort: floats order like integers once negative ones are flipped.
    Where only some of the entries at the threshold stay, the position of the last is found in the same way. Counts are sums, so
    arrays may be sharded and are not gathered, and the masks do not depend on the sharding.

    Raises:
      ValueError: there are 2³¹ entries or more.
    """
    size = sum(array.size for array in arrays)
    if size >= 2**31:
        raise ValueError(f'keep_largest: counts up to 2**31 - 1 entries, got {size}; prune layer by layer')
    keys = [_ordered_bits(array) for array in arrays]
    number = jnp.asarray(number, jnp.int32)
    threshold = _largest_integer(lambda candidate: _count(key >= candidate for key in keys) >= number, 32)
    missing = number - _count(key > threshold for key in keys)

    ties = [
        jnp.where(key == threshold, position, jnp.uint32(size)) for key, position in zip(keys, _positions(arrays), strict=True)
    ]
    end = jax.lax.cond(
        _count(tie < size for tie in ties) > missing,
        lambda: _largest_integer(lambda end: _count(tie < end for tie in ties) <= missing, size.bit_length()),
        lambda: jnp.uint32(size),
    )
    return [(key > threshold) | (tie < end) for key, tie in zip(keys, ties, strict=True)]


def _largest_integer(holds: Callable[[jax.Array], jax.Array], bits: int) -> jax.Array:
    """The largest integer of so many bits for which something holds that holds for 0 and, up to some integer, for all."""

    def refine(i: jax.Array, largest: jax.Array) -> jax.Array:
        # Under `jax_disable_jit` the loop's number is Python's own.
        candidate = largest | (jnp.uint32(1) << jnp.asarray(bits - 1 - i, jnp.uint32))
        return jnp.where(holds(candidate), candidate, largest)

    return jax.lax.fori_loop(0, bits, refine, jnp.uint32(0))


def _count(masks: Any) -> jax.Array:
    return sum((jnp.sum(mask, dtype=jnp.int32) for mask in masks), start=jnp.int32(0))


def _positions(arrays: list[jax.Array]) -> list[jax.Array]:
    """The number of each entry, counted through all arrays; an iota for each axis, which a sharded program makes in parts."""
    positions, offset = [], 0
    for array in arrays:
        position = jnp.full(array.shape, offset, jnp.uint32)
        for axis in range(array.ndim):
            stride = math.prod(array.shape[axis + 1 :])
            position += jnp.uint32(stride) * jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
        positions.append(position)
        offset += array.size
    return positions


def _ordered_bits(x: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    # -0.0 must tie with 0.0; under jit adding 0.0 would not do, XLA leaves it out.
    bits = jnp.where(bits == sign, jnp.uint32(0), bits)
    return jnp.where(bits & sign, ~bits, bits | sign)


def _number_kept(size: int, sparsity: Any) -> Any:
    if isinstance(sparsity, (int, float)):
        if not 0 <= sparsity <= 1:
            raise ValueError(f'sparsity must be between 0 and 1, got {sparsity}')
        return size - round(sparsity * size)
    return size - jnp.round(jnp.asarray(sparsity, jnp.float32) * size).astype(jnp.int32)
