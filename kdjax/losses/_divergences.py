"""Divergences between the two networks' predictions other than the forward one of `soft_targets`.

The forward divergence KL(t || s) makes the student cover all that the teacher finds possible. The reverse one lets it pick;
those between mix both. All return one value per example, in nats, and take logits `[..., classes]`. No factor T² is applied.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import numerics
from kdjax.meshes import on_any_mesh


@on_any_mesh
def reverse_kl(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """MiniLLM's reverse divergence: Kullback-Leibler of the teacher's distribution from the student's, per example.

    Σ_c p_s(c) (log p_s(c) - log p_t(c)), with p = softmax(z / T). The student pays for what the teacher finds impossible, and
    not for what it leaves out. A class that the teacher alone rules out costs 1e30 times the student's probability; 1000 times
    where either is float16, so that the gradient, which is of that size, is finite in a dtype that ends at 65504.

    Args:
      student: logits [..., classes], floating point of any precision; arithmetic is in float32.
      teacher: logits of the same shape.
      temperature: T > 0, a number or a traced scalar.
      axis: the class axis.
      where: boolean, broadcastable to the logits: classes to keep.

    Returns:
      float32 of shape [...], in nats, never negative; 0 where no class is kept.

    Raises:
      ValueError: the shapes differ, a dtype is not floating point, there is a single class, or the temperature does not fit.

    >>> import jax.numpy as jnp
    >>> print(reverse_kl(jnp.array([[2., 0.]]), jnp.array([[0., 0.]])))
    [0.328]

    Reference:
      Gu, Dong, Wei, Huang. MiniLLM: Knowledge Distillation of Large Language Models. 2024. https://arxiv.org/abs/2306.08543
    """
    log_s, log_t, where = numerics.log_probabilities('reverse_kl', student, teacher, temperature, axis, where)
    return numerics.divergence(log_s, log_t, where)


@on_any_mesh
def jensen_shannon(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    beta: ArrayLike = 0.5,
    temperature: ArrayLike = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """GKD's divergence, the generalised Jensen-Shannon divergence, per example.

    β·KL(p_t || m) + (1 - β)·KL(p_s || m), with m = (1 - β)·p_s + β·p_t. For β = ½ it is symmetric and at most log 2. As β
    goes to 0 or 1 this goes to 0; at β = 0 exactly the value is KL(p_t || p_s), and at β = 1 KL(p_s || p_t), as published
    code has it, so the value jumps there.

    Args:
      student: logits [..., classes], floating point of any precision; arithmetic is in float32.
      teacher: logits of the same shape.
      beta: β in [0, 1], a number or a traced scalar.
      temperature: T > 0, a number or a traced scalar.
      axis: the class axis.
      where: boolean, broadcastable to the logits: classes to keep.

    Returns:
      float32 of shape [...], in nats, never negative; 0 where no class is kept.

    Raises:
      ValueError: the shapes differ, a dtype is not floating point, there is a single class, or a hyperparameter does not fit.

    >>> import jax.numpy as jnp
    >>> print(jensen_shannon(jnp.array([[100., 0.]]), jnp.array([[0., 100.]])))
    [0.693]

    Reference:
      Agarwal, Vieillard, Zhou, Stanczyk, Ramos, Geist, Bachem. On-Policy Distillation of Language Models: Learning from
      Self-Generated Mistakes. 2024. https://arxiv.org/abs/2306.13649
    """
    numerics.check_share('jensen_shannon', beta=beta)
    log_s, log_t, where = numerics.log_probabilities('jensen_shannon', student, teacher, temperature, axis, where)
    return between(log_s, log_t, beta, where)


@on_any_mesh
def skewed_kl(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    alpha: ArrayLike = 0.1,
    temperature: ArrayLike = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """DistiLLM's skewed divergence, that of a mixture of both distributions from the teacher's, per example.

    KL(p_t || α·p_t + (1 - α)·p_s). With α > 0 it is at most -log α, whatever the student: gradients stay bounded where the
    forward divergence explodes.

    Args:
      student: logits [..., classes], floating point of any precision; arithmetic is in float32.
      teacher: logits of the same shape.
      alpha: α in [0, 1), a number or a traced scalar; with 0 it is the forward divergence.
      temperature: T > 0, a number or a traced scalar.
      axis: the class axis.
      where: boolean, broadcastable to the logits: classes to keep.

    Returns:
      float32 of shape [...], in nats, never negative; 0 where no class is kept.

    Raises:
      ValueError: the shapes differ, a dtype is not floating point, there is a single class, or a hyperparameter does not fit.

    >>> import jax.numpy as jnp
    >>> print(skewed_kl(jnp.array([[1e4, 0.]]), jnp.array([[0., 1e4]])))
    [2.303]

    Reference:
      Ko, Kim, Chen, Yun. DistiLLM: Towards Streamlined Distillation for Large Language Models. 2024.
      https://arxiv.org/abs/2402.03898
    """
    numerics.check_share('skewed_kl', alpha=alpha)
    log_s, log_t, where = numerics.log_probabilities('skewed_kl', student, teacher, temperature, axis, where)
    return numerics.divergence(log_t, mixture(log_t, log_s, jnp.asarray(alpha, jnp.float32)), where)


@on_any_mesh
def skewed_reverse_kl(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    alpha: ArrayLike = 0.1,
    temperature: ArrayLike = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """DistiLLM's skewed reverse divergence, that of a mixture of both distributions from the student's, per example.

    KL(p_s || α·p_s + (1 - α)·p_t), which is `skewed_kl` with the networks swapped. With α > 0 it is at most -log α: a class
    that the teacher alone rules out costs no more.

    Args:
      student: logits [..., classes], floating point of any precision; arithmetic is in float32.
      teacher: logits of the same shape.
      alpha: α in [0, 1), the student's share, a number or a traced scalar; with 0 it is the reverse divergence.
      temperature: T > 0, a number or a traced scalar.
      axis: the class axis.
      where: boolean, broadcastable to the logits: classes to keep.

    Returns:
      float32 of shape [...], in nats, never negative; 0 where no class is kept.

    Raises:
      ValueError: the shapes differ, a dtype is not floating point, there is a single class, or a hyperparameter does not fit.

    >>> import jax.numpy as jnp
    >>> print(skewed_reverse_kl(jnp.array([[1e4, 0.]]), jnp.array([[0., 1e4]])))
    [2.303]

    Reference:
      Ko, Kim, Chen, Yun. DistiLLM: Towards Streamlined Distillation for Large Language Models. 2024.
      https://arxiv.org/abs/2402.03898
    """
    numerics.check_share('skewed_reverse_kl', alpha=alpha)
    log_s, log_t, where = numerics.log_probabilities('skewed_reverse_kl', student, teacher, temperature, axis, where)
    return numerics.divergence(log_s, mixture(log_s, log_t, jnp.asarray(alpha, jnp.float32)), where)


@on_any_mesh
def total_variation(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Total variation distance of both distributions, as f-distill has it, per example.

    ½ Σ_c |p_s(c) - p_t(c)|: the largest difference in the probability of any set of classes, from 0 to 1, and symmetric. Its
    gradient by a probability is ±½ however far apart they are.

    Args:
      student: logits [..., classes], floating point of any precision; arithmetic is in float32.
      teacher: logits of the same shape.
      temperature: T > 0, a number or a traced scalar.
      axis: the class axis.
      where: boolean, broadcastable to the logits: classes to keep.

    Returns:
      float32 of shape [...], a probability; 0 where no class is kept.

    Raises:
      ValueError: the shapes differ, a dtype is not floating point, there is a single class, or the temperature does not fit.

    >>> import jax.numpy as jnp
    >>> print(total_variation(jnp.array([[0., 0.]]), jnp.array([[1e4, 0.]])))
    [0.5]

    Reference:
      Wen, Li, Du, Mou. f-Divergence Minimization for Sequence-Level Knowledge Distillation. 2023.
      https://arxiv.org/abs/2307.15190
    """
    log_s, log_t, where = numerics.log_probabilities('total_variation', student, teacher, temperature, axis, where)
    return 0.5 * jnp.sum(jnp.abs(jnp.exp(log_s) - jnp.exp(log_t)), axis=-1, where=where)


def between(log_s: jax.Array, log_t: jax.Array, beta: ArrayLike, where: jax.Array | None) -> jax.Array:
    """The generalised Jensen-Shannon divergence of log probabilities, forward or reverse at the ends."""
    beta = jnp.asarray(beta, jnp.float32)
    inside = (beta > 0) & (beta < 1)
    share = jnp.where(inside, beta, 0.5)  # keeps the logarithms of the branch that is not taken finite
    log_m = mixture(log_t, log_s, share)
    mixed = share * numerics.divergence(log_t, log_m, where) + (1 - share) * numerics.divergence(log_s, log_m, where)
    forward, reverse = numerics.divergence(log_t, log_s, where), numerics.divergence(log_s, log_t, where)
    return jnp.where(inside, mixed, jnp.where(beta <= 0, forward, reverse))


def mixture(log_p: jax.Array, log_q: jax.Array, share: jax.Array) -> jax.Array:
    """log(share · p + (1 - share) · q); a share of 0 or 1 is exact and has finite gradients."""
    weights = [jnp.where(w > 0, jnp.log(jnp.where(w > 0, w, 1.0)), numerics.LOG_ZERO) for w in (share, 1 - share)]
    return jnp.logaddexp(log_p + weights[0], log_q + weights[1])
