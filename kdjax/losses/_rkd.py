"""RKD, relational distillation: the distances and the angles between the embeddings of a batch."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import numerics
from kdjax.losses._embeddings import count, differences, embeddings, map_anchors, squared_distances
from kdjax.meshes import on_any_mesh


@on_any_mesh
def rkd_distance(student: ArrayLike, teacher: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None) -> jax.Array:
    """RKD-D: difference of the distances between the examples, each network's in units of their mean, a scalar.

    Σ_ij huber(d_s - d_t) / B², with d_ij = ||x_i - x_j|| / μ, μ the mean of the distances that are positive, and
    huber(z) = z² / 2 up to |z| = 1, |z| - ½ beyond. Rotating, shifting or scaling either embedding changes nothing. Distances
    are norms of differences: published code takes them from inner products, which loses those of near examples.

    Args:
      student: embeddings [batch, ..., channels], floating point of any precision; arithmetic is in float32.
      teacher: embeddings with the same batch size; the other sizes may differ.
      axis: the channel axis.
      where: boolean [batch] or [batch, positions]: what to keep. Examples of which nothing is kept are as if sliced away.

    Returns:
      float32 scalar, without unit; 0 where no example is kept. At distance 0 the gradient is 0.

    Raises:
      ValueError: shapes or dtypes do not fit.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[0.], [1.], [2.]]), jnp.array([[0.], [1.], [9.]])
    >>> print(rkd_distance(student, teacher))
    0.0756

    Reference:
      Park, Kim, Lu, Cho. Relational Knowledge Distillation. 2019. https://arxiv.org/abs/1904.05068
    """
    student, teacher, where = embeddings('rkd_distance', student, teacher, axis, where)

    def relative_distances(x: jax.Array) -> jax.Array:
        distances = numerics.root(squared_distances(numerics.unit_scale(x, axis=(0, 1)), where))
        return distances / numerics.nonzero(numerics.masked_mean(distances, (0, 1), distances != 0))

    return jnp.sum(_huber(relative_distances(student) - relative_distances(teacher))) / count(student, where) ** 2


@on_any_mesh
def rkd_angle(student: ArrayLike, teacher: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None) -> jax.Array:
    """RKD-A: difference of the angles at which each example sees the others, a scalar.

    Σ_ijk huber(a_s - a_t) / B³, with a_ijk the cosine of the angle at x_i between x_j and x_k, 0 where either coincides with
    x_i, and huber(z) = z² / 2 up to |z| = 1, |z| - ½ beyond. Rotating, shifting or scaling either embedding changes nothing.

    The B³ cosines never exist at once: n examples x_i are taken at a time, forward and backward, which needs arrays of
    n · B · max(B, channels) numbers; n is the most, though at least 1, for which that is 2²⁰ numbers, 4 MB.

    Args:
      student: embeddings [batch, ..., channels], floating point of any precision; arithmetic is in float32.
      teacher: embeddings with the same batch size; the other sizes may differ.
      axis: the channel axis.
      where: boolean [batch] or [batch, positions]: what to keep. Examples of which nothing is kept are as if sliced away.

    Returns:
      float32 scalar, without unit, at most 1.5; 0 where no example is kept. At distance 0 the gradient is 0.

    Raises:
      ValueError: shapes or dtypes do not fit.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[0.], [1.], [2.]]), jnp.array([[0.], [9.], [1.]])
    >>> print(rkd_angle(student, teacher))
    0.222

    Reference:
      Park, Kim, Lu, Cho. Relational Knowledge Distillation. 2019. https://arxiv.org/abs/1904.05068
    """
    student, teacher, where = embeddings('rkd_angle', student, teacher, axis, where)

    def cosines(x: jax.Array, anchor: jax.Array) -> jax.Array:
        directions = numerics.l2_normalize(differences(x, anchor[None]), axis=1)
        if where is not None:
            directions = jnp.where(where[:, None], directions, 0.0)
        return jnp.matmul(directions, directions.T, precision=jax.lax.Precision.HIGHEST)

    def at_anchor(student_anchor: jax.Array, teacher_anchor: jax.Array) -> jax.Array:
        return jnp.sum(_huber(cosines(student, student_anchor) - cosines(teacher, teacher_anchor)))

    return jnp.sum(map_anchors(at_anchor, student, teacher), where=where) / count(student, where) ** 3


def _huber(x: jax.Array) -> jax.Array:
    magnitude = jnp.abs(x)
    return jnp.where(magnitude < 1, jnp.square(x) / 2, magnitude - 0.5)
