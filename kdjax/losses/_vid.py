"""VID, variational information distillation: the likelihood of the teacher's activation under what the student predicts."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kdjax import numerics
from kdjax.losses._activations import activations, per_channel
from kdjax.meshes import on_any_mesh


@on_any_mesh
def vid(
    mean: ArrayLike, variance: ArrayLike, teacher: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None
) -> jax.Array:
    """VID: negative log likelihood of the teacher's activation under what the student predicts of it, per example.

    mean over all but the first axis of ½ ((μ - f_t)² / σ² + log σ²), without the constant ½ log 2π. It may be negative, and is
    lowest in σ² where σ² is the mean of (μ - f_t)². The regressor for μ and the trained σ² of each channel are
    `objectives.vid`'s.

    Args:
      mean: μ, the student's prediction [batch, ..., channels], floating point of any precision; arithmetic is in float32.
      variance: σ² > 0, a number, one for each channel [channels], or the shape of the activations.
      teacher: activations of the shape of `mean`.
      axis: the channel axis.
      where: boolean, broadcastable to the activations: elements to keep.

    Returns:
      float32 [batch], in nats per element; 0 where nothing is kept.

    Raises:
      ValueError: shapes or dtypes do not fit, or a variance is not positive.

    >>> import jax.numpy as jnp
    >>> print(vid(jnp.array([[0., 2.]]), 2.0, jnp.array([[0., 0.]])))
    [0.847]

    Reference:
      Ahn, Hu, Damianou, Lawrence, Dai. Variational Information Distillation for Knowledge Transfer. 2019.
      https://arxiv.org/abs/1904.05835
    """
    numbers = numerics.known(variance)
    if numbers is not None:
        numerics.check_positive('vid', variance=np.min(numbers, initial=np.inf))
    shape = jnp.shape(mean)
    mean, teacher, where = activations('vid', mean, teacher, axis, where)
    variance = per_channel('vid', 'variance', variance, shape, axis, where)
    terms = 0.5 * (jnp.square(mean - teacher) / variance + jnp.log(variance))
    return numerics.masked_mean(terms, tuple(range(1, terms.ndim)), where)
