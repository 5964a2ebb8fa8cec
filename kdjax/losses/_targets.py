"""Losses for targets that are no single class: several labels at a time, and numbers to predict.

`binary_labels` and `binary_soft_targets` take each class for a question of its own, yes or no, with the sigmoid of its logit as
the probability of yes; one logit is enough. `regression` and `bounded_regression` take outputs as numbers.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kdjax import numerics
from kdjax.meshes import on_any_mesh


@on_any_mesh
def binary_labels(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    class_weights: ArrayLike | None = None,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Cross-entropy with yes or no for each class, per example: the mean over the classes.

    Σ_c w_c ℓ_c / Σ_c w_c, with ℓ = -y log σ(z) - (1 - y) log σ(-z) over the classes of which the label is known. Torch's
    BCEWithLogitsLoss is the same for the mean over a batch, but counts unknown ones and divides by their number where there
    are weights. Some papers take the sum over the classes, which is C times as much.

    Args:
      logits: z [..., classes], floating point of any precision; arithmetic is in float32. There may be one class.
      labels: y of the same shape: booleans; integers 0 and 1, where a negative one says that it is not known; or probabilities.
      class_weights: w [classes], not negative; a class of weight 0 does not count. All 1 by default.
      axis: the class axis.
      where: boolean, broadcastable to the logits: classes to keep.

    Returns:
      float32 of shape [...], in nats, never negative; 0 where no class is kept. NaN where a label is traced and not in [0, 1].

    Raises:
      ValueError: shapes or dtypes do not fit; labels that are kept are known to be above 1, or below 0 and no integers; or
        weights are negative.

    >>> import jax.numpy as jnp
    >>> print(binary_labels(jnp.array([[2., -2., 9.], [2., -2., 9.]]), jnp.array([[1, 0, -1], [0, 0, -1]])))
    [0.127 1.127]

    Reference:
      Zhang, Zhou. A Review on Multi-Label Learning Algorithms. 2014. https://doi.org/10.1109/TKDE.2013.39
    """
    labels = labels if isinstance(labels, jax.Array) else np.asarray(labels)
    integers = jnp.issubdtype(labels.dtype, jnp.integer)
    if not (integers or labels.dtype == jnp.bool_ or jnp.issubdtype(labels.dtype, jnp.floating)):
        raise ValueError(f'binary_labels: labels must be boolean, integer or floating point, got {labels.dtype}')
    where = numerics.mask('binary_labels', where, jnp.shape(logits), axis)
    zero = numerics.log_zero(logits)
    logits = numerics.as_float32('binary_labels: logits', logits)
    _same_shape('binary_labels', axis, logits=logits, labels=labels)
    logits, labels = jnp.moveaxis(logits, axis, -1), jnp.moveaxis(labels, axis, -1)
    weights = _class_weights(class_weights, logits.shape[-1])

    kept = jnp.broadcast_to(weights != 0, logits.shape)
    kept = kept if where is None else kept & where
    kept = kept & (labels >= 0) if integers else kept
    targets = jnp.where(kept, labels.astype(jnp.float32), 0.0)
    wrong = ~((targets >= 0) & (targets <= 1))
    found, numbers = numerics.known(wrong), numerics.known(targets)
    if found is not None and numbers is not None and np.any(found):
        raise ValueError(
            f'binary_labels: labels must be 0 or 1, negative integers where they are not known, or probabilities, '
            f'got {numbers[found][0]:g}'
        )
    log_yes, log_no = _log_probabilities(jnp.where(kept, logits, 0.0), 1.0, zero)
    losses = jnp.where(wrong, jnp.nan, -targets * log_yes - (1 - targets) * log_no)
    weights = jnp.where(kept, weights, 0.0)
    total = jnp.sum(weights, axis=-1)
    return jnp.sum(weights * losses, axis=-1) / jnp.where(total == 0, 1.0, total)


