"""What kdjax means by a training problem: pure functions of a state and a batch, whatever they are made of.

`training.distillation` makes one; meshes, regimes and wrappers take one and give one.
"""

from typing import Any, NamedTuple, Protocol

import jax
import optax

from kdjax.batches import Batch
from kdjax.metrics import Average
from kdjax.networks import Variables


class TrainState(NamedTuple):
    """All that training changes, as one pytree: whoever saves it can resume bit for bit.

    Attributes:
      step: number of updates so far.
      params: the student's parameters.
      model_state: the student's state, such as batch statistics.
      opt_state: state of the student's optimizer; pruning masks live here.
      objective_params: parameters of the objective, such as connectors.
      objective_state: state of the objective, such as memory banks.
      objective_opt_state: state of the optimizer of `objective_params`.
      key: the run's random key; every step folds its number in.
    """

    step: jax.Array
    params: Any
    model_state: dict[str, Any]
    opt_state: optax.OptState
    objective_params: Any
    objective_state: Any
    objective_opt_state: optax.OptState
    key: jax.Array

    @property
    def variables(self) -> dict[str, Any]:
        """The student's variables, as its `apply` takes them."""
        return {'params': self.params, **self.model_state}


class Init(Protocol):
    """Begins a training run."""

    def __call__(self, key: jax.Array, batch: Batch, *, student_variables: Variables | None = None) -> TrainState:
        """Returns the state before the first step, from the shapes of a batch."""
        ...


class Step(Protocol):
    """One step of training."""

    def __call__(self, state: TrainState, teacher_variables: Variables, batch: Batch) -> tuple[TrainState, dict[str, Average]]:
        """Returns the state after a batch, and the batch's metrics."""
        ...


class Check(Protocol):
    """Looks at the values of data before they are trained on."""

    def __call__(self, data: Batch, batch_size: int, *, student_variables: Variables | None = None) -> None:
        """Raises a ValueError where the objective has no use for them."""
        ...


class Problem(NamedTuple):
    """A training problem: student, teacher, objective and optimizer as pure functions of state and batch.

    Attributes:
      init: `init(key, batch, *, student_variables=None) -> TrainState`; a student that starts from given variables gets a copy.
      step: `step(state, teacher_variables, batch) -> (state, metrics)`, jitted; the state is donated, the teacher never is.
      check: `check(data, batch_size, *, student_variables=None)` raises a ValueError for values in the data that the objective
        has no use for, such as a label beyond the classes. A traced step can only make the loss NaN of them.
    """

    init: Init
    step: Step
    check: Check = lambda data, batch_size, *, student_variables=None: None
