"""Training until a network is good enough, or for so many epochs."""

import pathlib
from collections.abc import Callable
from typing import Any

from kdjax.batches import Batch
from kdjax.metrics import Mean, compute
from kdjax.networks import Variables
from kdjax.training.checkpoints import checkpoint_manager
from kdjax.training.epochs import Epoch, steps_per_epoch
from kdjax.training.loop import Fitted, fit
from kdjax.training.step import TrainState


def fit_until(
    epoch: Epoch,
    state: TrainState,
    teacher_variables: Variables | None,
    data: Batch,
    *,
    target: float,
    epochs: int,
    validate: Callable[[Variables], dict[str, Mean]],
    monitor: str = 'accuracy',
    directory: str | pathlib.Path | None = None,
    **settings: Any,
) -> Fitted:
    """Trains as `fit` does, and stops after the first epoch whose metric reaches a target.

    Args:
      epoch: as in `fit`.
      state: as in `fit`.
      teacher_variables: as in `fit`.
      data: as in `fit`.
      target: value of the metric at which to stop.
      epochs: the most epochs in all, those of an earlier run included.
      validate: as in `fit`; asked after every epoch.
      monitor: as in `fit`.
      directory: as in `fit`; a run that had stopped there stays so.
      **settings: further arguments of `fit`.

    Returns:
      The result, with the best epoch so far; that is the last one where the target was reached.

    Raises:
      ValueError: `epochs` is below 1, or as from `fit`.
    """
    if epochs < 1:
        raise ValueError(f'fit_until: epochs must be at least 1, got {epochs}')
    number, best = max(1, _epochs_done(directory, monitor, steps_per_epoch(data, epoch.batch_size))), None
    resumed_from = None
    while True:
        fitted = fit(
            epoch,
            state,
            teacher_variables,
            data,
            epochs=number,
            validate=validate,
            monitor=monitor,
            directory=directory,
            **settings,
        )
        resumed_from = fitted.resumed_from if resumed_from is None else resumed_from
        value = compute(validate(fitted.best_variables))[monitor]
        # Of equals the last is best, as in `fit`.
        if best is None or value >= best[0]:
            best = value, fitted
        if best[0] >= target or number >= epochs:
            return Fitted(fitted.state, best[1].best_variables, best[1].best_epoch, resumed_from)
        state, number = fitted.state, number + 1


def _epochs_done(directory: str | pathlib.Path | None, monitor: str, steps: int) -> int:
    if directory is None:
        return 0
    with checkpoint_manager(directory, monitor=monitor) as manager:
        return -(-(manager.latest_step() or 0) // steps)
