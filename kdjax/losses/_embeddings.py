"""What losses on the relations between examples share: flattened embeddings, their masks, distances and differences.

Such a loss sees the whole batch: under `jit` with sharded arrays that is the global one. Embeddings are [batch, ...]; all axes
but the first are flattened, and the two networks may have different widths. A mask may be of positions too, the first axes of
embeddings with channels last, as of tokens in [batch, tokens, channels]: what is outside is zero, so that more padding, of any
content, changes nothing. What is kept and is NaN or infinite makes the value NaN.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import numerics

# Numbers that one array over several anchors may hold at a time, in `map_anchors`: 4 MB in float32.
_CHUNK = 2**20


def embeddings(
    loss: str, student: ArrayLike, teacher: ArrayLike, axis: int, where: ArrayLike | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Student and teacher as [batch, features] in float32, zero outside `where`, and the examples of which anything is kept."""
    sides = [numerics.as_float32(f'{loss}: student', student), numerics.as_float32(f'{loss}: teacher', teacher)]
    shapes = tuple(x.shape for x in sides)
    if min(x.ndim for x in sides) < 2:
        raise ValueError(f'{loss}: student {shapes[0]} and teacher {shapes[1]} must be [batch, ...]')
    for shape in shapes:
        numerics.check_axis(loss, axis, shape)
    sides = [numerics.finite_or_nan(jnp.moveaxis(x, axis, -1)) for x in sides]
    batch = sides[0].shape[0]
    if sides[1].shape[0] != batch:
        raise ValueError(f'{loss}: student {shapes[0]} and teacher {shapes[1]} must have the same number of examples')
    if where is not None:
        sides = [jnp.where(numerics.leading_mask(loss, where, x.shape), x, 0.0) for x in sides]
        where = numerics.leading_mask(loss, where, (batch, 1))[:, 0]
    student, teacher = (x.reshape(batch, math.prod(x.shape[1:])) for x in sides)
    return student, teacher, where


def count(x: jax.Array, where: jax.Array | None) -> jax.Array:
    """The number of examples kept, or 1 for a safe division where none is."""
    kept = jnp.float32(x.shape[0]) if where is None else jnp.sum(where, dtype=jnp.float32)
    return jnp.maximum(kept, 1.0)


def squared_distances(x: jax.Array, where: jax.Array | None) -> jax.Array:
    """||x_i - x_j||² for [batch, features], 0 where i or j is outside `where`."""
    squares = map_anchors(lambda anchor: jnp.sum(jnp.square(differences(x, anchor[None])), axis=1), x)
    return squares if where is None else jnp.where(where[:, None] & where[None, :], squares, 0.0)


def map_anchors(function: Callable[..., jax.Array], *embeddings: jax.Array) -> jax.Array:
    """`function` of each example [features] of the embeddings, stacked; a few at a time, and again in the backward pass."""
    batch = embeddings[0].shape[0]
    size = batch * max(batch, *(x.shape[1] for x in embeddings))
    step = jax.checkpoint(lambda anchors: function(*anchors), prevent_cse=False)
    return jax.lax.map(step, embeddings, batch_size=max(1, min(batch, _CHUNK // max(1, size))))


def differences(x: jax.Array, y: jax.Array) -> jax.Array:
    """The differences x - y, [batch, features]; exactly 0 for an example in which the two agree up to rounding.

    XLA may compute what is one number twice, with and without fusing the product that it comes from into the difference: an
    example would have a distance from itself that is positive, and a direction.
    """
    difference = x - y
    together = jnp.abs(difference) <= 2.0**-22 * jnp.maximum(jnp.abs(x), jnp.abs(y))
    return jnp.where(jnp.all(together, axis=1, keepdims=True), 0.0, difference)


def unit_embeddings(
    loss: str, student: ArrayLike, teacher: ArrayLike, axis: int, where: ArrayLike | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Flattened embeddings of L2 norm 1."""
    shapes = jnp.shape(student), jnp.shape(teacher)
    student, teacher, where = embeddings(loss, student, teacher, axis, where)
    if student.shape != teacher.shape:
        raise ValueError(f'{loss}: student {shapes[0]} and teacher {shapes[1]} must have the same width')
    return numerics.l2_normalize(student, axis=1), numerics.l2_normalize(teacher, axis=1), where
