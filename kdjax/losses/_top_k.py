"""Soft targets from a teacher's largest logits and the mass of the rest, and how to make such triples for storage."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kdjax import numerics
from kdjax.losses._divergences import between
from kdjax.meshes import on_any_mesh


@on_any_mesh
def top_k_soft_targets(
    student: ArrayLike,
    top_logits: ArrayLike,
    top_indices: ArrayLike,
    rest: ArrayLike,
    *,
    temperature: ArrayLike = 4.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Divergence of the student from the teacher's k largest logits and the mass of the rest, per example.

    T² · KL over k + 1 buckets: the k classes, and one that holds all others. It is at most `soft_targets` of a teacher that
    does not rule out every class, equal to it where k is the number of classes, and never negative. To renormalise over the k
    classes alone, as is often done, would leave the student free to put any mass on the others.

    Args:
      student: logits [..., classes], floating point of any precision; arithmetic is in float32.
      top_logits: the teacher's logits of k classes, [..., k], as it gave them: not divided by T.
      top_indices: integers [..., k], which classes those are, each once. One outside of [0, classes) is an error where it is
        known, and gives NaN where it is traced.
      rest: [...], logsumexp of the teacher's logits divided by T over all other classes; -inf where there are none. Since the
        sum depends on T, a triple that was stored holds for the temperature that it was made with: `top_k_logits` makes it.
      temperature: T > 0, a number or a traced scalar.
      axis: the class axis of `student`, and that of the k in `top_logits` and `top_indices`.
      where: boolean, broadcastable to the student's logits: classes to keep. The triple must have been made with it too.

    Returns:
      float32 of shape [...], in nats, never negative; 0 where no class is kept.

    Raises:
      ValueError: shapes or dtypes do not fit, there is a single class, an index that is known is not one of a class, or the
        temperature is not a positive scalar.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[0., 0., 0., 0.]]), jnp.array([[3., 2., 0., 0.]])
    >>> print(top_k_soft_targets(student, *top_k_logits(teacher, 2, temperature=1.0), temperature=1.0))
    [0.549]

    Reference:
      Hinton, Vinyals, Dean. Distilling the Knowledge in a Neural Network. 2015. https://arxiv.org/abs/1503.02531
    """
    log_s, log_t, kept, wrong = _buckets('top_k_soft_targets', student, top_logits, top_indices, rest, temperature, axis, where)
    divergence = jnp.where(wrong, jnp.nan, numerics.divergence(log_t, log_s, kept))
    return jnp.square(jnp.asarray(temperature, jnp.float32)) * divergence


