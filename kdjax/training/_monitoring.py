"""What a run's validations say: which state was best so far, and whether training has reached what it was to reach."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.metrics import Average
from kdjax.networks import Variables
from kdjax.problems import TrainState
from kdjax.training._reading import numbers

_BEST_IS: dict[str, Literal['min', 'max']] = {
    **dict.fromkeys(('accuracy', 'binary_accuracy', 'agreement', 'intersection_over_union', 'average_precision'), 'max'),
    **dict.fromkeys(('loss', 'nll', 'perplexity', 'calibration_error', 'squared_error', 'absolute_error'), 'min'),
}


class Monitor:
    """Validates a student, and remembers its best.

    Attributes:
      name: the metric that tells what is best.
      mode: `'max'` or `'min'`.
      best_step: the step after which it was best, None before the first validation.
      best_variables: the variables then, None where only the folder of the run has them.
    """

    def __init__(
        self,
        validate: Callable[[Variables], Mapping[str, Average | float]] | None,
        variables_of: Callable[[TrainState], dict[str, Any]],
        name: str,
        mode: Literal['min', 'max'] | None,
        target: float | None,
        patience: int | None,
    ) -> None:
        if validate is None and (target is not None or patience is not None):
            raise ValueError('fit: target and patience need validate, which measures what they are about')
        self._validate, self._variables_of, self._target, self._patience = validate, variables_of, target, patience
        self.name = name
        self.mode: Literal['min', 'max'] = 'max' if validate is None else _best_is(name, mode)
        self.best_step: int | None = None
        self.best_variables: dict[str, Any] | None = None
        self._best, self._last, self._waited = -np.inf, -np.inf, 0

    def resume(self, manager: Any, begun: int, marks: set[int]) -> None:
        """Takes up what the validations of an earlier run of the folder found."""
        step = None if self._validate is None else manager.best_step()
        measured = {} if step is None else manager.metrics(step) or {}
        if step is None or self.name not in measured:
            return
        self.best_step, self._best = step, self._signed(measured[self.name])
        self._waited = len([mark for mark in marks if step < mark <= begun])
        self._last = self._signed((manager.metrics(begun) or {}).get(self.name, np.nan)) if begun in marks else -np.inf

    def measure(self, state: TrainState, step: int) -> dict[str, Any]:
        """The metrics of a validation now; none where nothing validates.

        Raises:
          ValueError: the metric that tells what is best is missing or not finite.
        """
        if self._validate is None:
            return {}
        measured = numbers(self._validate(self._variables_of(state)))
        if not np.isfinite(measured.get(self.name, np.nan)):
            raise ValueError(f'fit: the metric {self.name!r} after step {step} is missing or not finite in {measured}')
        self._last = self._signed(measured[self.name])
        self._waited += 1
        # Of equals the last is best, as Orbax has it.
        if self._last >= self._best:
            # The state is donated to the next step, so what is kept is a copy.
            self._best, self._waited, self.best_step = self._last, 0, step
            self.best_variables = jax.tree.map(jnp.copy, self._variables_of(state))
        return measured

    @property
    def satisfied(self) -> bool:
        """Whether training need not go on: the last validation reached the target, or patience has ended."""
        if self.best_step is None:
            return False
        reached = self._target is not None and self._last >= self._signed(self._target)
        return bool(reached or (self._patience is not None and self._waited >= self._patience))

    def _signed(self, value: float) -> float:
        return value if self.mode == 'max' else -value


def _best_is(name: str, mode: Literal['min', 'max'] | None) -> Literal['min', 'max']:
    """`'max'` where the metric is best where it is largest, `'min'` where it is smallest."""
    known = 'max' if name.startswith('top_') else _BEST_IS.get(name)
    if mode is None and known is None:
        raise ValueError(f"fit: is {name!r} best where it is largest or smallest? Give mode='max' or mode='min'")
    if mode not in (None, 'min', 'max'):
        raise ValueError(f"fit: mode must be 'min' or 'max', got {mode!r}")
    return mode or known or 'max'
