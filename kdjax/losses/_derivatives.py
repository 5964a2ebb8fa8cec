"""Losses on derivatives: what the student's output depends on, and not only what it is.

Both return one value per example. They take the networks as functions and differentiate them with `jax.vjp`, so that `jax.grad`
of the loss with respect to parameters in those functions is a second derivative like any other. That of a ReLU is zero, so
networks of ReLUs learn through the weights of their linear pieces alone. Each example's output must depend on that example
alone: no batch statistics.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import meshes, numerics
from kdjax.pooling import average_pool

Function = Callable[[jax.Array], jax.Array]


def jacobian(student: Function, teacher: Function, inputs: ArrayLike, directions: ArrayLike) -> jax.Array:
    """Squared difference of the gradients of both networks' outputs with respect to the inputs, per example.

    mean over the directions v of ||J_sᵀ v - J_tᵀ v||², where J is the Jacobian of the outputs of an example and the norm is
    over the entries of its input. One random direction from the unit sphere, new in every step, is stochastic Sobolev training
    and costs one gradient; the rows of the identity give the whole Jacobians, ||J_s - J_t||²_F / classes. A random
    direction with entries of variance 1 has ||J_s - J_t||²_F as its expectation.

    Args:
      student: inputs [batch, ...] -> outputs [batch, classes]. Fix parameters and modes by `lambda x: apply(params, x)`.
      teacher: the same for the teacher.
      inputs: [batch, ...], floating point of any precision; both functions get them in float32.
      directions: [directions, classes], the same for all examples.

    Returns:
      float32 [batch], in squared units of output per input.

    Raises:
      ValueError: shapes or dtypes do not fit.

    >>> import jax.numpy as jnp
    >>> inputs = jnp.array([[1., 2.], [3., 0.]])
    >>> print(jacobian(lambda x: x**2, lambda x: x, inputs, jnp.eye(2)))
    [ 5. 13.]

    Reference:
      Czarnecki, Osindero, Jaderberg, Świrszcz, Pascanu. Sobolev Training for Neural Networks. 2017.
      https://arxiv.org/abs/1706.04859
    """
    inputs = numerics.as_float32('jacobian: inputs', inputs)
    directions = numerics.as_float32('jacobian: directions', directions)
    if inputs.ndim < 2:
        raise ValueError(f'jacobian: inputs must be [batch, ...], got {inputs.shape}')
    outputs_s, pullback_s = _vjp('jacobian: student', student, inputs)
    outputs_t, pullback_t = _vjp('jacobian: teacher', teacher, inputs)
    if outputs_s.shape != outputs_t.shape:
        raise ValueError(
            f'jacobian: outputs of student {outputs_s.shape} and teacher {outputs_t.shape} must have the same shape'
        )
    if directions.ndim != 2 or directions.shape[1] != outputs_s.shape[1]:
        raise ValueError(
            f'jacobian: directions must be [directions, classes] for outputs {outputs_s.shape}, got {directions.shape}'
        )

    def difference(direction: jax.Array) -> jax.Array:
        everywhere = jnp.broadcast_to(direction, outputs_s.shape)
        (gradient_s,), (gradient_t,) = pullback_s(everywhere), pullback_t(everywhere)
        return jnp.sum(jnp.square(gradient_s - gradient_t), axis=tuple(range(1, inputs.ndim)))

    return jnp.mean(jax.vmap(difference)(directions), axis=0)


def loss_gradient_attention(
    student: Function, teacher: Function, student_features: ArrayLike, teacher_features: ArrayLike, labels: ArrayLike
) -> jax.Array:
    """Difference of the maps that say which positions speak for a class, per example.

    Σ over positions of |Q_t / ||Q_t|| - Q_s / ||Q_s|||, with the Grad-CAM map Q = ReLU(Σ_c α_c A_c) of the features A, where
    α_c is the mean over positions of the derivative of the label's logit by A_c. Where sizes differ, the larger map is
    average-pooled to the smaller before it is normalised. Channels and numbers of classes may differ.

    Args:
      student: features [batch, height, width, channels] -> logits [batch, classes]: the rest of the network.
      teacher: the same for the teacher.
      student_features: activations [batch, height, width, channels], floating point of any precision; arithmetic outside the
        two functions is in float32.
      teacher_features: activations with the same batch size.
      labels: integer classes [batch] to explain; the paper takes the likeliest of those that the teacher knows. An example with
        a negative one costs 0, whatever its features; a label that either network does not have is an error where it is known,
        and costs NaN where it is traced.

    Returns:
      float32 [batch], without unit, at most √(2 · positions). A map that is zero everywhere stays zero.

    Raises:
      ValueError: shapes or dtypes do not fit, or a label that is known is beyond the classes.

    >>> import jax.numpy as jnp
    >>> head = lambda features: features.mean(axis=(1, 2))
    >>> student = jnp.array([1., 0., 0., 0.]).reshape(1, 2, 2, 1)
    >>> teacher = jnp.array([3., 0., 4., 0.]).reshape(1, 2, 2, 1)
    >>> print(loss_gradient_attention(head, head, student, teacher, jnp.array([0])))
    [1.2]

    Reference:
      Dhar, Singh, Peng, Wu, Chellappa. Learning without Memorizing. 2019. https://arxiv.org/abs/1811.08051
    """
    name = 'loss_gradient_attention'
    student_features, teacher_features = numerics.pair(name, student_features, teacher_features, -1, same_shape=False)
    if student_features.ndim != 4 or student_features.shape[0] != teacher_features.shape[0]:
        raise ValueError(
            f'{name}: features of student and teacher must be [batch, height, width, channels] with the same batch, '
            f'got {student_features.shape} and {teacher_features.shape}'
        )
    numbers = numerics.check_labels(name, labels, student_features.shape[:1])
    labelled = (numbers >= 0)[:, None, None, None]
    height, width = (min(sizes) for sizes in zip(student_features.shape[1:3], teacher_features.shape[1:3], strict=True))

    def attention(side: str, function: Function, features: jax.Array) -> tuple[jax.Array, int]:
        features = numerics.finite_or_nan(jnp.where(labelled | jnp.isfinite(features), features, 0.0))
        logits, pullback = _vjp(f'{name}: {side}', function, features)
        numerics.check_labels(name, labels, logits.shape[:1], logits.shape[1])
        (gradient,) = pullback(jax.nn.one_hot(numbers, logits.shape[1], dtype=jnp.float32))
        weights = jnp.mean(gradient, axis=(1, 2))
        weighted = jnp.einsum('bhwc,bc->bhw', features, weights, precision=jax.lax.Precision.HIGHEST)
        pooled = average_pool(jax.nn.relu(weighted), (height, width))
        return numerics.l2_normalize(pooled, axis=(1, 2)), logits.shape[1]

    map_t, classes_t = attention('teacher', teacher, teacher_features)
    map_s, classes_s = attention('student', student, student_features)
    return numerics.of_labelled(jnp.sum(jnp.abs(map_t - map_s), axis=(1, 2)), numbers, min(classes_t, classes_s))


def _vjp(name: str, function: Function, inputs: jax.Array) -> tuple[jax.Array, Callable[[jax.Array], tuple[jax.Array]]]:
    """The outputs [batch, classes] of a function in float32, and the product of its Jacobian with a cotangent of theirs."""
    outputs, pullback = jax.vjp(lambda x: numerics.as_float32(name, function(x)), inputs)
    if outputs.ndim != 2 or outputs.shape[0] != inputs.shape[0]:
        raise ValueError(f'{name} must return [batch, classes] for inputs {inputs.shape}, got {outputs.shape}')
    return outputs, lambda cotangent: pullback(meshes.varying_alike((cotangent, outputs))[0])
