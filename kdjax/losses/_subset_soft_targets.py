"""Soft targets from a teacher that knows only some of the student's classes."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kdjax import numerics
from kdjax.meshes import on_any_mesh


@on_any_mesh
def subset_soft_targets(
    student: ArrayLike,
    teacher: ArrayLike,
    classes: ArrayLike | Sequence[int],
    *,
    temperature: ArrayLike = 4.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """UHC: divergence of the student from a teacher that knows only some of its classes, per example.

    `soft_targets` with the student renormalised over `classes`: what it says of the other classes does not enter the loss. The
    sum over several teachers unites their classes.

    Args:
      student: logits [..., classes of the student], floating point of any precision; arithmetic is in float32.
      teacher: logits [..., classes of the teacher].
      classes: which class of the student each class of the teacher is; integers in the teacher's order, each once.
      temperature: T > 0, a number or a traced scalar.
      axis: the class axis.
      where: boolean, broadcastable to the teacher's logits: classes to keep.

    Returns:
      float32 of shape [...], in nats, never negative; 0 where no class is kept.

    Raises:
      ValueError: shapes or dtypes do not fit, there is a single class, the temperature is not a positive scalar, or `classes`
        are known at trace time and repeat a class or name one that the student does not have. Where they are traced, one that
        the student does not have gives NaN.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[2., 9., 0.]]), jnp.array([[0., 2.]])
    >>> print(subset_soft_targets(student, teacher, [0, 2], temperature=1.0))
    [1.523]

    Reference:
      Vongkulbhisal, Vinayavekhin, Visentini-Scarzanella. Unifying Heterogeneous Classifiers with Distillation. 2019.
      https://arxiv.org/abs/1904.06062
    """
    numerics.check_positive('subset_soft_targets', temperature=temperature)
    zero = numerics.log_zero(student, teacher)
    student = numerics.as_float32('subset_soft_targets: student', student)
    teacher = numerics.as_float32('subset_soft_targets: teacher', teacher)
    numerics.check_axis('subset_soft_targets', axis, student.shape)
    classes = _class_indices(classes, student.shape[axis])
    expected = list(student.shape)
    expected[axis] = classes.size
    if teacher.shape != tuple(expected):
        raise ValueError(
            f'subset_soft_targets: student {student.shape} and teacher {teacher.shape} do not fit: '
            f'with {classes.size} classes the teacher must be {tuple(expected)}'
        )
    where = numerics.mask('subset_soft_targets', where, teacher.shape, axis)
    of_classes = jnp.take(student, classes, axis=axis, mode='fill', fill_value=jnp.nan)
    student, teacher = (jnp.moveaxis(x, axis, -1) for x in (of_classes, teacher))
    numerics.check_classes('subset_soft_targets', teacher.shape)
    log_s, log_t = (numerics.log_softmax(x, temperature, where, zero) for x in (student, teacher))
    return jnp.square(jnp.asarray(temperature, jnp.float32)) * numerics.divergence(log_t, log_s, where)


def _class_indices(classes: ArrayLike | Sequence[int], count: int) -> jax.Array:
    """`classes` as `numerics.check_indices` returns them; once known at trace time, each must be there once."""
    if not isinstance(classes, jax.Array):
        classes = np.asarray(classes)
    if classes.ndim != 1 or not jnp.issubdtype(classes.dtype, jnp.integer):
        raise ValueError(
            f'subset_soft_targets: classes must be a vector of integers, got {classes.dtype} of shape {classes.shape}'
        )
    numbers = numerics.known(classes)
    if numbers is not None and len(np.unique(numbers)) < len(numbers):
        raise ValueError(f'subset_soft_targets: classes must not repeat, got {numbers.tolist()}')
    return numerics.check_indices('subset_soft_targets', 'classes', classes, count)
