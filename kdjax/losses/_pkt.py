"""PKT, probabilistic knowledge transfer: the divergence of who is whose neighbour in a batch."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import numerics
from kdjax.losses._embeddings import count, embeddings
from kdjax.meshes import on_any_mesh


@on_any_mesh
def pkt(
    student: ArrayLike, teacher: ArrayLike, *, epsilon: float = 1e-7, axis: int = -1, where: ArrayLike | None = None
) -> jax.Array:
    """PKT: divergence of the student's neighbourhoods in the batch from the teacher's, a scalar.

    Σ_ij p_t log((p_t + ε) / (p_s + ε)) / B², with p_ij = k_ij / Σ_j k_ij and k = (cosine + 1) / 2. An example is a neighbour of
    itself. The mean is over B², as in published code that goes with the weight: B times less than the mean over examples.

    Args:
      student: embeddings [batch, ..., channels], floating point of any precision; arithmetic is in float32.
      teacher: embeddings with the same batch size; the other sizes may differ.
      epsilon: ε > 0.
      axis: the channel axis.
      where: boolean [batch] or [batch, positions]: what to keep. Examples of which nothing is kept are as if sliced away.

    Returns:
      float32 scalar, in nats, not negative but for ε; 0 where no example is kept. An example whose embedding is zero has
      cosine 0 to all.

    Raises:
      ValueError: shapes or dtypes do not fit, or epsilon is not positive.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[1., 0.], [0., 1.]]), jnp.array([[1., 0., 0.], [1., 0., 0.]])
    >>> print(pkt(student, teacher))
    0.0294

    Reference:
      Passalis, Tefas. Learning Deep Representations with Probabilistic Knowledge Transfer. 2018.
      https://arxiv.org/abs/1803.10837
    """
    numerics.check_positive('pkt', epsilon=epsilon)
    student, teacher, where = embeddings('pkt', student, teacher, axis, where)
    pairs = None if where is None else where[:, None] & where[None, :]

    def log_neighbours(x: jax.Array) -> jax.Array:
        x = numerics.l2_normalize(x, axis=1)
        # Rounding takes the cosine of opposite examples below -1.
        kernel = jnp.maximum((jnp.matmul(x, x.T, precision=jax.lax.Precision.HIGHEST) + 1) / 2, 0.0)
        total = jnp.sum(kernel, axis=1, keepdims=True, where=pairs)
        return jnp.log(kernel / numerics.nonzero(total) + jnp.float32(epsilon))

    log_t, log_s = log_neighbours(teacher), log_neighbours(student)
    # p_t = (p_t + ε) - ε. The first sums to the same for both networks, which `divergence` wants for its precision.
    total = jnp.sum(numerics.divergence(log_t, log_s, pairs)) - jnp.float32(epsilon) * jnp.sum(log_t - log_s, where=pairs)
    return total / count(student, where) ** 2
