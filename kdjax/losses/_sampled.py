"""Divergences from the probabilities of sampled tokens alone, as a server of a language model gives them."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kdjax import numerics
from kdjax.meshes import on_any_mesh

# Probabilities below e^-80 count as that, or exponentials of differences would be infinite.
_SMALLEST = -80.0


@on_any_mesh
def sampled_reverse_kl(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    estimator: Literal['k1', 'k2', 'k3'] = 'k3',
    where: ArrayLike | None = None,
) -> jax.Array:
    """Schulman's estimators of the reverse divergence, from the log probabilities of tokens that the student sampled.

    With r = log p_t(y) - log p_s(y) for y ~ p_s: `'k1'` is -r, without bias, often negative; `'k2'` is r² / 2, with a bias
    that is small where the networks are near; `'k3'` is e^r - 1 - r, without bias, never negative. As losses: the gradient of
    `'k1'` by the student is zero in expectation, that of `'k2'` is that of the reverse divergence, and that of `'k3'` is that
    of the forward one. For the gradient of a whole sequence see `policy_gradient`.

    Args:
      student: log probabilities [...] of the sampled tokens, floating point; arithmetic is in float32.
      teacher: log probabilities of the same tokens.
      estimator: `'k1'`, `'k2'` or `'k3'`.
      where: boolean, broadcastable to them: tokens to keep.

    Returns:
      float32 of that shape, in nats; 0 where a token is not kept. Probabilities below e^-80 count as that.

    Raises:
      ValueError: the shapes differ, a dtype is not floating point, the estimator is unknown, or a log probability that is known
        is above 0.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.log(jnp.array([0.5])), jnp.log(jnp.array([0.25]))
    >>> print(sampled_reverse_kl(student, teacher, estimator='k1'), sampled_reverse_kl(student, teacher))
    [0.693] [0.193]

    Reference:
      Schulman. Approximating KL Divergence. 2020. http://joschu.net/blog/kl-approx.html
    """
    if estimator not in ('k1', 'k2', 'k3'):
        raise ValueError(f"sampled_reverse_kl: estimator must be 'k1', 'k2' or 'k3', got {estimator!r}")
    student, teacher, where = of_tokens('sampled_reverse_kl', student, teacher, where)
    ratio = teacher - student
    values = {'k1': -ratio, 'k2': 0.5 * jnp.square(ratio), 'k3': jnp.expm1(ratio) - ratio}[estimator]
    return values if where is None else jnp.where(where, values, 0.0)


@on_any_mesh
def policy_gradient(
    student: ArrayLike, teacher: ArrayLike, *, sampler: ArrayLike | None = None, where: ArrayLike | None = None
) -> jax.Array:
    """MiniLLM's surrogate for the reverse divergence of sequences: its gradient is that of the tokens still to come.

    -w_i · R_i · log p_s(y_i) with the reward R_i = mean over j > i of log p_t(y_j) - log p_s(y_j), the mean of which takes out
    the reward for short answers, and w_i = p_s(y_i) / p_sampler(y_i). Gradients take R and w as numbers, so the value means
    nothing: its gradient is what counts. It is to be added to the divergence at each position, `reverse_kl`, which has the
    gradient of the token itself. Published code adds a baseline and clips the ratio as PPO does.

    Args:
      student: log probabilities [..., length] of the tokens of sampled answers, floating point; arithmetic is in float32.
      teacher: log probabilities of the same tokens.
      sampler: those of what sampled them, such as a mixture of both or an older student; the student's own if not given.
      where: boolean, broadcastable to them: tokens of the answer.

    Returns:
      float32 of that shape; 0 at the last token, and where a token is not kept.

    Raises:
      ValueError: the shapes differ, a dtype is not floating point, or a log probability that is known is above 0.

    >>> import jax, jax.numpy as jnp
    >>> student, teacher = jnp.log(jnp.array([0.5, 0.5, 0.5])), jnp.log(jnp.array([0.5, 0.25, 1.0]))
    >>> print(jax.grad(lambda s: policy_gradient(s, teacher).sum())(student))
    [-0.    -0.693  0.   ]

    Reference:
      Gu, Dong, Wei, Huang. MiniLLM: Knowledge Distillation of Large Language Models. 2024. https://arxiv.org/abs/2306.08543
    """
    if sampler is not None:
        _, sampler, _ = of_tokens('policy_gradient', student, sampler, where)
    student, teacher, where = of_tokens('policy_gradient', student, teacher, where)
    kept = jnp.ones(student.shape, jnp.bool_) if where is None else where
    rewards = jax.lax.stop_gradient(jnp.where(kept, teacher - student, 0.0))
    # Sums from each token to the end, without the token itself.
    coming, number = (jnp.cumsum(x[..., ::-1], axis=-1)[..., ::-1] - x for x in (rewards, kept.astype(jnp.float32)))
    reward = jnp.where(number > 0, coming / jnp.where(number > 0, number, 1.0), 0.0)
    if sampler is not None:
        reward = reward * jax.lax.stop_gradient(jnp.exp(student - sampler))
    return jnp.where(kept, -reward * student, 0.0)


def of_tokens(
    loss: str, student: ArrayLike, teacher: ArrayLike, where: ArrayLike | None, *, smallest: float = _SMALLEST
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Log-probabilities of both in float32 and above the smallest, zero outside `where`, and `where` in their shape."""
    for side, x in (('student', student), ('teacher', teacher)):
        number = numerics.known(x)
        # Rounding may leave one a little above 0.
        if number is not None and number.dtype.kind == 'f' and where is None and np.any(number > 1e-3):
            raise ValueError(f'{loss}: {side} must be log probabilities, which are at most 0, got {number.max():.4g}')
    student, teacher = (numerics.floating(f'{loss}: {side}', x) for side, x in (('student', student), ('teacher', teacher)))
    if student.shape != teacher.shape:
        raise ValueError(f'{loss}: student {student.shape} and teacher {teacher.shape} must have the same shape')
    if where is not None:
        where = jnp.broadcast_to(numerics.booleans(loss, where), student.shape)
        student, teacher = jnp.where(where, student, 0.0), jnp.where(where, teacher, 0.0)
    student, teacher = (jnp.where(x > 1e-3, jnp.nan, jnp.maximum(x, smallest)) for x in (student, teacher))
    return student, teacher, where