@on_any_mesh
def binary_soft_targets(
    student: ArrayLike, teacher: ArrayLike, *, temperature: ArrayLike = 1.0, axis: int = -1, where: ArrayLike | None = None
) -> jax.Array:
    """MLD: divergence from the teacher's yes or no for each class, softened, per example: the mean over the classes.

    T² · Σ_c KL(Bernoulli(σ(z_t / T)) || Bernoulli(σ(z_s / T))) / C. The reference has T = 1 and the sum over the classes: its
    weight of 10 for the 80 classes of COCO is 800 for this mean.

    Args:
      student: logits [..., classes], floating point of any precision; arithmetic is in float32. There may be one class.
      teacher: logits of the same shape.
      temperature: T > 0, a number or a traced scalar.
      axis: the class axis.
      where: boolean, broadcastable to the logits: classes to keep.

    Returns:
      float32 of shape [...], in nats, never negative; 0 where no class is kept.

    Raises:
      ValueError: shapes or dtypes do not fit, or the temperature is not positive.

    >>> import jax.numpy as jnp
    >>> print(binary_soft_targets(jnp.array([[0., 0.], [2., 0.]]), jnp.array([[2., 0.], [2., 0.]])))
    [0.164 0.   ]

    Reference:
      Yang, Xie, Zong, Feng, Niu, Sugiyama, Huang. Multi-Label Knowledge Distillation. 2023. https://arxiv.org/abs/2308.06453
    """
    numerics.check_positive('binary_soft_targets', temperature=temperature)
    where = numerics.mask('binary_soft_targets', where, jnp.shape(student), axis)
    zero = numerics.log_zero(student, teacher)
    student, teacher = numerics.pair('binary_soft_targets', student, teacher, axis)
    if where is not None:
        student, teacher = jnp.where(where, student, 0.0), jnp.where(where, teacher, 0.0)
    temperature = jnp.asarray(temperature, jnp.float32)
    log_s, log_t = (jnp.stack(_log_probabilities(x, temperature, zero), axis=-1) for x in (student, teacher))
    return jnp.square(temperature) * numerics.masked_mean(numerics.divergence(log_t, log_s), -1, where)


