"""The arithmetic that all losses share: float32 in log space, masks, and one-line errors about shapes.

For kdjax's own use. Every function works on arrays whose class or channel axis has been moved to the end by `pair`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

# Stands for log 0. With -inf, `0 * -inf` and `-inf - -inf` would put NaN into values and gradients; with this, products with a
# probability of exactly zero are zero, and differences of two such logs are zero.
LOG_ZERO = -1e30
# A class outside a mask ranks below one that is kept at log 0, so that a row of nothing but the latter is uniform over them.
_LOG_MASKED = -1e32


def as_float32(name: str, x: ArrayLike) -> jax.Array:
    """Returns `x` in float32; integers and complex numbers are refused, since they are never logits or features."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f'{name} must be floating point, got {x.dtype}')
    return x.astype(jnp.float32)


def pair(
    loss: str, student: ArrayLike, teacher: ArrayLike, axis: int, *, same_shape: bool = True
) -> tuple[jax.Array, jax.Array]:
    """Returns student and teacher in float32 with `axis` moved to the end, once their shapes have been checked."""
    student = as_float32(f'{loss}: student', student)
    teacher = as_float32(f'{loss}: teacher', teacher)
    if student.ndim != teacher.ndim:
        raise ValueError(f'{loss}: student {student.shape} and teacher {teacher.shape} must have the same rank')
    check_axis(loss, axis, student.shape)
    if same_shape and student.shape != teacher.shape:
        raise ValueError(
            f'{loss}: student {student.shape} and teacher {teacher.shape} must have the same shape; '
            f'along axis {axis} the student has {student.shape[axis]} and the teacher {teacher.shape[axis]}'
        )
    return jnp.moveaxis(student, axis, -1), jnp.moveaxis(teacher, axis, -1)


def check_axis(loss: str, axis: int, shape: tuple[int, ...]) -> None:
    """Raises if an array of this shape has no such axis."""
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f'{loss}: axis {axis} is not an axis of the student, whose shape is {shape}')


def mask(loss: str, where: ArrayLike | None, shape: tuple[int, ...], axis: int) -> jax.Array | None:
    """Returns `where` broadcast to `shape` with `axis` moved to the end; `shape` is the shape before that move."""
    if where is None:
        return None
    check_axis(loss, axis, shape)
    where = jnp.asarray(where)
    if where.dtype != jnp.bool_:
        raise ValueError(f'{loss}: where must be boolean, got {where.dtype}')
    try:
        return jnp.moveaxis(jnp.broadcast_to(where, shape), axis, -1)
    except ValueError:
        raise ValueError(f'{loss}: where {where.shape} does not broadcast to {shape}') from None


def check_labels(loss: str, labels: ArrayLike, shape: tuple[int, ...]) -> jax.Array:
    """Returns integer labels of the given shape as int32."""
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f'{loss}: labels must be integer class indices, got {labels.dtype}')
    if labels.shape != shape:
        raise ValueError(f'{loss}: labels {labels.shape} must have the shape of the logits without classes, {shape}')
    return labels.astype(jnp.int32)


def check_positive(loss: str, **values: ArrayLike) -> None:
    """Raises where a hyperparameter that is known at trace time is not positive."""
    for name, value in values.items():
        try:
            positive = bool(np.asarray(value) > 0)
        except jax.errors.JAXTypeError:  # traced: the value is not known yet
            continue
        if not positive:
            raise ValueError(f'{loss}: {name} must be positive, got {value}')


def log_softmax(logits: jax.Array, temperature: ArrayLike = 1.0, where: jax.Array | None = None) -> jax.Array:
    """Returns log softmax(logits / temperature) over the last axis; those at -inf or outside `where` get `LOG_ZERO` or less."""
    scaled = jnp.where(jnp.isneginf(logits), LOG_ZERO, logits / jnp.asarray(temperature, jnp.float32))
    if where is not None:
        scaled = jnp.where(where, scaled, _LOG_MASKED)
    return jax.nn.log_softmax(scaled, axis=-1)


def divergence(log_p: jax.Array, log_q: jax.Array, where: jax.Array | None = None) -> jax.Array:
    """KL(p || q) over the last axis, from log probabilities that are each normalised over the kept classes.

    Sums p (log p - log q) - p + q, which is the same since both sum to one, and whose terms cannot be negative. Near p = q
    each term is p (d + expm1(-d)) with d = log p - log q: the plain form loses all digits there, as at high temperatures.
    """
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    difference = log_p - log_q
    near = difference > -1.0
    # exp(-d) overflows for q >> p, so each branch sees a harmless value where the other one is taken.
    near_difference = jnp.where(near, difference, 0.0)
    far_difference = jnp.where(near, 0.0, difference)
    terms = jnp.where(near, p * (near_difference + jnp.expm1(-near_difference)), p * far_difference - p + q)
    return jnp.sum(terms, axis=-1, where=where)


def masked_mean(x: jax.Array, axis: int | tuple[int, ...], where: jax.Array | None = None) -> jax.Array:
    """The mean of `x` over `axis`, divided by the number kept; 0 where nothing is kept."""
    if where is None:
        return jnp.mean(x, axis=axis)
    where = jnp.broadcast_to(where, x.shape)
    count = jnp.sum(where, axis=axis, dtype=jnp.float32)
    return jnp.sum(x, axis=axis, where=where) / jnp.maximum(count, 1.0)


def unit_scale(x: jax.Array, axis: int | tuple[int, ...]) -> jax.Array:
    """`x` divided by its largest magnitude over `axis`, a constant for gradients: later squares neither overflow nor vanish.

    Only for functions that do not change when their input is multiplied by a positive number.
    """
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=axis, keepdims=True, initial=0.0))
    return x / jnp.where(largest > 0, largest, 1.0)


def l2_normalize(x: jax.Array, axis: int | tuple[int, ...]) -> jax.Array:
    """`x / ||x||` over `axis`; a zero vector stays zero, with zero gradient."""
    x = unit_scale(x, axis)
    squares = jnp.sum(jnp.square(x), axis=axis, keepdims=True)
    return jnp.where(squares > 0, x * jax.lax.rsqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)
