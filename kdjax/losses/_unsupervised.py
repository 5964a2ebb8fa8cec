"""Losses that need no labels: reconstruction, attention between layers, small activations, and confident, diverse predictions.

Those with a student and a teacher return one value per example. The others are about one network: `activation_size`, per
example, and `diversity`, which looks at the whole batch and is a scalar.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kdjax import numerics
from kdjax.losses._activations import activations
from kdjax.meshes import on_any_mesh


@on_any_mesh
def reconstruction(student: ArrayLike, teacher: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None) -> jax.Array:
    """Squared distance of an output from what it should reconstruct, per example.

    ||f(x) - y||², the sum over all but the first axis, where `hint` takes the mean. The target y is the input x itself, as for
    an autoencoder, or the teacher's output for it.

    Args:
      student: outputs f(x) [batch, ...], floating point of any precision; arithmetic is in float32.
      teacher: targets of the same shape.
      axis: any axis: the sum is over all of them.
      where: boolean, broadcastable to the outputs: elements to keep.

    Returns:
      float32 [batch], in squared units of the output; 0 where nothing is kept.

    Raises:
      ValueError: the shapes differ, there is no axis of examples, or a dtype is not floating point.

    >>> import jax.numpy as jnp
    >>> print(reconstruction(jnp.array([[1., 2.], [0., 3.]]), jnp.array([[2., 4.], [0., 3.]])))
    [5. 0.]

    Reference:
      Hinton, Salakhutdinov. Reducing the Dimensionality of Data with Neural Networks. 2006.
      https://doi.org/10.1126/science.1127647
    """
    student, teacher, where = activations('reconstruction', student, teacher, axis, where)
    return jnp.sum(jnp.square(student - teacher), axis=tuple(range(1, student.ndim)), where=where)


@on_any_mesh
def attention_distillation(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    variant: Literal['layer', 'inner_product'] = 'layer',
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """How far the student is from the teacher where the teacher attends, per example.

    `variant='layer'`: mean over all but the first axis of (f_s - f_t)² · softmax(f_t)², the softmax over the channels, for
    activations of the same layer in both networks. `variant='inner_product'`: (aᵀf)² + ||f||², with the teacher's attention a
    and the student's features f flattened; it is least where the student's features are small and orthogonal to a, and so
    wants another loss beside it, such as `reconstruction`.

    Args:
      student: activations [batch, ..., channels], floating point of any precision; arithmetic is in float32.
      teacher: activations, or attention, of the same shape.
      variant: `'layer'` or `'inner_product'`.
      axis: the channel axis.
      where: boolean, broadcastable to the activations: elements to keep.

    Returns:
      float32 [batch], in squared units of the activation, or of activation times attention; 0 where nothing is kept.

    Raises:
      ValueError: the shapes differ, there is no axis of examples, a dtype is not floating point, or the variant is unknown.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[1., 2.]]), jnp.array([[3., 3.]])
    >>> print(attention_distillation(student, teacher), attention_distillation(student, teacher, variant='inner_product'))
    [0.625] [86.]
    """
    if variant not in ('layer', 'inner_product'):
        raise ValueError(f"attention_distillation: variant must be 'layer' or 'inner_product', got {variant!r}")
    student, teacher, where = activations('attention_distillation', student, teacher, axis, where)
    inner = tuple(range(1, student.ndim))
    if variant == 'layer':
        attention = jnp.exp(numerics.log_softmax(teacher, where=where))
        return numerics.masked_mean(jnp.square((student - teacher) * attention), inner, where)
    product = jnp.sum(teacher * student, axis=inner, where=where)
    return jnp.square(product) + jnp.sum(jnp.square(student), axis=inner, where=where)


@on_any_mesh
def activation_size(features: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
    """Squared norm of an activation, an objective for small ones, per example.

    ||f||², the sum of squares over all but the first axis.

    Args:
      features: activations [batch, ...], floating point of any precision; arithmetic is in float32.
      where: boolean, broadcastable to the activations: elements to keep.

    Returns:
      float32 [batch], in squared units of the activation; 0 where nothing is kept.

    Raises:
      ValueError: there is no axis of examples, the mask does not fit, or a dtype is not floating point.

    >>> import jax.numpy as jnp
    >>> print(activation_size(jnp.array([[3., 4.], [0., 1.]])))
    [25. 1.]
    """
    features = numerics.as_float32('activation_size: features', features)
    if features.ndim < 1:
        raise ValueError(f'activation_size: features must be [batch, ...], got {features.shape}')
    features, where = numerics.finite_or_nan(features), numerics.mask('activation_size', where, features.shape, -1)
    features = features if where is None else jnp.where(where, features, 0.0)
    return jnp.sum(jnp.square(features), axis=tuple(range(1, features.ndim)))


@on_any_mesh
def diversity(
    logits: ArrayLike,
    *,
    threshold: ArrayLike = 0.9,
    sharpness: ArrayLike = 20.0,
    beta: ArrayLike = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """How unsure single predictions are, and how unevenly a batch of them uses the classes, a scalar.

    1 - mean_i σ(k (max_c p_ic - θ)) / σ(k (1 - θ)) + β (C log(B / C) - Σ_c log Σ_i p_ic), with p = softmax(z) of B examples
    over C classes, the threshold θ and the sharpness k. The first part is the share of the predictions that are not confident,
    with a smooth step at θ, scaled to be 0 where all are certain. The second is C times the divergence of the mean prediction
    from the uniform distribution: 0 where all classes are used alike, and large where they collapse to a few. Either alone has
    a trivial optimum: one class for all, or the uniform prediction for all.

    Args:
      logits: [batch, classes] or [batch, positions, classes], where each position counts as an example; floating point of any
        precision; arithmetic is in float32.
      threshold: θ in (0, 1], the probability from which a prediction counts as confident.
      sharpness: k > 0, the slope of the step at θ. Predictions further than a few 1/k below θ have almost no gradient.
      beta: weight of the second part. Use batches of several times as many examples as classes: confident predictions of
        fewer cannot use them all.
      axis: the class axis.
      where: boolean [batch] or [batch, positions]: examples to keep, as if the others had been sliced away.

    Returns:
      float32 scalar, never negative but for rounding; 0 where no example is kept. A class at -inf throughout costs 1e30·β.

    Raises:
      ValueError: the shape, a dtype or a hyperparameter does not fit.

    >>> import jax.numpy as jnp
    >>> certain, collapsed, unsure = jnp.array([[99., 0.], [0., 99.]]), jnp.array([[9., 0.], [9., 0.]]), jnp.zeros([2, 2])
    >>> print(diversity(certain), diversity(collapsed), diversity(unsure))
    0.0 7.61 0.9996
    """
    numerics.check_positive('diversity', threshold=threshold, sharpness=sharpness)
    numerics.check_share('diversity', threshold=threshold)
    numerics.check_scalars('diversity', beta=beta)
    logits = numerics.as_float32('diversity: logits', logits)
    if logits.ndim < 2:
        raise ValueError(f'diversity: logits must be [batch, classes], or have more axes between, got {logits.shape}')
    numerics.check_axis('diversity', axis, logits.shape)
    logits = jnp.moveaxis(logits, axis, -1)
    numerics.check_classes('diversity', logits.shape)
    *positions, classes = logits.shape
    where = numerics.leading_mask('diversity', True if where is None else where, logits.shape)
    where = jnp.broadcast_to(where[..., 0], positions).reshape(math.prod(positions))
    log_p = numerics.log_softmax(jnp.where(where[:, None], logits.reshape(where.size, classes), 0.0))
    threshold, sharpness, beta = (jnp.asarray(x, jnp.float32) for x in (threshold, sharpness, beta))

    certainty = jnp.max(jnp.exp(log_p), axis=-1)
    confident = jax.nn.sigmoid(sharpness * (certainty - threshold)) / jax.nn.sigmoid(sharpness * (1 - threshold))
    unsure = 1 - confident

    kept = jnp.maximum(jnp.sum(where, dtype=jnp.float32), 1.0)
    uniform = jnp.full(classes, -np.log(classes), jnp.float32)
    log_mean = jax.nn.logsumexp(jnp.where(where[:, None], log_p, 2 * numerics.LOG_ZERO), axis=0) - jnp.log(kept)
    uneven = classes * numerics.divergence(uniform, jnp.where(jnp.any(where), log_mean, uniform))
    return numerics.masked_mean(unsure, 0, where) + beta * uneven
