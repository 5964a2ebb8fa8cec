"""Going on where a step came out as infinity or NaN."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kdjax.batches import Batch
from kdjax.metrics import Average
from kdjax.networks import Variables
from kdjax.problems import Problem, TrainState


def skip_nonfinite(problem: Problem) -> Problem:
    """A problem whose steps leave the state as it was where they would make it infinite or NaN.

    A step is skipped if its loss is not finite, or if anything in the state that was finite would not be after it: parameters,
    statistics, memory banks, the moments of the optimizer. The number of the step counts on, so that the next step has the keys
    and the batch that it would have had. `training.fit` decides how many steps may be skipped.

    Args:
      problem: the problem.

    Returns:
      The problem with the same `init`. The metrics of a skipped step count nothing, 0 of 0; `skipped` is the share of steps
      that were skipped.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, optax
    >>> from kdjax import networks, objectives, training
    >>> problem = training.distillation(networks.from_linen(nn.Dense(3)), None, objectives.hard_labels(), optax.sgd(0.1))
    >>> problem = skip_nonfinite(problem)
    >>> batch = {'inputs': jnp.ones((4, 5)), 'labels': jnp.zeros(4, jnp.int32)}
    >>> state = problem.init(jax.random.key(0), batch)
    >>> state, metrics = problem.step(state, {}, {**batch, 'inputs': jnp.full((4, 5), jnp.nan)})
    >>> int(state.step), metrics['skipped'], bool(jnp.isfinite(state.params['kernel']).all())
    (1, Average(total=Array(1., dtype=float32), count=Array(1., dtype=float32)), True)
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, teacher_variables: Variables, batch: Batch) -> tuple[TrainState, dict[str, Average]]:
        new, metrics = problem.step(state, teacher_variables, batch)
        kept = jax.tree.map(_stays_finite, state, new)
        finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(metrics['loss'].total)), *jax.tree.leaves(kept)]))
        state = jax.tree.map(lambda before, after: jnp.where(finite, after, before), state, new)
        metrics = jax.tree.map(lambda x: jnp.where(finite, x, jnp.zeros_like(x)), metrics)
        metrics['skipped'] = Average(1.0 - finite.astype(jnp.float32), jnp.float32(1.0))
        return state._replace(step=new.step, key=new.key), metrics

    return problem._replace(step=step)


def _stays_finite(before: jax.Array, after: Any) -> jax.Array:
    # A state may hold infinities on purpose, such as the smallest value seen so far.
    if not jnp.issubdtype(before.dtype, jnp.inexact):
        return jnp.bool_(True)
    return jnp.all(jnp.isfinite(after) | ~jnp.isfinite(before))