@on_any_mesh
def top_k_reverse_kl(
    student: ArrayLike,
    top_logits: ArrayLike,
    top_indices: ArrayLike,
    rest: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Reverse divergence of the teacher's k largest logits and the mass of the rest from the student, per example.

    KL(student || teacher) over k + 1 buckets, as `top_k_soft_targets` has them, without its factor T². It is at most
    `reverse_kl` of the whole teacher, and equal to it where k is the number of classes.

    Args:
      student: logits [..., classes], floating point of any precision; arithmetic is in float32.
      top_logits: the teacher's logits of k classes, [..., k].
      top_indices: integers [..., k], which classes those are, each once.
      rest: [...], logsumexp of the teacher's other logits divided by T; see `top_k_logits` and
        `top_k_from_log_probabilities`.
      temperature: T > 0, a number or a traced scalar.
      axis: the class axis of `student`, and that of the k in `top_logits` and `top_indices`.
      where: boolean, broadcastable to the student's logits: classes to keep. The triple must have been made with it too.

    Returns:
      float32 of shape [...], in nats, never negative; 0 where no class is kept.

    Raises:
      ValueError: as `top_k_soft_targets`.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[0., 0., 0., 0.]]), jnp.array([[3., 2., 0., 0.]])
    >>> print(top_k_reverse_kl(student, *top_k_logits(teacher, 2, temperature=1.0)))
    [0.747]

    Reference:
      Gu, Dong, Wei, Huang. MiniLLM: Knowledge Distillation of Large Language Models. 2024. https://arxiv.org/abs/2306.08543
    """
    log_s, log_t, kept, wrong = _buckets('top_k_reverse_kl', student, top_logits, top_indices, rest, temperature, axis, where)
    return jnp.where(wrong, jnp.nan, numerics.divergence(log_s, log_t, kept))


@on_any_mesh
def top_k_jensen_shannon(
    student: ArrayLike,
    top_logits: ArrayLike,
    top_indices: ArrayLike,
    rest: ArrayLike,
    *,
    beta: ArrayLike = 0.5,
    temperature: ArrayLike = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """GKD's divergence between the student and the teacher's k largest logits with the mass of the rest, per example.

    `jensen_shannon` over k + 1 buckets, as `top_k_soft_targets` has them, without its factor T². Equal to it where k is the
    number of classes, and no larger otherwise.

    Args:
      student: logits [..., classes], floating point of any precision; arithmetic is in float32.
      top_logits: the teacher's logits of k classes, [..., k].
      top_indices: integers [..., k], which classes those are, each once.
      rest: [...], logsumexp of the teacher's other logits divided by T; see `top_k_logits` and
        `top_k_from_log_probabilities`.
      beta: β in [0, 1], a number or a traced scalar: the forward divergence at 0, the reverse one at 1.
      temperature: T > 0, a number or a traced scalar.
      axis: the class axis of `student`, and that of the k in `top_logits` and `top_indices`.
      where: boolean, broadcastable to the student's logits: classes to keep. The triple must have been made with it too.

    Returns:
      float32 of shape [...], in nats, never negative; 0 where no class is kept.

    Raises:
      ValueError: as `top_k_soft_targets`, or β is out of range.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[0., 0., 0., 0.]]), jnp.array([[3., 2., 0., 0.]])
    >>> print(top_k_jensen_shannon(student, *top_k_logits(teacher, 2, temperature=1.0)))
    [0.145]

    Reference:
      Agarwal, Vieillard, Zhou, Stanczyk, Ramos, Geist, Bachem. On-Policy Distillation of Language Models: Learning from
      Self-Generated Mistakes. 2024. https://arxiv.org/abs/2306.13649
    """
    numerics.check_share('top_k_jensen_shannon', beta=beta)
    log_s, log_t, kept, wrong = _buckets(
        'top_k_jensen_shannon', student, top_logits, top_indices, rest, temperature, axis, where
    )
    return jnp.where(wrong, jnp.nan, between(log_s, log_t, beta, kept))


def _buckets(
    loss: str,
    student: ArrayLike,
    top_logits: ArrayLike,
    top_indices: ArrayLike,
    rest: ArrayLike,
    temperature: ArrayLike,
    axis: int,
    where: ArrayLike | None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Log probabilities of k + 1 buckets of student and teacher, which of them are kept, and whether an index is wrong."""
    numerics.check_positive(loss, temperature=temperature)
    where = numerics.mask(loss, where, jnp.shape(student), axis)
    zero = numerics.log_zero(student, top_logits)
    student = numerics.as_float32(f'{loss}: student', student)
    top_logits = numerics.as_float32(f'{loss}: top_logits', top_logits)
    rest = numerics.as_float32(f'{loss}: rest', rest)
    numerics.check_axis(loss, axis, student.shape)
    fits = top_logits.ndim == student.ndim and top_logits.shape == jnp.shape(top_indices)
    student = jnp.moveaxis(student, axis, -1)
    if fits:
        top_logits, indices = (jnp.moveaxis(jnp.asarray(x), axis, -1) for x in (top_logits, top_indices))
        fits = top_logits.shape[:-1] == rest.shape == student.shape[:-1]
    if not fits:
        raise ValueError(
            f'{loss}: student {student.shape} (classes last) needs top_logits and top_indices of its shape but for '
            f'k classes, and rest {student.shape[:-1]}, got {top_logits.shape}, {jnp.shape(top_indices)} and {rest.shape}'
        )
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise ValueError(f'{loss}: top_indices must be integer class indices, got {indices.dtype}')

    classes = student.shape[-1]
    numerics.check_classes(loss, student.shape)
    numerics.check_indices(loss, 'top_indices', top_indices, classes)
    indices = indices.astype(jnp.int32)  # of 16 bits they could not be compared with a larger number of classes
    wrong = jnp.any((indices < 0) | (indices >= classes), axis=-1)

    temperature = jnp.asarray(temperature, jnp.float32)
    log_s = numerics.log_softmax(student, temperature, where, zero)
    kept = jnp.ones(student.shape, jnp.bool_) if where is None else where
    indices = jnp.clip(indices, 0, classes - 1)
    others = jnp.put_along_axis(kept, indices, jnp.bool_(False), axis=-1, inplace=False)
    log_other = jax.nn.logsumexp(jnp.where(others, log_s, numerics.LOG_ZERO), axis=-1, keepdims=True)
    log_s = jnp.concatenate([jnp.take_along_axis(log_s, indices, axis=-1), log_other], axis=-1)
    buckets = [jnp.take_along_axis(kept, indices, axis=-1), jnp.any(others, axis=-1, keepdims=True)]
    kept = jnp.concatenate(buckets, axis=-1)
    log_t = numerics.log_softmax(jnp.concatenate([top_logits / temperature, rest[..., None]], axis=-1), where=kept)
    return log_s, log_t, kept, wrong


