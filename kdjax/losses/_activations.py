"""What losses on activations share: checks, channels moved to the end, masks of positions, and one size for two images.

Activations are [batch, ..., channels] after the channel axis has been moved to the end; the first axis runs over the examples.
An example of which anything that is kept is NaN or infinite costs NaN.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import numerics, pooling


def activations(
    loss: str, student: ArrayLike, teacher: ArrayLike, axis: int, where: ArrayLike | None, *, rank: int | None = None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Two activations of one shape in float32 with channels last, zero outside `where`, and `where` broadcast to them."""
    where = numerics.mask(loss, where, jnp.shape(student), axis)
    student, teacher = numerics.pair(loss, student, teacher, axis)
    if rank is None and student.ndim < 2:
        raise ValueError(f'{loss}: activations must be [batch, ..., channels], got {student.shape}')
    if rank is not None and student.ndim != rank:
        raise ValueError(f'{loss}: activations must be [batch, height, width, channels], got {student.shape}')
    student, teacher = (numerics.finite_or_nan(x) for x in (student, teacher))
    if where is None:
        return student, teacher, None
    return jnp.where(where, student, 0.0), jnp.where(where, teacher, 0.0), where


def images(
    loss: str, student: ArrayLike, teacher: ArrayLike, axis: int, where: ArrayLike | None
) -> tuple[jax.Array, jax.Array, tuple[int, int], jax.Array | None]:
    """Two activations in float32 with channels last, the smaller of their sizes, and `where` over the positions of that.

    What reaches no kept position by way of `average_pool` is zero.
    """
    student, teacher = numerics.pair(loss, student, teacher, axis, same_shape=False)
    if student.ndim != 4 or student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f'{loss}: student and teacher must be [batch, height, width, channels] with the same batch, '
            f'got {student.shape} and {teacher.shape} (channels last)'
        )
    size = smaller_size(student, teacher)
    where = position_mask(loss, where, (student.shape[0], *size), axis)
    return masked_images(student, where), masked_images(teacher, where), size, where


def as_positions(
    loss: str, student: ArrayLike, teacher: ArrayLike, axis: int, where: ArrayLike | None
) -> tuple[jax.Array, jax.Array]:
    """Both as [batch, positions, channels] at the smaller size, and zero outside `where`."""
    student, teacher, size, where = images(loss, student, teacher, axis, where)
    return flatten_positions(student, size, where), flatten_positions(teacher, size, where)


def flatten_positions(images: jax.Array, size: tuple[int, int], where: jax.Array | None) -> jax.Array:
    """[batch, height, width, channels] as [batch, positions of a size, channels], zero outside `where` of that size."""
    pooled = pooling.average_pool(images, size)
    kept = pooled if where is None else jnp.where(where[..., None], pooled, 0.0)
    return kept.reshape(images.shape[0], size[0] * size[1], images.shape[3])


def masked_images(images: jax.Array, where: jax.Array | None) -> jax.Array:
    """[batch, height, width, channels] without infinities, zero where `average_pool` to the size of `where` drops it."""
    images = numerics.finite_or_nan(images)
    if where is None:
        return images
    reached = where.astype(jnp.float32)
    for axis in (1, 2):
        if images.shape[axis] != where.shape[axis]:
            windows = jnp.asarray(pooling.windows(images.shape[axis], where.shape[axis]))
            reached = jnp.moveaxis(jnp.tensordot(reached, windows, axes=((axis,), (1,))), -1, axis)
    return jnp.where(reached[..., None] > 0, images, 0.0)


def position_mask(loss: str, where: ArrayLike | None, shape: tuple[int, ...], axis: int) -> jax.Array | None:
    """`where` broadcast to [batch, height, width], from a layout that has a channel axis of length 1 at `axis`."""
    if where is None:
        return None
    with_channels = list(shape)
    with_channels.insert(axis % 4, 1)
    return numerics.mask(loss, where, tuple(with_channels), axis)[..., 0]


def smaller_size(first: jax.Array, second: jax.Array) -> tuple[int, int]:
    """The smaller height and the smaller width of two [batch, height, width, channels]."""
    return min(first.shape[1], second.shape[1]), min(first.shape[2], second.shape[2])


def per_channel(
    loss: str, name: str, value: ArrayLike, shape: tuple[int, ...], axis: int, where: jax.Array | None
) -> jax.Array:
    """A number, [channels] or `shape`, in float32, broadcast to `shape` with `axis` moved to the end; 1 outside `where`."""
    value = jnp.asarray(value, jnp.float32)
    if value.shape == shape:
        value = jnp.moveaxis(value, axis, -1)
    elif value.shape in ((), (shape[axis],)):
        value = jnp.broadcast_to(value, [size for i, size in enumerate(shape) if i != axis % len(shape)] + [shape[axis]])
    else:
        raise ValueError(f'{loss}: {name} {value.shape} must be a number, {(shape[axis],)} or {shape}')
    return value if where is None else jnp.where(where, value, 1.0)


def exact_einsum(subscripts: str, *operands: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, *operands, precision=jax.lax.Precision.HIGHEST)
