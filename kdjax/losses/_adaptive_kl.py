"""AKL, adaptive divergence: forward and reverse, weighted by where the networks differ."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import numerics
from kdjax.meshes import on_any_mesh


@on_any_mesh
def adaptive_kl(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    mu: ArrayLike = 0.5,
    temperature: ArrayLike = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """AKL: forward and reverse divergence, weighted by the gaps in the head and in the tail of the teacher, per example.

    g_head / (g_head + g_tail) · KL(p_t || p_s) + g_tail / (g_head + g_tail) · KL(p_s || p_t). The head are the likeliest
    classes of the teacher, as many as have a probability of at most μ together, and always the first; a gap is the sum of |p_t
    - p_s| over its part. Gradients take the weights as numbers.

    Args:
      student: logits [..., classes], floating point of any precision; arithmetic is in float32.
      teacher: logits of the same shape.
      mu: μ in [0, 1], a number or a traced scalar.
      temperature: T > 0, a number or a traced scalar.
      axis: the class axis.
      where: boolean, broadcastable to the logits: classes to keep.

    Returns:
      float32 of shape [...], in nats, never negative; 0 where no class is kept, and where both networks agree.

    Raises:
      ValueError: the shapes differ, a dtype is not floating point, there is a single class, or a hyperparameter does not fit.

    >>> import jax.numpy as jnp
    >>> print(adaptive_kl(jnp.array([[2., 0.]]), jnp.array([[0., 0.]])))
    [0.381]

    Reference:
      Wu, Tao, Wang, Yang, Zhao, Wong. Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language
      Models. 2024. https://arxiv.org/abs/2404.02657
    """
    numerics.check_share('adaptive_kl', mu=mu)
    log_s, log_t, where = numerics.log_probabilities('adaptive_kl', student, teacher, temperature, axis, where)
    p_s, p_t = jax.lax.stop_gradient((jnp.exp(log_s), jnp.exp(log_t)))
    order = jnp.argsort(-p_t if where is None else jnp.where(where, -p_t, jnp.inf), axis=-1)
    gaps = jnp.abs(p_t - p_s) if where is None else jnp.where(where, jnp.abs(p_t - p_s), 0.0)
    gaps, together = jnp.take_along_axis(gaps, order, axis=-1), jnp.cumsum(jnp.take_along_axis(p_t, order, axis=-1), axis=-1)
    head = (together <= jnp.asarray(mu, jnp.float32)).at[..., 0].set(True)
    of_head, of_tail = jnp.sum(gaps, axis=-1, where=head), jnp.sum(gaps, axis=-1, where=~head)
    total = of_head + of_tail
    # Where the networks agree both divergences are zero, whatever their weights.
    share = jnp.where(total > 0, of_head / jnp.where(total > 0, total, 1.0), 0.5)
    return share * numerics.divergence(log_t, log_s, where) + (1 - share) * numerics.divergence(log_s, log_t, where)
