"""Checks of a loss that raise an AssertionError, each of one promise that the losses of `kdjax.losses` keep."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

Loss = Callable[..., jax.Array]
"""`loss(student, teacher, [labels, ...], *, where=None, axis=-1)`: one value per example, or a scalar."""

# What another order of summation changes, in float32.
_RELATIVE, _ABSOLUTE = 2e-6, 1e-6


def check_precision(loss: Loss, *arrays: ArrayLike, **options: Any) -> None:
    """Half precision costs what rounding the inputs costs, and no more: the loss computes in float32.

    Values and gradients for student in bfloat16 and teacher in float16 must be exactly those for the same numbers in float32,
    the values in float32, and each gradient rounded to the dtype of its input.

    Args:
      loss: the loss.
      *arrays: student, teacher and what else it takes; those that are floating point are rounded.
      **options: handed to the loss; hashable.

    >>> import numpy as np
    >>> from kdjax import losses
    >>> check_precision(losses.soft_targets, *np.random.default_rng(0).normal(size=(2, 4, 3)))
    """
    dtypes = iter((jnp.bfloat16, jnp.float16) * len(arrays))
    rounded = [x.astype(next(dtypes)) if _is_floating(x) else x for x in _float32(arrays)]
    values, *gradients = _values_and_gradients(loss, rounded, options)
    expected, *expected_gradients = _values_and_gradients(loss, _float32(rounded), options)
    assert values.dtype == np.float32, f'the loss returns {values.dtype}, not float32'
    np.testing.assert_array_equal(values, expected, err_msg='half precision is not the float32 of its inputs')
    floating = [x for x in rounded if _is_floating(x)]
    for gradient, reference, x in zip(gradients, expected_gradients, floating, strict=True):
        assert gradient.dtype == x.dtype, f'the gradient of an input in {x.dtype} is {gradient.dtype}'
        np.testing.assert_array_equal(gradient, reference.astype(x.dtype), err_msg='gradients of half precision')


def check_transformations(loss: Loss, *arrays: ArrayLike, **options: Any) -> None:
    """Eager, `jax.jit` and `jax.vmap` agree on values and gradients, up to the order of summation.

    Args:
      loss: the loss.
      *arrays: student, teacher and what else it takes.
      **options: handed to the loss; hashable.

    >>> import numpy as np
    >>> from kdjax import losses
    >>> check_transformations(losses.soft_targets, *np.random.default_rng(0).normal(size=(2, 4, 3)))
    """
    given = _float32(arrays)
    other = [0.5 * x if _is_floating(x) else x for x in given]
    stacked = [np.stack([x, y]) for x, y in zip(given, other, strict=True)]
    function = functools.partial(_differentiated, loss, tuple(options.items()))
    mapped = jax.device_get(jax.jit(jax.vmap(lambda *x: function(x)))(*stacked))
    for i, each in enumerate((given, other)):
        eager = jax.device_get(function([jnp.asarray(x) for x in each]))
        _assert_close([x[i] for x in mapped], eager, 'vmap')
        _assert_close(_values_and_gradients(loss, each, options), eager, 'jit')


def check_gradient(loss: Loss, *arrays: ArrayLike, step: float = 2e-3, rtol: float = 1e-2, **options: Any) -> None:
    """The gradient is that of the values: finite differences along random directions agree with it.

    Of the sum of all values, for each floating point array alone, as (8 · (f(x+h) - f(x-h)) - (f(x+2h) - f(x-2h))) / 12, whose
    error is of the order of h⁴. A loss that takes a part of its input as a number, by `jax.lax.stop_gradient`, fails, as it
    should. Keep away from corners, such as those of a ReLU.

    Args:
      loss: the loss.
      *arrays: student, teacher and what else it takes.
      step: h, of a direction whose root mean square is 1.
      rtol: how far they may be apart, relative to the length of the gradient.
      **options: handed to the loss; hashable.

    >>> import numpy as np
    >>> from kdjax import losses
    >>> check_gradient(losses.soft_targets, *np.random.default_rng(0).normal(size=(2, 4, 3)))
    """
    given = _float32(arrays)
    _, *gradients = _values_and_gradients(loss, given, options)
    rng = np.random.default_rng(0)
    floating = [i for i, x in enumerate(given) if _is_floating(x)]
    for i, gradient in zip(floating, gradients, strict=True):
        for _ in range(3):
            direction = rng.normal(size=gradient.shape)

            def moved(by: float, i: int = i, direction: np.ndarray = direction) -> float:
                shifted = [*given[:i], (given[i] + by * direction).astype(np.float32), *given[i + 1 :]]
                return float(np.sum(_values_and_gradients(loss, shifted, options)[0], dtype=np.float64))

            near, far = (moved(h) - moved(-h) for h in (step, 2 * step))
            expected = (8 * near - far) / (12 * step)
            found, length = float(np.sum(gradient * direction)), float(np.linalg.norm(gradient) * np.linalg.norm(direction))
            assert abs(found - expected) <= rtol * length + 1e-4, (
                f'argument {i}: the gradient says {found:.6g} along a direction in which the values change by {expected:.6g}'
            )


def check_axis(loss: Loss, *arrays: ArrayLike, axis: int, where: ArrayLike | None = None, **options: Any) -> None:
    """`axis` says where the classes or channels are, and nothing else: equals moving them to the end.

    Args:
      loss: a loss that takes `axis`.
      *arrays: student, teacher, with the axis last, and what else it takes; what has fewer axes, such as labels, stays.
      axis: where to move the axis.
      where: a mask; it moves as the arrays do, if it has as many axes.
      **options: handed to the loss; hashable.

    >>> import numpy as np
    >>> from kdjax import losses
    >>> check_axis(losses.soft_targets, *np.random.default_rng(0).normal(size=(2, 4, 3)), axis=0)
    """
    given = _float32(arrays)
    rank = given[0].ndim

    def move(x: Any) -> Any:
        return np.moveaxis(x, -1, axis) if x is not None and np.ndim(x) == rank else x

    values, *gradients = _values_and_gradients(loss, [move(x) for x in given], {'axis': axis, **options}, move(where))
    back = [np.moveaxis(x, axis, -1) if x.ndim == rank else x for x in gradients]
    _assert_close([values, *back], _values_and_gradients(loss, given, options, where), f'axis={axis}')


def check_where(
    loss: Loss,
    *arrays: ArrayLike,
    axis: int | Sequence[int] = -1,
    where_shape: tuple[int, ...] | None = None,
    where_axis: int | None = None,
    seed: int = 0,
    **options: Any,
) -> None:
    """A mask does what slicing does: for values and gradients, whatever is masked, which gets no gradient.

    A third of an axis is masked, at least one element. Labels, integers of the shape of the student without its last axis, are
    made classes that are kept where that is the axis. A mask that keeps nothing must give zeros, with zero gradients.

    Args:
      loss: a loss that takes `where`.
      *arrays: student, teacher and what else it takes.
      axis: of the student and teacher, which to slice: -1 the classes, 0 the examples; several, such as both axes of a map
        from positions to positions.
      where_shape: of the mask; by default the student's.
      where_axis: the mask's axis that is sliced, where it is not the arrays'.
      seed: of what is kept.
      **options: handed to the loss; hashable.

    >>> import numpy as np
    >>> from kdjax import losses
    >>> check_where(losses.soft_targets, *np.random.default_rng(0).normal(size=(2, 4, 3)))
    """
    given = _float32(arrays)
    rank = given[0].ndim
    axes = [i % rank for i in np.atleast_1d(axis)]
    size = given[0].shape[axes[0]]
    shape = given[0].shape if where_shape is None else where_shape
    masked_axis = axes[0] % len(shape) if where_axis is None else where_axis
    kept = np.sort(np.random.default_rng(seed).permutation(size)[: size - max(1, size // 3)])
    keep = np.isin(np.arange(size), kept)
    where = np.broadcast_to(keep.reshape([size if i == masked_axis else 1 for i in range(len(shape))]), shape)

    def sliced(x: np.ndarray) -> np.ndarray:
        return functools.reduce(lambda x, i: np.compress(keep, x, i), axes, x)

    of_classes = axes[0] == rank - 1
    masked, smaller = list(given), [sliced(x) if x.ndim == rank else x for x in given]
    for i, x in enumerate(given):
        if not _is_floating(x) and x.ndim < rank:
            masked[i], smaller[i] = (kept[x % len(kept)], x % len(kept)) if of_classes else (x, np.compress(keep, x, axes[0]))
            masked[i], smaller[i] = masked[i].astype(x.dtype), smaller[i].astype(x.dtype)
    values, *gradients = _values_and_gradients(loss, masked, options, where)
    expected, *expected_gradients = _values_and_gradients(loss, smaller, options)
    if values.shape != expected.shape:  # one value for each example, of which some are sliced away
        np.testing.assert_array_equal(np.compress(~keep, values, axes[0]), 0.0, err_msg='values of what is masked')
        values = np.compress(keep, values, axes[0])
    _assert_close([values, *map(sliced, gradients)], [expected, *expected_gradients], 'a mask and slicing')
    for gradient in gradients:
        for i in axes:
            np.testing.assert_array_equal(np.compress(~keep, gradient, i), 0.0, err_msg='gradients of what is masked')
    _check_masked_content(loss, masked, options, where, (keep, axes))
    for result in _values_and_gradients(loss, masked, options, np.zeros(shape, np.bool_)):
        np.testing.assert_array_equal(result, 0.0, err_msg='a mask that keeps nothing')


def _check_masked_content(
    loss: Loss, arrays: list[np.ndarray], options: dict[str, Any], where: np.ndarray, sliced: tuple[np.ndarray, list[int]]
) -> None:
    """Whatever is behind the mask changes nothing."""
    keep, axes = sliced
    expected = _values_and_gradients(loss, arrays, options, where)
    for fill in (1e15, -1e15, np.inf, -np.inf, np.nan):
        filled = []
        for x in arrays:
            hidden = np.zeros(x.shape, np.bool_)
            if _is_floating(x):
                for i in axes:
                    hidden |= ~keep.reshape([-1 if i == j else 1 for j in range(x.ndim)])
            filled.append(np.where(hidden, x.dtype.type(fill) if _is_floating(x) else x, x))
        for result, reference in zip(_values_and_gradients(loss, filled, options, where), expected, strict=True):
            np.testing.assert_array_equal(result, reference, err_msg=f'{fill} behind the mask')


def check_extremes(loss: Loss, *arrays: ArrayLike, largest: float = 1e4, **options: Any) -> None:
    """Values and gradients are finite at zero, at numbers of ±`largest`, where both networks agree, and where they are opposed.

    Args:
      loss: the loss.
      *arrays: student, teacher and what else it takes; of the first two, the shapes count alone.
      largest: how large numbers may become.
      **options: handed to the loss; hashable.

    >>> import numpy as np
    >>> from kdjax import losses
    >>> check_extremes(losses.soft_targets, *np.zeros((2, 4, 3)))
    """
    given = _float32(arrays)
    for what, student, teacher in _extremes(given[0].shape, given[1].shape, largest):
        results = _values_and_gradients(loss, [student, teacher, *given[2:]], options)
        for kind, result in zip(('value', *['gradient'] * len(results)), results, strict=False):
            assert np.all(np.isfinite(result)), f'{what}: a {kind} is not finite'


def _extremes(first: tuple[int, ...], second: tuple[int, ...], largest: float) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    student, teacher = (rng.choice([-1.0, 0.5, 1.0], size=shape).astype(np.float32) for shape in (first, second))
    yield 'zeros', np.zeros(first, np.float32), np.zeros(second, np.float32)
    yield 'a student of zeros', np.zeros(first, np.float32), teacher
    yield 'a teacher of zeros', student, np.zeros(second, np.float32)
    for scale in (1e-30, 1e-6, largest):
        yield f'numbers of {scale:g}', np.float32(scale) * student, np.float32(scale) * teacher
        if first == second:
            yield f'equal numbers of {scale:g}', np.float32(scale) * student, np.float32(scale) * student
            yield f'opposed numbers of {scale:g}', np.float32(scale) * student, np.float32(-scale) * student


def _is_floating(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _float32(arrays: Sequence[ArrayLike]) -> list[np.ndarray]:
    return [x.astype(np.float32) if _is_floating(x) else x for x in map(np.asarray, arrays)]


def _differentiated(
    loss: Loss, options: tuple[tuple[str, Any], ...], arrays: Sequence[Any], where: Any = None
) -> tuple[jax.Array, ...]:
    """Values, and the gradients of their sum with respect to all floating point arrays."""
    floating = [i for i, x in enumerate(arrays) if _is_floating(x)]

    def of_floating(*chosen: Any) -> jax.Array:
        given = list(arrays)
        for i, x in zip(floating, chosen, strict=True):
            given[i] = x
        return loss(*given, **dict(options), **({} if where is None else {'where': where}))

    values, pullback = jax.vjp(of_floating, *(arrays[i] for i in floating))
    return values, *pullback(jnp.ones_like(values))


_compiled = jax.jit(_differentiated, static_argnums=(0, 1))


def _values_and_gradients(
    loss: Loss, arrays: Sequence[Any], options: dict[str, Any], where: ArrayLike | None = None
) -> list[np.ndarray]:
    """Under `jax.jit`, as numpy arrays; options are what is not traced."""
    return [*jax.device_get(_compiled(loss, tuple(options.items()), list(arrays), where))]


def _assert_close(first: Sequence[Any], second: Sequence[Any], what: str) -> None:
    for i, (x, y) in enumerate(zip(first, second, strict=True)):
        np.testing.assert_allclose(x, y, _RELATIVE, _ABSOLUTE, err_msg=f'{what}: {"values" if i == 0 else f"gradient {i}"}')
