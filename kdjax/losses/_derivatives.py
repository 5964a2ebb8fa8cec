"""Losses on derivatives: what the networks' outputs depend on, and not only what they are.

Both return one value per example, and take derivatives as arrays, as other losses take activations: `networks.tap_jacobian` and
the class gradients of `networks.from_linen` make them, and so do `jax.vjp` and `jax.jacrev`. The gradient of such a loss with
respect to a network's parameters is a second derivative. That of a ReLU is zero, so networks of ReLUs learn through the weights
of their linear pieces alone. The output of an example must depend on that example alone: no batch statistics.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import numerics
from kdjax.losses._activations import exact_einsum, images
from kdjax.meshes import on_any_mesh
from kdjax.pooling import average_pool


@on_any_mesh
def jacobian(student: ArrayLike, teacher: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
    """Sobolev training: squared difference of the derivatives of both networks' outputs by their inputs, per example.

    mean over the directions v of ||J_sᵀ v - J_tᵀ v||², where J is the Jacobian of the outputs of an example and the norm is
    over the entries of its input. One random direction from the unit sphere, new in every step, is stochastic Sobolev training
    and costs one gradient; the rows of the identity give the whole Jacobians, ||J_s - J_t||²_F / classes. A random
    direction with entries of variance 1 has ||J_s - J_t||²_F as its expectation.

    Args:
      student: vector-Jacobian products J_sᵀ v [batch, directions, ...], the last axes those of an input, floating point of any
        precision; arithmetic is in float32.
      teacher: those of the teacher for the same directions, of the same shape.
      where: boolean, broadcastable to the products: entries to keep. A direction of which nothing is kept does not count.

    Returns:
      float32 [batch], in squared units of output per input; 0 where nothing is kept.

    Raises:
      ValueError: the shapes differ, there are no axes of examples, directions and inputs, or a dtype is not floating point.

    >>> import jax, jax.numpy as jnp
    >>> inputs = jnp.array([[1., 2.], [3., 0.]])
    >>> student = jax.vmap(jax.jacrev(lambda x: x**2))(inputs)
    >>> print(jacobian(student, jnp.tile(jnp.eye(2), (2, 1, 1))))
    [ 5. 13.]

    Reference:
      Czarnecki, Osindero, Jaderberg, Świrszcz, Pascanu. Sobolev Training for Neural Networks. 2017.
      https://arxiv.org/abs/1706.04859
    """
    where = numerics.mask('jacobian', where, jnp.shape(student), -1)
    student, teacher = (numerics.finite_or_nan(x) for x in numerics.pair('jacobian', student, teacher, -1))
    if student.ndim < 3:
        raise ValueError(f'jacobian: products must be [batch, directions, ...], got {student.shape}')
    inputs, directions = tuple(range(2, student.ndim)), None
    if where is not None:
        student, teacher = (jnp.where(where, x, 0.0) for x in (student, teacher))
        directions = jnp.any(where, axis=inputs)
    return numerics.masked_mean(jnp.sum(jnp.square(student - teacher), axis=inputs), 1, directions)


@on_any_mesh
def loss_gradient_attention(
    student: ArrayLike,
    teacher: ArrayLike,
    student_gradients: ArrayLike,
    teacher_gradients: ArrayLike,
    labels: ArrayLike | None = None,
    *,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """LwM, learning without memorizing: difference of the maps that say which positions speak for a class, per example.

    Σ over positions of |Q_t / ||Q_t|| - Q_s / ||Q_s|||, with the Grad-CAM map Q = ReLU(Σ_c α_c A_c) of the features A, where
    α_c is the mean over positions of the derivative of the class's logit by A_c. Where sizes differ, the larger map is
    average-pooled to the smaller before it is normalised. Channels and numbers of classes may differ.

    Args:
      student: features A_s [batch, height, width, channels], floating point of any precision; arithmetic is in float32.
      teacher: features A_t with the same batch size.
      student_gradients: α of the student, [batch, channels] for the class to explain, or [batch, classes, channels] for all,
        of which the labels pick one.
      teacher_gradients: α of the teacher, with as many axes.
      labels: integer classes [batch] to explain; the paper takes the likeliest of those that the teacher knows. An example with
        a negative one costs 0, whatever its features; a label that either network does not have is an error where it is known,
        and costs NaN where it is traced. None where the gradients are of one class.
      axis: the channel axis of the features.
      where: boolean, broadcastable to the smaller features with a channel axis of length 1: positions to keep.

    Returns:
      float32 [batch], without unit, at most √(2 · positions). A map that is zero everywhere stays zero.

    Raises:
      ValueError: shapes or dtypes do not fit, gradients of all classes come without labels or those of one with labels, or a
        label that is known is beyond the classes.

    >>> import jax.numpy as jnp
    >>> student = jnp.array([1., 0., 0., 0.]).reshape(1, 2, 2, 1)
    >>> teacher = jnp.array([3., 0., 4., 0.]).reshape(1, 2, 2, 1)
    >>> print(loss_gradient_attention(student, teacher, jnp.ones((1, 1)), jnp.ones((1, 1))))
    [1.2]

    Reference:
      Dhar, Singh, Peng, Wu, Chellappa. Learning without Memorizing. 2019. https://arxiv.org/abs/1811.08051
    """
    name = 'loss_gradient_attention'
    student, teacher, size, where = images(name, student, teacher, axis, where)
    gradients = [
        numerics.finite_or_nan(numerics.as_float32(f'{name}: {side}_gradients', x))
        for side, x in (('student', student_gradients), ('teacher', teacher_gradients))
    ]
    for side, features, gradient in zip(('student', 'teacher'), (student, teacher), gradients, strict=True):
        per_class = () if labels is None else gradient.shape[1:2]
        if gradient.shape != (len(features), *per_class, features.shape[3]):
            raise ValueError(
                f'{name}: {side}_gradients {gradient.shape} must be [batch, channels], or [batch, classes, channels] with '
                f'labels, for features {features.shape} (channels last)'
            )
    numbers, classes = None, 0
    if labels is not None:
        classes = min(gradient.shape[1] for gradient in gradients)
        numbers = numerics.check_labels(name, labels, student.shape[:1], classes)
        rows = jnp.clip(numbers, 0, classes - 1)[:, None, None]
        gradients = [jnp.take_along_axis(gradient, rows, axis=1)[:, 0] for gradient in gradients]

    def attention(features: jax.Array, weights: jax.Array) -> jax.Array:
        if numbers is not None:
            features = jnp.where((numbers >= 0)[:, None, None, None], features, 0.0)
            weights = jnp.where((numbers >= 0)[:, None], weights, 0.0)
        pooled = average_pool(jax.nn.relu(exact_einsum('bhwc,bc->bhw', features, weights)), size)
        return numerics.l2_normalize(pooled if where is None else jnp.where(where, pooled, 0.0), axis=(1, 2))

    maps = [attention(*side) for side in zip((student, teacher), gradients, strict=True)]
    values = jnp.sum(jnp.abs(maps[1] - maps[0]), axis=(1, 2))
    return values if numbers is None else numerics.of_labelled(values, numbers, classes)