@on_any_mesh
def regression(
    student: ArrayLike,
    targets: ArrayLike,
    *,
    delta: ArrayLike | None = None,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Squared distance from the targets, or Huber's, per example: the mean over the outputs.

    e² with e = s - y. With `delta`, e² / 2 up to |e| = δ and δ (|e| - δ / 2) beyond: near 0 it is half the former, as in
    optax and torch, and large errors have a gradient of δ at most. The targets may be a teacher's outputs.

    Args:
      student: outputs [..., outputs], floating point of any precision; arithmetic is in float32.
      targets: y of the same shape.
      delta: δ > 0, a number or a traced scalar.
      axis: the axis of the outputs.
      where: boolean, broadcastable to the outputs: those to keep, such as targets that are known.

    Returns:
      float32 of shape [...], in squared units of the outputs; 0 where none is kept.

    Raises:
      ValueError: shapes or dtypes do not fit, or delta is not positive.

    >>> import jax.numpy as jnp
    >>> student, targets = jnp.array([[1., 4.]]), jnp.array([[0., 0.]])
    >>> print(regression(student, targets), regression(student, targets, delta=1.0))
    [8.5] [2.]

    Reference:
      Huber. Robust Estimation of a Location Parameter. 1964. https://doi.org/10.1214/aoms/1177703732
    """
    if delta is not None:
        numerics.check_positive('regression', delta=delta)
    (errors,), where = _errors('regression', axis, where, targets, student=student)
    if delta is None:
        return numerics.masked_mean(jnp.square(errors), -1, where)
    delta, size = jnp.asarray(delta, jnp.float32), jnp.abs(errors)
    near = jnp.minimum(size, delta)
    return numerics.masked_mean(jnp.square(near) / 2 + delta * (size - near), -1, where)


@on_any_mesh
def bounded_regression(
    student: ArrayLike,
    teacher: ArrayLike,
    targets: ArrayLike,
    *,
    margin: ArrayLike = 0.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Squared distance from the targets, unless it is less than the teacher's by a margin, per example: the sum over outputs.

    ||s - y||² where ||s - y||² + m > ||t - y||², else 0: a teacher of numbers may be wrong without bound, so it only says when
    a student is good enough. That is decided for each example, such as a box of 4 outputs; a public implementation for SSD
    compares the means over a batch. The teacher has no gradient. The reference adds half of it to the usual loss.

    Args:
      student: outputs [..., outputs], floating point of any precision; arithmetic is in float32.
      teacher: outputs of the same shape.
      targets: y of the same shape.
      margin: m, a number or a traced scalar, in squared units of the outputs.
      axis: the axis of the outputs.
      where: boolean, broadcastable to the outputs: those to keep.

    Returns:
      float32 of shape [...], in squared units of the outputs; 0 where none is kept.

    Raises:
      ValueError: shapes or dtypes do not fit.

    >>> import jax.numpy as jnp
    >>> student, teacher, targets = jnp.array([[2., 0.], [2., 0.]]), jnp.array([[1., 0.], [3., 0.]]), jnp.zeros([2, 2])
    >>> print(bounded_regression(student, teacher, targets))
    [4. 0.]

    Reference:
      Chen, Choi, Yu, Han, Chandraker. Learning Efficient Object Detection Models with Knowledge Distillation. 2017.
      https://papers.nips.cc/paper/6676-learning-efficient-object-detection-models-with-knowledge-distillation
    """
    numerics.check_scalars('bounded_regression', margin=margin)
    errors, where = _errors('bounded_regression', axis, where, targets, student=student, teacher=teacher)
    of_student, of_teacher = (jnp.sum(jnp.square(x), axis=-1, where=where) for x in errors)
    counts = of_student + jnp.asarray(margin, jnp.float32) > of_teacher
    # A comparison with NaN is false, and would make a number of it.
    return jnp.where(jnp.isnan(of_teacher), jnp.nan, counts.astype(jnp.float32)) * of_student


def _log_probabilities(logits: jax.Array, temperature: ArrayLike, zero: float) -> tuple[jax.Array, jax.Array]:
    """The logs of the probabilities of yes and of no; a class at -inf is a certain no, and yes has the log `zero`."""
    impossible = jnp.isneginf(logits)
    scaled = jnp.where(impossible, 0.0, logits) / jnp.asarray(temperature, jnp.float32)
    scaled = jnp.where(impossible, zero, scaled)
    return jax.nn.log_sigmoid(scaled), jax.nn.log_sigmoid(-scaled)


def _errors(
    loss: str, axis: int, where: ArrayLike | None, targets: ArrayLike, **sides: ArrayLike
) -> tuple[list[jax.Array], jax.Array | None]:
    """The differences of the networks' outputs from the targets, with `axis` last, 0 where they are not kept; and the mask."""
    where = numerics.mask(loss, where, jnp.shape(sides['student']), axis)
    targets = numerics.as_float32(f'{loss}: targets', targets)
    sides = {name: numerics.as_float32(f'{loss}: {name}', x) for name, x in sides.items()}
    _same_shape(loss, axis, **sides, targets=targets)
    targets, *outputs = (jnp.moveaxis(x, axis, -1) for x in (targets, *sides.values()))
    if where is not None:
        targets, *outputs = (jnp.where(where, x, 0.0) for x in (targets, *outputs))
    errors = [x - targets for x in outputs]
    return [jnp.where(jnp.isfinite(x), x, jnp.nan) for x in errors], where


def _same_shape(loss: str, axis: int, **arrays: Any) -> None:
    first, *_ = arrays.values()
    numerics.check_axis(loss, axis, first.shape)
    if any(x.shape != first.shape for x in arrays.values()):
        told = ', '.join(f'{name} {x.shape}' for name, x in arrays.items())
        raise ValueError(f'{loss}: shapes must be the same, got {told}')


def _class_weights(weights: ArrayLike | None, classes: int) -> jax.Array:
    weights = jnp.ones(classes) if weights is None else numerics.as_float32('binary_labels: class_weights', weights)
    if weights.shape != (classes,):
        raise ValueError(f'binary_labels: class_weights must be [classes], ({classes},), got {weights.shape}')
    numbers = numerics.known(weights)
    if numbers is not None and not np.all(numbers >= 0):
        raise ValueError(f'binary_labels: class_weights must not be negative, got {numbers.tolist()}')
    return weights
