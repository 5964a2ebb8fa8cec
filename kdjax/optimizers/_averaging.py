"""Averages of parameters over training: often better than the last ones, and a steadier teacher."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kdjax.problems import TrainState
from kdjax.pruning import PruneState, apply_masks


class AverageState(NamedTuple):
    """State of `average_parameters`.

    Attributes:
      inner: state of the optimizer inside.
      count: number of updates so far.
      average: the averaged parameters.
    """

    inner: optax.OptState
    count: jax.Array
    average: Any


def average_parameters(optimizer: optax.GradientTransformation, decay: float = 0.999) -> optax.GradientTransformation:
    """Keeps an exponential moving average of the parameters beside any optimizer, which goes on as before.

    average_t = d_t · average_(t-1) + (1 - d_t) · parameters_t, with d_t = min(decay, (1 + t) / (10 + t)), so that
    the first steps are soon forgotten. The average is part of the optimizer's state: it is saved, resumed and sharded with it.
    `averaged_variables` reads it.

    Put it outside of `pruning.prune`: the average itself holds what was pruned until it has decayed, and `averaged_variables`
    takes it out.

    Args:
      optimizer: any optimizer.
      decay: from 0, the last parameters, to below 1.

    Raises:
      ValueError: the decay is out of range.

    >>> import jax.numpy as jnp, optax
    >>> optimizer = average_parameters(optax.sgd(1.0), decay=0.5)
    >>> state = optimizer.init({'w': jnp.array([1.0])})
    >>> updates, state = optimizer.update({'w': jnp.array([1.0])}, state, {'w': jnp.array([1.0])})
    >>> print(state.average['w'])
    [0.181]

    Reference:
      Tarvainen, Valpola. Mean Teachers Are Better Role Models: Weight-Averaged Consistency Targets Improve Semi-Supervised Deep
      Learning Results. 2017. https://arxiv.org/abs/1703.01780
    """
    if not 0 <= decay < 1:
        raise ValueError(f'average_parameters: decay must be from 0 to below 1, got {decay}')
    optimizer = optax.with_extra_args_support(optimizer)

    def init(params: Any) -> AverageState:
        return AverageState(optimizer.init(params), jnp.int32(0), jax.tree.map(jnp.copy, params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, AverageState]:
        if params is None:
            raise ValueError('average_parameters: update needs the parameters, as optimizer.update(updates, state, params)')
        updates, inner = optimizer.update(updates, state.inner, params, **extra)
        count = state.count + 1
        t = count.astype(jnp.float32)
        share = 1 - jnp.minimum(jnp.float32(decay), (1 + t) / (10 + t))

        def averaged(old: jax.Array, new: jax.Array) -> jax.Array:
            return old + share.astype(old.dtype) * (new - old)

        average = jax.tree.map(averaged, state.average, optax.apply_updates(params, updates))
        return updates, AverageState(inner, count, average)

    return optax.GradientTransformationExtraArgs(init, update)


def averaged_variables(state: TrainState) -> dict[str, Any]:
    """The student's variables with the averages that `average_parameters` keeps, in place of its parameters.

    What the optimizer inside has pruned is zero: masks are those of now, as the average of a weight does not vanish with it.

    Raises:
      ValueError: the optimizer keeps no averages.
    """
    leaves = jax.tree.leaves(state.opt_state, is_leaf=lambda x: isinstance(x, AverageState))
    found = [leaf for leaf in leaves if isinstance(leaf, AverageState)]
    if not found:
        raise ValueError('averaged_variables: the optimizer keeps no averages; wrap it in optimizers.average_parameters')
    params = found[0].average
    for inner in jax.tree.leaves(found[0].inner, is_leaf=lambda x: isinstance(x, PruneState)):
        if isinstance(inner, PruneState):
            params = apply_masks(inner.masks, params)
    return {**state.variables, 'params': params}