@on_any_mesh
def top_k_logits(
    teacher: ArrayLike, k: int, *, temperature: ArrayLike = 4.0, axis: int = -1, where: ArrayLike | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The teacher's k largest logits, their classes, and the mass of the rest, as `top_k_soft_targets` takes them.

    Storing these instead of all logits makes a teacher's predictions on a data set C / (2k + 1) times smaller.

    Args:
      teacher: logits [..., classes], floating point of any precision; arithmetic is in float32.
      k: how many classes to keep, at most all.
      temperature: T > 0, that of the loss: `rest` depends on it.
      axis: the class axis.
      where: boolean, broadcastable to the logits: classes to keep.

    Returns:
      Logits as they were [..., k] in float32, largest first; class indices [..., k], int32; and logsumexp(z / T) over all other
      classes [...], float32, -inf where there are none.

    Raises:
      ValueError: there are no k classes, or there is a single one, the dtype is not floating point, or the temperature is not a
        positive scalar.

    >>> import jax.numpy as jnp
    >>> logits, indices, rest = top_k_logits(jnp.array([0., 5., 0., 7.]), 2, temperature=1.0)
    >>> print(logits, indices, rest)
    [7. 5.] [3 1] 0.693
    """
    numerics.check_positive('top_k_logits', temperature=temperature)
    where = numerics.mask('top_k_logits', where, jnp.shape(teacher), axis)
    teacher = numerics.as_float32('top_k_logits: teacher', teacher)
    numerics.check_axis('top_k_logits', axis, teacher.shape)
    teacher = jnp.moveaxis(teacher, axis, -1)
    numerics.check_classes('top_k_logits', teacher.shape)
    if not 1 <= k <= teacher.shape[-1]:
        raise ValueError(f'top_k_logits: k must be between 1 and the number of classes, {teacher.shape[-1]}, got {k}')
    if where is not None:
        teacher = jnp.where(where, teacher, -jnp.inf)
    logits, indices = jax.lax.top_k(teacher, k)
    others = jnp.put_along_axis(teacher, indices, jnp.float32(-jnp.inf), axis=-1, inplace=False)
    possible = ~jnp.isneginf(others)
    scaled = jnp.where(possible, others, numerics.LOG_ZERO) / jnp.asarray(temperature, jnp.float32)
    rest = jax.nn.logsumexp(jnp.where(possible, scaled, numerics.LOG_ZERO), axis=-1)
    rest = jnp.where(jnp.any(possible, axis=-1), rest, -jnp.inf)
    return jnp.moveaxis(logits, -1, axis), jnp.moveaxis(indices.astype(jnp.int32), -1, axis), rest


@on_any_mesh
def top_k_from_log_probabilities(log_probabilities: ArrayLike, *, axis: int = -1) -> tuple[jax.Array, jax.Array]:
    """The logits and the rest that the `top_k_*` losses take, of the k log probabilities that inference servers return.

    Log probabilities are logits whose logsumexp is 0, so they stay as they are, and the rest is log(1 - Σ p). Both hold for
    temperature 1.

    Args:
      log_probabilities: of k classes [..., k], floating point of any precision; arithmetic is in float32.
      axis: of the k.

    Returns:
      The logits in float32 [..., k], and the rest [...], -inf where the k have all of the probability.

    Raises:
      ValueError: the dtype is not floating point, or probabilities that are known sum to more than 1.001.

    >>> import jax.numpy as jnp
    >>> logits, rest = top_k_from_log_probabilities(jnp.log(jnp.array([0.5, 0.25])))
    >>> print(logits, rest)
    [-0.693 -1.386] -1.386
    """
    name = 'top_k_from_log_probabilities'
    logits = numerics.as_float32(f'{name}: log_probabilities', log_probabilities)
    numerics.check_axis(name, axis, logits.shape)
    total = jax.nn.logsumexp(jnp.where(jnp.isneginf(logits), numerics.LOG_ZERO, logits), axis=axis)
    sums = numerics.known(total)
    if sums is not None and np.any(sums > np.log(1.001)):
        raise ValueError(f'{name}: probabilities of an example sum to {np.exp(np.max(sums)):.4g}, more than 1')
    # What rounding leaves of nothing is nothing.
    inside = total < -1e-6
    rest = jnp.where(inside, jnp.log(-jnp.expm1(jnp.where(inside, total, -1.0))), -jnp.inf)
    return logits, jnp.where(total > np.float32(np.log(1.001)), jnp.nan, rest)
