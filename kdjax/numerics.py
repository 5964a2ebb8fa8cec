"""What all losses share: checks of their arguments with one-line errors, masks, and float32 arithmetic in log space.

For kdjax's own use. Every function works on arrays whose class or channel axis has been moved to the end by `pair`. Numbers are
checked where they are known, as in a call outside `jit`. A guard against a division by zero asks whether a number *is* zero:
`where(x > 0, ...)` is false for NaN, and would make a number of it.
"""

import math
from collections.abc import Callable
from typing import overload

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

# Stands for log 0. With -inf, `0 * -inf` and `-inf - -inf` would put NaN into values and gradients; with this, products with a
# probability of exactly zero are zero, and differences of two such logs are zero.
LOG_ZERO = -1e30
# The same for float16, which ends at 65504: the gradient is at most a quarter of it times temperatures and weights of the loss.
_LOG_ZERO_FLOAT16 = -1e3
# A class outside a mask ranks below one that is kept at log 0, so that a row of nothing but the latter is uniform over them.
_LOG_MASKED = -1e32


def as_float32(name: str, x: ArrayLike) -> jax.Array:
    """Returns `x` in float32; integers and complex numbers are refused, since they are never logits or features.

    Infinity becomes NaN: it is an overflow, which must not be lost where only the order or the sign of numbers counts.
    """
    x = floating(name, x)
    return jnp.where(jnp.isposinf(x), jnp.nan, x)


def floating(name: str, x: ArrayLike) -> jax.Array:
    """Returns `x` in float32, infinities and all; what is not floating point is refused."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f'{name} must be floating point, got {x.dtype}')
    return x.astype(jnp.float32)


def finite_or_nan(x: jax.Array) -> jax.Array:
    """Has -inf become NaN too, for activations, where it is an overflow like the other one. Logits at -inf rule out a class."""
    return jnp.where(jnp.isneginf(x), jnp.nan, x)


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


@overload
def mask(loss: str, where: ArrayLike, shape: tuple[int, ...], axis: int) -> jax.Array: ...


@overload
def mask(loss: str, where: ArrayLike | None, shape: tuple[int, ...], axis: int) -> jax.Array | None: ...


def mask(loss: str, where: ArrayLike | None, shape: tuple[int, ...], axis: int) -> jax.Array | None:
    """Returns `where` broadcast to `shape` with `axis` moved to the end; `shape` is the shape before that move."""
    if where is None:
        return None
    check_axis(loss, axis, shape)
    where = booleans(loss, where)
    try:
        return jnp.moveaxis(jnp.broadcast_to(where, shape), axis, -1)
    except ValueError:
        raise ValueError(f'{loss}: where {where.shape} does not broadcast to {shape}') from None


def booleans(loss: str, where: ArrayLike) -> jax.Array:
    """Returns a mask as an array; one of numbers, such as weights, is refused."""
    where = jnp.asarray(where)
    if where.dtype != jnp.bool_:
        raise ValueError(f'{loss}: where must be boolean, got {where.dtype}')
    return where


def leading_mask(loss: str, where: ArrayLike, shape: tuple[int, ...]) -> jax.Array:
    """Returns `where` [batch] or [batch, positions] with axes that broadcast to those of an array [batch, positions, channels].

    An array of fewer axes, as of one embedding for each example, is kept where any of its positions is.
    """
    where = booleans(loss, where)
    axes = max(1, min(where.ndim, len(shape) - 1))
    kept = mask(loss, jnp.any(where, axis=tuple(range(axes, where.ndim))), shape[:axes], -1)
    return kept.reshape(*kept.shape, *(1,) * (len(shape) - axes))


def check_classes(loss: str, shape: tuple[int, ...]) -> None:
    """Raises unless logits [..., classes] have classes to compare: the softmax of a single one is 1, whatever the logit."""
    if shape[-1] < 2:
        raise ValueError(
            f'{loss}: logits {shape} (classes last) need two classes or more: a single logit has no other class to be compared '
            'with; for yes or no, use binary_labels or binary_soft_targets'
        )


def check_labels(loss: str, labels: ArrayLike, shape: tuple[int, ...], classes: int | None = None) -> jax.Array:
    """Returns integer labels of the given shape as int32, none of them beyond the classes where both are known."""
    labels = labels if isinstance(labels, jax.Array) else np.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f'{loss}: labels must be integer class indices, got {labels.dtype}')
    if labels.shape != shape:
        raise ValueError(f'{loss}: labels {labels.shape} must have the shape of the logits without classes, {shape}')
    numbers = known(labels)
    if classes is not None and numbers is not None and np.any(numbers >= classes):
        raise ValueError(
            f'{loss}: labels must be below the number of classes, {classes}, got {np.max(numbers)}; negative ones are no label'
        )
    return jnp.asarray(labels).astype(jnp.int32)


def of_labelled(values: jax.Array, labels: jax.Array, classes: int) -> jax.Array:
    """Values [...] of examples with labels [...]: exactly 0 where there is none, NaN where it lies beyond the classes."""
    return jnp.where(labels < 0, 0.0, jnp.where(labels < classes, values, jnp.nan))


def check_indices(loss: str, name: str, indices: ArrayLike, size: int) -> jax.Array:
    """Returns indices as int32, `size` where one lies outside of [0, size); raises where they are known.

    `jnp.take(..., mode='fill', fill_value=jnp.nan)` then has NaN where the default takes another entry.
    """
    numbers = known(indices)
    if numbers is not None and np.any((numbers < 0) | (numbers >= size)):
        wrong = numbers[(numbers < 0) | (numbers >= size)].flat[0]
        raise ValueError(f'{loss}: {name} must be in [0, {size}), got {wrong}')
    indices = jnp.asarray(indices).astype(jnp.int32)
    return jnp.where((indices < 0) | (indices >= size), size, indices)


def check_scalars(loss: str, **values: ArrayLike) -> None:
    """Raises unless hyperparameters are scalars: one for each example would be broadcast against the classes."""
    for name, value in values.items():
        if jnp.ndim(value) > 0:
            raise ValueError(f'{loss}: {name} must be a number, the same for all examples, got an array {jnp.shape(value)}')


def check_positive(loss: str, **values: ArrayLike) -> None:
    """Raises where a hyperparameter is not a scalar, or known and not positive."""
    _check_scalars(loss, values, 'positive', lambda number: number > 0)


def check_share(loss: str, **values: ArrayLike) -> None:
    """Raises where a hyperparameter is not a scalar, or known and not in [0, 1]."""
    check_between(loss, 0, 1, **values)


def check_between(loss: str, least: int, most: int, /, **values: ArrayLike) -> None:
    """Raises where a hyperparameter is not a scalar, or known and not from `least` to `most`."""
    _check_scalars(loss, values, f'between {least} and {most}', lambda number: (number >= least) & (number <= most))


def _check_scalars(loss: str, values: dict[str, ArrayLike], kind: str, fits: Callable[[np.ndarray], np.ndarray]) -> None:
    check_scalars(loss, **values)
    for name, value in values.items():
        number = known(value)
        if number is not None and not fits(number):
            raise ValueError(f'{loss}: {name} must be {kind}, got {value}')


def known(x: ArrayLike) -> np.ndarray | None:
    """The numbers of `x`; None while they are traced, or where they lie on other hosts."""
    if isinstance(x, jax.core.Tracer) or (isinstance(x, jax.Array) and not x.is_fully_addressable):
        return None
    return np.asarray(x)


def log_zero(*logits: ArrayLike) -> float:
    """The log probability of a class at -inf, for `log_softmax`, such that gradients fit the dtypes of these logits.

    A class that one network rules out costs as many times the other's probability.
    """
    return _LOG_ZERO_FLOAT16 if any(jnp.result_type(x) == jnp.float16 for x in logits) else LOG_ZERO


def log_softmax(
    logits: jax.Array, temperature: ArrayLike = 1.0, where: jax.Array | None = None, zero: float = LOG_ZERO
) -> jax.Array:
    """Returns log softmax(logits / temperature) over the last axis: about `zero` for those at -inf, less outside `where`."""
    ruled_out = jnp.isneginf(logits)
    # Zero before the division, since the temperature has a gradient too.
    finite = jnp.where(ruled_out if where is None else ruled_out | ~where, 0.0, logits)
    scaled = jnp.where(ruled_out, LOG_ZERO, finite / jnp.asarray(temperature, jnp.float32))
    if where is not None:
        scaled = jnp.where(where, scaled, _LOG_MASKED)
    log_p = jax.nn.log_softmax(scaled, axis=-1)
    return log_p if zero == LOG_ZERO else jnp.where(ruled_out, jnp.maximum(log_p, zero), log_p)


def log_probabilities(
    loss: str, student: ArrayLike, teacher: ArrayLike, temperature: ArrayLike, axis: int, where: ArrayLike | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Both networks' `log_softmax` with the classes last, and the mask, once the arguments have been checked."""
    check_positive(loss, temperature=temperature)
    where = mask(loss, where, jnp.shape(student), axis)
    zero = log_zero(student, teacher)
    student, teacher = pair(loss, student, teacher, axis)
    check_classes(loss, student.shape)
    return log_softmax(student, temperature, where, zero), log_softmax(teacher, temperature, where, zero), where


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
        axes = (axis,) if isinstance(axis, int) else axis
        return jnp.sum(x, axis=axis) / max(math.prod(x.shape[i] for i in axes), 1)
    where = jnp.broadcast_to(where, x.shape)
    count = jnp.sum(where, axis=axis, dtype=jnp.float32)
    return jnp.sum(x, axis=axis, where=where) / jnp.maximum(count, 1.0)


