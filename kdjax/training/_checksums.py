"""Checksums of a tree of arrays, computed where the arrays live."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def checksums(tree: Any) -> np.ndarray:
    """One number for each leaf that changes when one bit of the leaf does.

    With `b_i` the bits of element `i`, in row-major order, as an unsigned integer, it is `Σ_i (2 i + 1) b_i mod 2^32`. Integer
    sums are exact in any order, so it does not depend on how the arrays are split over devices. It guards against accidents,
    not against people.

    Args:
      tree: arrays of numbers, booleans or random keys.

    Returns:
      Unsigned 32-bit integers, [leaves], in the tree's order.

    >>> import jax.numpy as jnp
    >>> checksums({'a': jnp.array([1, 2, 3]), 'b': jnp.array([3, 2, 1])})
    array([22, 14], dtype=uint32)
    """
    return np.array(jax.device_get([_checksum(leaf) for leaf in jax.tree.leaves(tree)]), np.uint32)


@jax.jit
def _checksum(leaf: jax.Array) -> jax.Array:
    bits = _bits(leaf)
    index, stride = jnp.zeros(bits.shape, jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    return jnp.sum(bits * (jnp.uint32(2) * index + jnp.uint32(1)), dtype=jnp.uint32)


def _bits(leaf: jax.Array) -> jax.Array:
    """The bits of every element as unsigned 32-bit integers."""
    leaf = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else jnp.asarray(leaf)
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        leaf = jnp.stack([leaf.real, leaf.imag])
    if leaf.dtype.itemsize == 8:
        return jax.lax.bitcast_convert_type(leaf, jnp.uint32)
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
        leaf = jax.lax.bitcast_convert_type(leaf, unsigned)
    return leaf.astype(jnp.uint32)
