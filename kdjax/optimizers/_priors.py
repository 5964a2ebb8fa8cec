"""A prior over the student's parameters, as a part of its optimizer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class PriorState(NamedTuple):
    """State of `gaussian_prior`.

    Attributes:
      count: number of updates so far.
      center: the mean of the prior: the parameters at the start.
    """

    count: jax.Array
    center: Any


def gaussian_prior(precision: float | optax.Schedule) -> optax.GradientTransformation:
    """Adds the gradient of a Gaussian prior around the parameters that training starts from: a maximum a posteriori estimate.

    gradient ← gradient + λ (θ - θ₀), the gradient of the loss plus λ/2 · ||θ - θ₀||². Put it before the optimizer:
    `optax.chain(gaussian_prior(1e-3), optax.adam(1e-3))`. Where the loss is the mean over N examples of a negative log
    likelihood, such as the divergence from soft targets, λ = 1 / (N σ²) for a prior of variance σ². With a student that starts
    from given variables, the prior says that those were nearly right; with one that starts at random it is weight decay
    towards the start.

    Args:
      precision: λ, a number or a schedule of the step; one that is 0 at first is a warm-up without the prior.

    Raises:
      ValueError: the precision is negative, or the update has no parameters.

    >>> import jax.numpy as jnp, optax
    >>> optimizer = optax.chain(gaussian_prior(1.0), optax.sgd(0.5))
    >>> params = {'w': jnp.array([2.0])}
    >>> state = optimizer.init(params)
    >>> for _ in range(50):
    ...     updates, state = optimizer.update({'w': params['w'] - 4.0}, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> print(params['w'])
    [3.]

    Reference:
      Li, Grandvalet, Davoine. Explicit Inductive Bias for Transfer Learning with Convolutional Networks. 2018.
      https://arxiv.org/abs/1802.01483
    """
    if not callable(precision) and precision < 0:
        raise ValueError(f'gaussian_prior: precision must not be negative, got {precision}')

    def init(params: Any) -> PriorState:
        return PriorState(jnp.int32(0), jax.tree.map(jnp.copy, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, PriorState]:
        if params is None:
            raise ValueError('gaussian_prior: update needs the parameters, as optimizer.update(updates, state, params)')
        strength = jnp.asarray(precision(state.count) if callable(precision) else precision, jnp.float32)

        def pulled(gradient: jax.Array, value: jax.Array, center: jax.Array) -> jax.Array:
            return gradient + strength.astype(gradient.dtype) * (value - center).astype(gradient.dtype)

        return jax.tree.map(pulled, updates, params, state.center), PriorState(state.count + 1, state.center)

    return optax.GradientTransformation(init, update)
