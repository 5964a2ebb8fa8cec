"""Going back to early weights after each round of pruning, for lottery tickets."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kdjax import paths
from kdjax.pruning._transformation import PruneState, sum_dtype


class RewindState(NamedTuple):
    """State of `rewinding`.

    Attributes:
      weights: the parameters to go back to.
      pruned: state of the wrapped `prune`.
    """

    weights: Any
    pruned: PruneState


def rewinding(pruned: optax.GradientTransformation, step: int) -> optax.GradientTransformationExtraArgs:
    """Wraps `prune`: whenever it prunes more, the weights that survive go back to what they were at `step`.

    All parameters go back, pruned or not, and the inner optimizer starts anew, its own schedules too; the schedule of the
    sparsity goes on. Pruning before `step` rewinds nothing. An optimizer's updates are added, so a weight w comes back to r as
    w + (r - w), within rounding; pruned weights are exactly zero.

    Args:
      pruned: a `prune` around any optimizer, with a schedule such as `iterative`.
      step: the number of updates after which weights are remembered; 0 for the initial ones.

    Returns:
      The transformation. Its `update` needs `params`. Its state is a `RewindState`.

    Raises:
      ValueError: `step` is negative; from `init`: `pruned` is not a `prune`; from `update`: no params.

    >>> import jax.numpy as jnp, optax
    >>> from kdjax import pruning
    >>> tickets = pruning.iterative(0.75, rounds=2, every=100, begin=100)
    >>> optimizer = pruning.rewinding(pruning.prune(optax.adam(1e-3), tickets), step=10)
    >>> state = optimizer.init({'kernel': jnp.ones((2, 3))})

    Reference:
      Frankle, Dziugaite, Roy, Carbin. Linear Mode Connectivity and the Lottery Ticket Hypothesis. 2020.
      https://arxiv.org/abs/1912.05671
    """
    if step < 0:
        raise ValueError(f'rewinding: step must not be negative, got {step}')
    # Its state is a `PruneState`, as `init` makes sure.
    inner: Any = optax.with_extra_args_support(pruned)

    def init(params: Any) -> RewindState:
        state = inner.init(params)
        if not isinstance(state, PruneState):
            raise ValueError(f'rewinding: needs prune(...) itself, got a transformation with a {type(state).__name__}')
        # A copy: parameters and state are often donated together, and no array can be donated twice.
        return RewindState(jax.tree.map(jnp.copy, params), state)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, RewindState]:
        if params is None:
            raise ValueError('rewinding: update needs params')
        before = state.pruned
        weights = jax.lax.cond(before.step == step, lambda: params, lambda: state.weights)
        updates, after = inner.update(updates, before, params, **extra)
        back = (after.sparsity > before.sparsity) & (before.step >= step)

        def rewound(path: str, update: jax.Array, weight: jax.Array, remembered: jax.Array) -> jax.Array:
            dtype = sum_dtype(update, weight)
            difference = remembered.astype(dtype) - weight.astype(dtype)
            return jnp.where(back & after.masks.get(path, True), difference, update.astype(dtype))

        updates = paths.map_with_paths(rewound, updates, params, weights)
        begun = jax.lax.cond(back, lambda: inner.init(weights).inner, lambda: after.inner)
        return updates, RewindState(weights, after._replace(inner=begun))

    return optax.GradientTransformationExtraArgs(init, update)
