"""Several students in one program."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kdjax.batches import Batch
from kdjax.problems import Problem, TrainState

# Students share the number of the step and the key, so that they see the same batches.
_AXES = TrainState._make(None if name in ('step', 'key') else 0 for name in TrainState._fields)


def sweep(make: Callable[[Any], Problem], hyperparameters: Any) -> Problem:
    """Trains one student for each row of hyperparameters, all in one vmapped program on the same batches.

    The teacher's forward pass does not depend on the student, so it runs once for all. Each student has initial parameters of
    its own; so equal rows are seeds.

    Args:
      make: `make(row) -> Problem`, called with traced scalars: weights, temperatures, learning rates.
      hyperparameters: a pytree of arrays [students, ...].

    Returns:
      A `Problem` whose state and metrics have a leading axis of students in every array, but for the step and the key. It
      trains as any other; the log of `training.fit` has a list of numbers for each metric, one of each student, and where
      `skip_nonfinite` skips a step, it skips it for all. `init` takes `student_variables` with that axis.

    Raises:
      ValueError: the arrays have no leading axis in common.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, optax
    >>> from kdjax import networks, objectives, training
    >>> network = networks.from_linen(nn.Dense(3))
    >>> def make(temperature):
    ...     return training.distillation(network, network, objectives.soft_targets(temperature=temperature), optax.sgd(0.1))
    >>> students = training.sweep(make, jnp.array([1.0, 2.0, 4.0, 8.0]))
    >>> batch = {'inputs': jnp.ones((4, 5))}
    >>> state = students.init(jax.random.key(0), batch)
    >>> state, metrics = students.step(state, network.init(jax.random.key(1), batch['inputs']), batch)
    >>> state.params['kernel'].shape
    (4, 5, 3)
    """
    sizes = {jnp.shape(x)[:1] for x in jax.tree.leaves(hyperparameters)}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(f'sweep: hyperparameters must be arrays with one number of students, got leading axes {sorted(sizes)}')
    ((students,),) = sizes

    def init(key: jax.Array, batch: Batch, *, student_variables: Any = None) -> TrainState:
        def one(row: Any, key: jax.Array, variables: Any) -> TrainState:
            return make(row).init(key, batch, student_variables=variables)

        axis = None if student_variables is None else 0
        state = jax.vmap(one, (0, 0, axis))(hyperparameters, jax.random.split(key, students), student_variables)
        return state._replace(step=state.step[0], key=state.key[0])

    def step(state: TrainState, teacher_variables: Any, batch: Batch) -> Any:
        def one(row: Any, state: TrainState) -> Any:
            return make(row).step(state, teacher_variables, batch)

        return jax.vmap(one, (0, _AXES), (_AXES, 0))(hyperparameters, state)

    def check(data: Batch, batch_size: int, *, student_variables: Any = None) -> None:
        row, variables = jax.tree.map(lambda x: x[0], (hyperparameters, student_variables))
        make(row).check(data, batch_size, student_variables=variables)

    return Problem(init, jax.jit(step, donate_argnums=0), check)
