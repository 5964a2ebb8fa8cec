"""From scores to masks: which weights stay, with the exact count, ties included."""

from typing import Any

import jax
import jax.numpy as jnp

Scores = dict[str, jax.Array]
"""One score for every weight that may be pruned, by the path of its array."""

Masks = dict[str, jax.Array]
"""True for the weights that stay, by the path of their array."""


def magnitude(weights: dict[str, jax.Array]) -> Scores:
    """|w|: the smallest weights go first."""
    return {path: jnp.abs(weight.astype(jnp.float32)) for path, weight in weights.items()}


def global_masks(scores: Scores, sparsity: Any) -> Masks:
    """Prunes the lowest scores of all arrays together.

    Of n weights, round(sparsity · n) go, exactly; among equal scores those that come later go first. The number is computed in
    float32 where the sparsity is traced, which for more than 16 million weights may be off by a few.

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
    """Prunes the same share of every array: round(sparsity · n) of its n weights, exactly.

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


def keep_largest(arrays: list[jax.Array], number: Any) -> list[jax.Array]:
    """Masks that keep exactly `number` of the largest entries of all arrays together; of equal entries the first are kept.

    The threshold is found bit by bit, with 32 counts and no sort: floats order like integers once negative ones are flipped.
    Counts are sums, so arrays may be sharded and are not gathered.
    """
    keys = [_ordered_bits(array) for array in arrays]
    number = jnp.asarray(number, jnp.int32)

    def refine(i: jax.Array, threshold: jax.Array) -> jax.Array:
        candidate = threshold | (jnp.uint32(1) << (jnp.uint32(31) - i.astype(jnp.uint32)))
        count = sum(jnp.sum(key >= candidate, dtype=jnp.int32) for key in keys)
        return jnp.where(count >= number, candidate, threshold)

    threshold = jax.lax.fori_loop(0, 32, refine, jnp.uint32(0))
    missing = number - sum(jnp.sum(key > threshold, dtype=jnp.int32) for key in keys)
    masks = []
    for key in keys:
        tied = key == threshold
        rank = jnp.cumsum(tied.ravel(), dtype=jnp.int32).reshape(tied.shape)
        masks.append((key > threshold) | (tied & (rank <= missing)))
        missing = missing - jnp.sum(tied, dtype=jnp.int32)
    return masks


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
