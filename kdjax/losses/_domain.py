"""Adversarial alignment of domains: features from which nobody can tell where an example comes from.

A discriminator learns to name the domain of a feature, and the network that makes the features learns the opposite: either
through `gradient_reversal`, with which one minimisation of `domain_discrimination` trains both, or by turns, with
`domain_confusion` for the features' side.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import numerics
from kdjax.meshes import on_any_mesh


@on_any_mesh
def gradient_reversal(x: ArrayLike, scale: ArrayLike = 1.0) -> jax.Array:
    """Returns `x` unchanged, and multiplies the gradient that comes back through it by `-scale`.

    Between features and discriminator it makes one minimisation do both: the discriminator descends its loss, and what made the
    features climbs it.

    Args:
      x: floating point array of any shape; it keeps its dtype. Use `jax.tree.map` for several.
      scale: λ, a number or a traced scalar, which gets no gradient. `reversal_schedule` is the published one.

    Returns:
      `x`.

    Raises:
      ValueError: the dtype is not floating point, or the scale is not a scalar.

    >>> import jax
    >>> function = lambda x: 3. * gradient_reversal(x, 0.5)
    >>> print(function(2.), jax.grad(function)(2.))
    6.0 -1.5

    Reference:
      Ganin, Ustinova, Ajakan, Germain, Larochelle, Laviolette, Marchand, Lempitsky. Domain-Adversarial Training of Neural
      Networks. 2016. https://arxiv.org/abs/1505.07818
    """
    numerics.check_scalars('gradient_reversal', scale=scale)
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f'gradient_reversal: x must be floating point, got {x.dtype}')
    return _reverse(x, jnp.asarray(scale, jnp.float32))


@jax.custom_vjp
def _reverse(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x


def _reverse_forward(x: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x, scale


def _reverse_backward(scale: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    return -scale.astype(gradient.dtype) * gradient, jnp.zeros_like(scale)


_reverse.defvjp(_reverse_forward, _reverse_backward)


def reversal_schedule(steps: int, *, gamma: float = 10.0) -> Callable[[Any], jax.Array]:
    """Scale of `gradient_reversal` that grows from 0 to almost 1, while the discriminator learns what it is worth.

    λ = 2 / (1 + exp(-γ p)) - 1, where p is the share of the training that is over.

    Args:
      steps: step at which p is 1, and from which on λ stays.
      gamma: γ > 0, how fast it grows.

    Returns:
      A schedule: step -> λ, a float32 scalar.

    Raises:
      ValueError: `steps` or `gamma` is not positive.

    >>> schedule = reversal_schedule(1000)
    >>> print(schedule(0), schedule(100), schedule(1000))
    0.0 0.462 0.9999

    Reference:
      Ganin, Ustinova, Ajakan, Germain, Larochelle, Laviolette, Marchand, Lempitsky. Domain-Adversarial Training of Neural
      Networks. 2016. https://arxiv.org/abs/1505.07818
    """
    numerics.check_positive('reversal_schedule', steps=steps, gamma=gamma)

    def schedule(step: Any) -> jax.Array:
        progress = jnp.clip(jnp.asarray(step).astype(jnp.float32) / steps, 0.0, 1.0)
        return jnp.tanh(0.5 * gamma * progress)

    return schedule


@on_any_mesh
def domain_discrimination(logits: ArrayLike, domains: ArrayLike) -> jax.Array:
    """Cross-entropy of a discriminator that names the domain of each example, per example.

    -log p(d), with p = softmax(z) over several domains, or p(1) = σ(z) = 1 - p(0) for one logit and two domains.

    Args:
      logits: [batch, domains], or [batch] for two domains; floating point of any precision; arithmetic is in float32.
      domains: integers [batch], from 0. A negative one says that the domain is not known: the example costs 0 and teaches
        nothing, whatever its logits. One that is too large is an error where it is known, and costs NaN where it is traced.

    Returns:
      float32 [batch], in nats, never negative.

    Raises:
      ValueError: shapes or dtypes do not fit, there is a single domain, or one that is known is too large.

    >>> import jax.numpy as jnp
    >>> print(domain_discrimination(jnp.array([2., 2., 2.]), jnp.array([1, 0, -1])))
    [0.127 2.127 0.   ]

    Reference:
      Ganin, Ustinova, Ajakan, Germain, Larochelle, Laviolette, Marchand, Lempitsky. Domain-Adversarial Training of Neural
      Networks. 2016. https://arxiv.org/abs/1505.07818
    """
    logits = _domain_logits('domain_discrimination', logits)
    batch, count = logits.shape
    domains = numerics.check_labels('domain_discrimination', domains, (batch,), count)
    log_p = numerics.log_softmax(jnp.where(domains[:, None] < 0, 0.0, logits))
    cost = -jnp.take_along_axis(log_p, jnp.clip(domains, 0, count - 1)[:, None], axis=1)[:, 0]
    return numerics.of_labelled(cost, domains, count)


@on_any_mesh
def domain_confusion(logits: ArrayLike) -> jax.Array:
    """How well a discriminator can tell the domains apart, for the features to minimise, per example.

    -mean_d log p(d), the cross-entropy between the uniform distribution over the D domains and the prediction. It is least,
    log D, where the discriminator cannot tell. Unlike the reversed gradient it does not ask for the wrong domain, and does not
    fade where the discriminator is sure.

    Args:
      logits: [batch, domains], or [batch] for two domains; floating point of any precision; arithmetic is in float32.

    Returns:
      float32 [batch], in nats, at least log D.

    Raises:
      ValueError: shape or dtype do not fit, or there is a single domain.

    >>> import jax.numpy as jnp
    >>> print(domain_confusion(jnp.array([[0., 0.], [4., 0.]])))
    [0.693 2.018]

    Reference:
      Tzeng, Hoffman, Darrell, Saenko. Simultaneous Deep Transfer Across Domains and Tasks. 2015.
      https://arxiv.org/abs/1510.02192
    """
    return -jnp.mean(numerics.log_softmax(_domain_logits('domain_confusion', logits)), axis=-1)


def _domain_logits(loss: str, logits: ArrayLike) -> jax.Array:
    """Logits [batch, domains] in float32, from such or from one logit [batch] for the second of two domains."""
    logits = numerics.as_float32(f'{loss}: logits', logits)
    if logits.ndim not in (1, 2):
        raise ValueError(f'{loss}: logits must be [batch, domains], or [batch] for two domains, got {logits.shape}')
    if logits.shape[1:] == (1,):
        raise ValueError(f'{loss}: logits {logits.shape} are of a single domain; drop the last axis where they tell two apart')
    return jnp.stack([jnp.zeros_like(logits), logits], axis=-1) if logits.ndim == 1 else logits
