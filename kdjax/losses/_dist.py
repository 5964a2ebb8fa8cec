"""DIST and DIST+: whether the networks' predictions, and features, are linearly related, whatever their scale."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import numerics
from kdjax.meshes import on_any_mesh


@on_any_mesh
def dist(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    beta: ArrayLike = 1.0,
    gamma: ArrayLike = 1.0,
    temperature: ArrayLike = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """DIST: how far the predictions are from linearly related, over the classes and over the examples, a scalar.

    T² (β · mean_b(1 - r(p_s(b, ·), p_t(b, ·))) + γ · mean_c(1 - r(p_s(·, c), p_t(·, c)))), with p = softmax(z / T) and
    Pearson's correlation r(x, y) = x̄·ȳ / (‖x̄‖ ‖ȳ‖ + 1e-8) of the centred x̄ and ȳ. The student may be less sure than its
    teacher, as long as it ranks as the teacher does. A constant row or column has r = 0 with zero gradient; so every column
    costs 1 when there is one example. The 1e-8 is the published code's: columns of probabilities below 1e-4 pay for it.

    Args:
      student: logits [..., classes], floating point of any precision; arithmetic is in float32. All axes but that of the
        classes count as examples.
      teacher: logits of the same shape.
      beta: weight of the correlation over the classes of an example.
      gamma: weight of the correlation over the examples of a class.
      temperature: T > 0, a number or a traced scalar.
      axis: the class axis.
      where: boolean, broadcastable to the logits: what to keep; examples, classes or both, as if the others had been sliced
        away. Means are over the examples and the classes of which anything is kept.

    Returns:
      float32 scalar, between 0 and 2 T² (β + γ) up to rounding; 0 where nothing is kept.

    Raises:
      ValueError: the shapes differ, a dtype is not floating point, there is a single class, or a hyperparameter does not fit.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[2., 0.], [0., 2.]]), jnp.array([[4., 0.], [0., 4.]])
    >>> print(dist(student, teacher), dist(student, -teacher))
    0.0 4.0

    Reference:
      Huang, You, Wang, Qian, Xu. Knowledge Distillation from A Stronger Teacher. 2022. https://arxiv.org/abs/2205.10536
    """
    numerics.check_scalars('dist', beta=beta, gamma=gamma)
    log_s, log_t, where = numerics.log_probabilities('dist', student, teacher, temperature, axis, where)
    where = jnp.ones(log_s.shape, jnp.bool_) if where is None else where
    p_s, p_t, where = (x.reshape(-1, log_s.shape[-1]) for x in (jnp.exp(log_s), jnp.exp(log_t), where))
    return jnp.square(jnp.asarray(temperature, jnp.float32)) * _relations(p_s, p_t, where, beta, gamma)


@on_any_mesh
def dist_plus(
    student: ArrayLike,
    teacher: ArrayLike,
    student_feature: ArrayLike,
    teacher_feature: ArrayLike,
    *,
    beta: ArrayLike = 1.0,
    gamma: ArrayLike = 1.0,
    feature: ArrayLike = 1.0,
    temperature: ArrayLike = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """DIST+: `dist` of the predictions, and the same relations of features, a scalar.

    dist(z_s, z_t) + feature · (β · mean_b(1 - r(f_s(b, ·), f_t(b, ·))) + γ · mean_c(1 - r(f_s(·, c), f_t(·, c)))), of features
    f as they are, with r as in `dist`. Positions of a feature map count as examples, each with the mask of its example.

    Args:
      student: logits [..., classes], floating point of any precision; arithmetic is in float32.
      teacher: logits of the same shape.
      student_feature: [..., channels], whose first axes are the first ones of the logits.
      teacher_feature: of the same shape; `objectives.dist_plus` trains a linear map where the channels differ.
      beta: weight of the correlation over the classes of an example, and over its channels.
      gamma: weight of the correlation over the examples of a class, and of a channel.
      feature: weight of the relations of features.
      temperature: T > 0 of the predictions, a number or a traced scalar.
      axis: the axis of classes and of channels.
      where: boolean, broadcastable to the logits: what to keep. A feature is kept where any class of its example is.

    Returns:
      float32 scalar, not negative for non-negative weights; 0 where nothing is kept.

    Raises:
      ValueError: shapes or dtypes do not fit, there is a single class, or a hyperparameter does not fit.

    >>> import jax.numpy as jnp
    >>> logits, features = jnp.array([[2., 0.], [0., 2.]]), jnp.array([[1., 2., 3.], [3., 1., 1.]])
    >>> print(dist_plus(logits, 2 * logits, features, 5 * features), dist_plus(logits, 2 * logits, features, -features))
    0.0 4.0

    Reference:
      Huang, You, Wang, Qian, Xu. DIST+: Knowledge Distillation From a Stronger Adaptive Teacher. 2025.
      https://ieeexplore.ieee.org/document/10938241
    """
    numerics.check_scalars('dist_plus', beta=beta, gamma=gamma, feature=feature)
    log_s, log_t, kept = numerics.log_probabilities('dist_plus', student, teacher, temperature, axis, where)
    features = numerics.pair('dist_plus', student_feature, teacher_feature, axis)
    kept = jnp.ones(log_s.shape, jnp.bool_) if kept is None else kept
    examples, shape = jnp.any(kept, axis=-1), features[0].shape
    if shape[: min(examples.ndim, len(shape) - 1)] != examples.shape[: len(shape) - 1]:
        raise ValueError(f'dist_plus: features {shape} and logits {log_s.shape} (channels last) must be of the same examples')
    of_features = jnp.broadcast_to(numerics.leading_mask('dist_plus', examples, shape), shape)
    # What is masked may be infinite, and differences of it would not be masked again.
    found = (jnp.where(of_features, numerics.finite_or_nan(x), 0.0) for x in features)
    p_s, p_t, kept = (x.reshape(-1, log_s.shape[-1]) for x in (jnp.exp(log_s), jnp.exp(log_t), kept))
    f_s, f_t, of_features = (x.reshape(-1, shape[-1]) for x in (*found, of_features))
    feature, temperature = (jnp.asarray(x, jnp.float32) for x in (feature, temperature))
    predictions = jnp.square(temperature) * _relations(p_s, p_t, kept, beta, gamma)
    return predictions + feature * _relations(f_s, f_t, of_features, beta, gamma)


def _relations(x: jax.Array, y: jax.Array, where: jax.Array, beta: ArrayLike, gamma: ArrayLike) -> jax.Array:
    """β · mean(1 - r) of the rows of two matrices, and γ · that of their columns, over those of which anything is kept."""

    def distance(axis: int) -> jax.Array:
        a, b = (numerics.centred(rows, axis, where) for rows in (x, y))
        norms = numerics.root(jnp.sum(jnp.square(a), axis=axis)) * numerics.root(jnp.sum(jnp.square(b), axis=axis))
        # At a = 0 the quotient has a slope of b / 1e-8, which would throw a student that begins with constant logits far away.
        # 1 - r by the distance of the directions: the difference of 1 and r loses its digits where both networks agree.
        apart = numerics.l2_normalize(a, axis) - numerics.l2_normalize(b, axis)
        uncorrelated = (norms * jnp.sum(jnp.square(apart), axis=axis) / 2 + 1e-8) / (norms + 1e-8)
        return numerics.masked_mean(jnp.where(norms == 0, 1.0, uncorrelated), 0, jnp.any(where, axis=axis))

    return jnp.asarray(beta, jnp.float32) * distance(1) + jnp.asarray(gamma, jnp.float32) * distance(0)