def centred(x: jax.Array, axis: int, where: jax.Array) -> jax.Array:
    """`x` minus its mean over what is kept, and 0 elsewhere; exactly 0 where all that is kept is equal."""
    largest = jax.lax.stop_gradient(jnp.max(x, axis=axis, keepdims=True, initial=-jnp.inf, where=where))
    # Without this, rounding would give equal numbers a mean that differs from them, and a direction of noise.
    x = jnp.where(where, x - jnp.where(jnp.isneginf(largest), 0.0, largest), 0.0)
    return jnp.where(where, x - jnp.expand_dims(masked_mean(x, axis, where), axis), 0.0)


def nonzero(x: jax.Array) -> jax.Array:
    """`x`, but 1 where it is 0, to divide by."""
    return jnp.where(x == 0, 1.0, x)


def root(x: jax.Array) -> jax.Array:
    """The square root, with a gradient of 0 at 0, where its own is infinite."""
    return jnp.where(x == 0, 0.0, jnp.sqrt(nonzero(x)))


def unit_scale(x: jax.Array, axis: int | tuple[int, ...]) -> jax.Array:
    """`x` divided by its largest magnitude over `axis`, a constant for gradients: later squares neither overflow nor vanish.

    Only for functions that do not change when their input is multiplied by a positive number.
    """
    return x / nonzero(jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=axis, keepdims=True, initial=0.0)))


def l2_normalize(x: jax.Array, axis: int | tuple[int, ...]) -> jax.Array:
    """`x / ||x||` over `axis`; a zero vector stays zero, with zero gradient."""
    x = unit_scale(x, axis)
    squares = jnp.sum(jnp.square(x), axis=axis, keepdims=True)
    return jnp.where(squares == 0, 0.0, x * jax.lax.rsqrt(nonzero(squares)))
