"""Means that stay right when they are added up: over steps, devices, hosts and masked examples.

A metric travels as a sum and a count, and is divided once, at the end, where it is read. Two batches of different size, or a
last batch that is mostly padding, then weigh what they should.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


class Average(NamedTuple):
    """A mean that is not divided yet, `total / count`. Two are added field by field, as `jax.tree.map(jnp.add, a, b)` does.

    >>> Average(3.0, 4.0).compute()
    0.75
    """

    total: ArrayLike
    count: ArrayLike

    def compute(self) -> float:
        """The mean as a number to read; NaN where nothing was counted. See `compute` for those with several totals."""
        return compute({'mean': self})['mean']


def mean(values: ArrayLike, where: ArrayLike | None = None) -> Average:
    """The mean of `values`, counted over the elements where `where` (of the same shape) is true.

    >>> import jax.numpy as jnp
    >>> mean(jnp.array([1., 3., 8.]), jnp.array([True, True, False]))
    Average(total=Array(4., dtype=float32), count=Array(2., dtype=float32))
    """
    values = jnp.asarray(values).astype(jnp.float32)
    if where is None:
        return Average(jnp.sum(values), jnp.float32(values.size))
    return Average(jnp.sum(values, where=where), jnp.sum(where, dtype=jnp.float32))


def divide(metric: Average) -> jax.Array:
    """`total / count` as an array that can be differentiated; 0 where nothing was counted.

    >>> divide(Average(6.0, 4.0)), divide(Average(0.0, 0.0))
    (Array(1.5, dtype=float32), Array(0., dtype=float32))
    """
    total, count = jnp.asarray(metric.total, jnp.float32), jnp.asarray(metric.count, jnp.float32)
    return jnp.where(count > 0, total / jnp.where(count > 0, count, 1.0), 0.0)


def add(*metrics: dict[str, Average]) -> dict[str, Average]:
    """Adds up dictionaries of metrics with the same names, on the host, in float64.

    >>> add({'loss': Average(1.0, 2.0)}, {'loss': Average(5.0, 1.0)})
    {'loss': Average(total=np.float64(6.0), count=np.float64(3.0))}
    """
    fetched = jax.device_get(list(metrics))
    return {
        name: Average(*(sum(np.asarray(metric[name][field], np.float64) for metric in fetched) for field in (0, 1)))
        for name in fetched[0]
    }


def compute(metrics: dict[str, Any]) -> dict[str, float]:
    """Divides every metric, for people to read. A total with one entry per calibration bin gives the sum of magnitudes.

    >>> compute({'accuracy': Average(3.0, 4.0)})
    {'accuracy': 0.75}
    """
    numbers = {}
    for name, metric in jax.device_get(metrics).items():
        total, count = np.asarray(metric.total, np.float64), float(metric.count)
        numbers[name] = float(np.abs(total).sum() if total.ndim else total) / count if count else float('nan')
    return numbers
