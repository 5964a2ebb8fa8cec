"""ReviewKD, knowledge review: the difference of two activations at several resolutions."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import numerics, pooling
from kdjax.losses._activations import activations
from kdjax.meshes import on_any_mesh


@on_any_mesh
def hierarchical_context(
    student: ArrayLike, teacher: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None
) -> jax.Array:
    """ReviewKD's hierarchical context: mean squared differences of two activations at several resolutions, per example.

    Σ_l w_l · mean (pool_l(f_s) - pool_l(f_t))² / Σ_l w_l. Full size has weight 1. Average pools to 4x4, 2x2 and 1x1 follow,
    but only those smaller than the height, and each has half the weight of the one before: ½, ¼, ⅛ from height 5 on, and
    ½, ¼ for the pools of a 4x4 map. The fusion of the student's layers is `objectives.hierarchical_context`'s.

    Args:
      student: activations [batch, height, width, channels], floating point of any precision; arithmetic is in float32.
      teacher: activations of the same shape.
      axis: the channel axis.
      where: boolean, broadcastable to the activations: elements to keep. A pooled value is the mean of what is kept in its
        window; where that is nothing, it does not count.

    Returns:
      float32 [batch], in squared units of the activation; 0 where nothing is kept.

    Raises:
      ValueError: the shapes differ, are not images, or a dtype is not floating point.

    >>> import jax.numpy as jnp
    >>> student = jnp.array([2., 0., 0., 0.]).reshape(1, 2, 2, 1)
    >>> print(hierarchical_context(student, jnp.zeros((1, 2, 2, 1))))
    [0.75]

    Reference:
      Chen, Liu, Zhao, Jia. Distilling Knowledge via Knowledge Review. 2021. https://arxiv.org/abs/2104.09044
    """
    student, teacher, where = activations('hierarchical_context', student, teacher, axis, where, rank=4)
    # Pooling is linear: the difference of two pooled maps is the pooled difference.
    difference = student - teacher
    total = numerics.masked_mean(jnp.square(difference), (1, 2, 3), where)
    weight = weights = 1.0
    for side in (4, 2, 1):
        if side >= student.shape[1]:
            continue
        weight /= 2
        weights += weight
        pooled, kept = pooling.average_pool(difference, (side, side)), where
        if where is not None:
            share = pooling.average_pool(where.astype(jnp.float32), (side, side))
            kept = share > 0
            pooled = pooled / jnp.where(kept, share, 1.0)
        total += weight * numerics.masked_mean(jnp.square(pooled), (1, 2, 3), kept)
    return total / weights
