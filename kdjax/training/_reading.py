"""What steps have measured, fetched, held to be finite and averaged."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.metrics import Average, compute
from kdjax.problems import TrainState


class NonFiniteLossError(RuntimeError):
    """The loss, its gradient or a parameter became infinite or NaN; the message says at which step and in which term."""


def numbers(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Averages divided, numbers as they are."""
    return {name: compute({name: x})[name] if hasattr(x, 'compute') else float(x) for name, x in measured.items()}


def read(begun: int, metrics: list[dict[str, Average]], allowed: int, directory: Any) -> tuple[dict[str, Any], int]:
    """Fetches the metrics of some steps, makes sure that they are finite, and averages them; counts skipped steps."""
    fetched = jax.device_get(metrics)
    series: dict[str, Any] = {
        key: Average(*map(np.concatenate, zip(*(chunk[key] for chunk in fetched), strict=True))) for key in fetched[0]
    }
    kept = _kept(directory)
    losses = series['loss'].total
    finite = _finite(losses) & (_finite(series['gradient_norm'].total) if 'gradient_norm' in series else True)
    if not finite.all():
        at = int(np.argmin(finite))
        if _finite(losses)[at]:
            raise NonFiniteLossError(f'the gradient is not finite at step {begun + at}, though the loss is; {kept}')
        terms = [key for key in series if f'{key}/weighted' in series and not _finite(series[key].total)[at]]
        culprit = f'term {", ".join(terms)}' if terms else 'the sum of the terms'
        raise NonFiniteLossError(f'the loss is not finite at step {begun + at}, from {culprit}; {kept}')
    skipped = series['skipped'].total if 'skipped' in series else np.zeros(1)
    if skipped.sum() > allowed:
        at = int(np.argmax(np.cumsum(skipped) > allowed))
        raise NonFiniteLossError(f'step {begun + at} is not finite, and no more steps may be skipped; {kept}')
    averages = compute({key: Average(*(x.astype(np.float64).sum(axis=0) for x in mean)) for key, mean in series.items()})
    told = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in averages.items()}
    return {'step': begun + len(losses), **told}, int(skipped.sum())


def _finite(series: np.ndarray) -> np.ndarray:
    """Whether each step's number is finite; of several students, those of all."""
    return np.asarray(np.isfinite(series).all(axis=tuple(range(1, np.ndim(series)))))


def check_parameters(state: TrainState, step: int, directory: Any) -> None:
    """Raises where an update has made a parameter infinite or NaN, which the loss of that step cannot show yet."""
    if not bool(_all_finite(state.params)):
        raise NonFiniteLossError(f'a parameter is not finite after step {step}; {_kept(directory)}')


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    floating = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in floating]))


def _kept(directory: Any) -> str:
    return 'no checkpoints are kept' if directory is None else f'the last good checkpoint is in {directory}'
