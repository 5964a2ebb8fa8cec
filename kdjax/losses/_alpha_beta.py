"""ABKD's divergence, a family with two exponents that holds the forward and the reverse divergence."""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import numerics
from kdjax.meshes import on_any_mesh

# Probabilities below e^-40 count as that: exponents may be negative, and squares of logarithms infinite.
_SMALLEST = -40.0


@on_any_mesh
def alpha_beta_divergence(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    alpha: ArrayLike,
    beta: ArrayLike,
    temperature: ArrayLike = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """ABKD's α-β divergence of the student's distribution from the teacher's, per example.

    -1 / (αβ) Σ_c (p_t^α p_s^β - α/(α+β) p_t^(α+β) - β/(α+β) p_s^(α+β)). Where an exponent or their sum is 0 it is the limit:
    α = 1, β = 0 is the forward divergence, α = 0, β = 1 the reverse one, α = β = ½ four times the squared Hellinger distance,
    α = β = 1 half the squared difference, α = β = 0 half the squared difference of the logarithms. A larger α looks at where
    the networks differ most, a larger β at where the student is sure.

    Args:
      student: logits [..., classes], floating point of any precision; arithmetic is in float32.
      teacher: logits of the same shape.
      alpha: α in [-1, 1], a number or a traced scalar.
      beta: β in [-1, 1].
      temperature: T > 0, a number or a traced scalar.
      axis: the class axis.
      where: boolean, broadcastable to the logits: classes to keep.

    Returns:
      float32 of shape [...], never negative; 0 where no class is kept. Probabilities below e^-40 count as that.

    Raises:
      ValueError: the shapes differ, a dtype is not floating point, there is a single class, or a hyperparameter does not fit.

    >>> import jax.numpy as jnp
    >>> print(alpha_beta_divergence(jnp.array([[2., 0.]]), jnp.array([[0., 0.]]), alpha=0.0, beta=1.0))
    [0.328]

    References:
      Wang, Yang, Xu, Zhang, Zhou, Li, Huang, Cao, Huang. ABKD: Pursuing a Proper Allocation of the Probability Mass in
      Knowledge Distillation via α-β-Divergence. 2025. https://arxiv.org/abs/2505.04560 Cichocki, Cruces, Amari. Generalized
      Alpha-Beta Divergences and Their Application to Robust Nonnegative Matrix Factorization. 2011.
      https://doi.org/10.3390/e13010134
    """
    numerics.check_between('alpha_beta_divergence', -1, 1, alpha=alpha, beta=beta)
    log_s, log_t, where = numerics.log_probabilities('alpha_beta_divergence', student, teacher, temperature, axis, where)
    log_s, log_t = jnp.maximum(log_s, _SMALLEST), jnp.maximum(log_t, _SMALLEST)
    alpha, beta = jnp.asarray(alpha, jnp.float32), jnp.asarray(beta, jnp.float32)
    # With d = log p_s - log p_t and φ(x) = (e^x - 1) / x a term is p_t^(α+β) d (φ((α+β) d) - φ(β d)) / α. The last two factors
    # are d times a divided difference of φ, which has no pole at any of the limits.
    difference = log_s - log_t
    divided = _divided_difference((alpha + beta) * difference, beta * difference)
    terms = jnp.exp((alpha + beta) * log_t) * jnp.square(difference) * divided
    return jnp.sum(terms, axis=-1, where=where)


def _divided_difference(x: jax.Array, y: jax.Array) -> jax.Array:
    """(φ(x) - φ(y)) / (x - y) for φ(x) = (e^x - 1) / x, and its limit φ'."""
    near = jnp.abs(x - y) < 0.2
    # Gradients of the branch that is not taken must be finite too.
    apart = (_phi(jnp.where(near, 1.0, x)) - _phi(jnp.where(near, 0.0, y))) / jnp.where(near, 1.0, x - y)
    middle = 0.5 * (x + y)
    return jnp.where(near, _slope(middle) + jnp.square(x - y) / 24 * _third(middle), apart)


def _phi(x: jax.Array) -> jax.Array:
    small = jnp.abs(x) < 1e-3
    safe = jnp.where(small, 1.0, x)
    return jnp.where(small, 1 + x / 2 + x * x / 6, jnp.expm1(safe) / safe)


def _slope(x: jax.Array) -> jax.Array:
    """φ', by its series where the closed form would lose all digits."""
    small = jnp.abs(x) < 0.5
    safe = jnp.where(small, 1.0, x)
    series = sum(x**k / ((k + 2) * math.factorial(k)) for k in range(7))
    return jnp.where(small, series, (jnp.exp(safe) * (safe - 1) + 1) / jnp.square(safe))


def _third(x: jax.Array) -> jax.Array:
    """The third derivative of φ, which corrects the last digits of the first where two arguments are near."""
    small = jnp.abs(x) < 2.0
    safe = jnp.where(small, 2.0, x)
    closed = (jnp.exp(safe) * (safe**3 - 3 * safe**2 + 6 * safe - 6) + 6) / safe**4
    series = sum(x**k / ((k + 4) * math.factorial(k)) for k in range(10))
    return jnp.where(small, series, closed)
