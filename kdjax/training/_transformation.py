"""Steps that change their batch first, as a whole."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax

from kdjax.batches import Batch, take_examples
from kdjax.metrics import Average
from kdjax.networks import Variables
from kdjax.problems import Problem, TrainState


def transform_batches(problem: Problem, transform: Callable[..., Batch]) -> Problem:
    """A problem whose steps see `transform(key, batch)`, teacher and student alike, as for mixup.

    A function that needs four arguments, `transform(key, batch, student_variables, teacher_variables)`, gets both networks'
    variables too, as for text that the student writes itself. Such a one must keep the shapes of the batch.

    Augmentation of single examples is for the epochs; this is for what needs several. The key is made of the run's key and the
    number of the step, so a run that resumes goes on alike.

    Args:
      problem: the problem.
      transform: a pure function of a key and a batch, as `data.augment.mixup` makes one, or of these and both networks'
        variables, as `generation.completions` does. Arguments with defaults are its own.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, optax
    >>> from kdjax import data, networks, objectives, training
    >>> problem = training.distillation(networks.from_linen(nn.Dense(3)), None, objectives.mixed_labels(), optax.sgd(0.1))
    >>> problem = transform_batches(problem, data.augment.mixup(alpha=0.2))
    >>> batch = {'inputs': jnp.ones((4, 5)), 'labels': jnp.zeros(4, jnp.int32)}
    >>> state, metrics = problem.step(problem.init(jax.random.key(0), batch), {}, batch)
    >>> sorted(metrics)
    ['gradient_norm', 'loss', 'mixed_labels', 'mixed_labels/weighted']
    """
    sees_networks = _needed(transform) > 2

    def init(key: jax.Array, batch: Batch, *, student_variables: Any = None) -> TrainState:
        shapes = batch if sees_networks else jax.eval_shape(transform, jax.random.key(0), batch)
        return problem.init(key, shapes, student_variables=student_variables)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, teacher_variables: Variables, batch: Batch) -> tuple[TrainState, dict[str, Average]]:
        # The network's own noise has the run's key and the step; this stream must not meet it, nor those of the epoch.
        key = jax.random.fold_in(jax.random.fold_in(state.key, 2**32 - 3), state.step)
        seen = transform(key, batch, *((state.variables, teacher_variables) if sees_networks else ()))
        return problem.step(state, teacher_variables, seen)

    def check(data: Batch, batch_size: int, *, student_variables: Variables | None = None) -> None:
        # Steps see what the transform makes of a batch, which may be other labels than those of the data.
        seen = data if sees_networks else transform(jax.random.key(0), take_examples(data, slice(0, batch_size)))
        problem.check(seen, batch_size, student_variables=student_variables)

    return problem._replace(init=init, step=step, check=check)


def _needed(transform: Callable[..., Batch]) -> int:
    """How many arguments a function must be given by position: what has a default is its own, as in `lambda k, b, a=a: ...`."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(transform).parameters.values()
    return sum(parameter.kind in kinds and parameter.default is parameter.empty for parameter in parameters)
