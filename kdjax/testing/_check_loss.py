"""All checks that apply to a loss."""

import inspect
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from kdjax.testing._checks import (
    Loss,
    check_axis,
    check_extremes,
    check_gradient,
    check_precision,
    check_transformations,
    check_where,
)


def check_loss(
    loss: Loss,
    student: ArrayLike,
    teacher: ArrayLike,
    *more: ArrayLike,
    where_shape: tuple[int, ...] | None = None,
    **options: Any,
) -> None:
    """Checks that a loss keeps the promises of the losses of `kdjax.losses`.

    `check_precision`, `check_transformations`, `check_gradient` and `check_extremes`; `check_axis` with the classes in every
    place if it takes `axis`; `check_where` along classes and along examples if it takes `where`. Call single ones for a
    loss that keeps some of them: one that stops a gradient on purpose has no `check_gradient`.

    Args:
      loss: `loss(student, teacher, *more, **options)`, which returns one value per example, or a scalar.
      student: floating point [..., classes or channels].
      teacher: floating point, of the same rank.
      *more: labels, integers of the student's shape without the last axis, or other arrays.
      where_shape: of a mask; by default the student's. With (batch,) the mask is of examples, and they alone are sliced.
      **options: handed to the loss; hashable.

    Raises:
      AssertionError: a promise is not kept; the message says which.

    >>> import jax.numpy as jnp
    >>> def squared(student, teacher, *, where=None):
    ...     keep = True if where is None else where
    ...     # What is masked may be infinite, and its difference NaN: it must be gone before.
    ...     student, teacher = (jnp.where(keep, x.astype(jnp.float32), 0.0) for x in (student, teacher))
    ...     return jnp.sum(jnp.square(student - teacher), axis=-1)
    >>> check_loss(squared, *np.random.default_rng(0).normal(size=(2, 4, 3)))
    """
    arrays = student, teacher, *more
    for check in (check_precision, check_transformations, check_gradient, check_extremes):
        check(loss, *arrays, **options)
    rank, taken = np.ndim(student), inspect.signature(loss).parameters
    if 'axis' in taken:
        for axis in range(rank - 1):
            check_axis(loss, *arrays, axis=axis, **options)
    if 'where' in taken:
        for axis in sorted({0, (rank if where_shape is None else len(where_shape)) - 1}):
            check_where(loss, *arrays, axis=axis, where_shape=where_shape, **options)
