"""Means that stay right when they are added up: over steps, devices, hosts and masked examples.

A metric travels as a sum and a count, and is divided once, at the end, where it is read. Two batches of different size, or a
last batch that is mostly padding, then weigh what they should.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


class Sums(Protocol):
    """What a metric is until it is read: a pytree of sums, of which two are added leaf by leaf, as `Average` is one."""

    def compute(self) -> float | np.ndarray:
        """The value to read, once all is added up."""
        ...


class Average(NamedTuple):
    """A mean that is not divided yet, `total / count`. Two are added field by field, as `jax.tree.map(jnp.add, a, b)` does.

    >>> Average(3.0, 4.0).compute()
    0.75
    """

    total: ArrayLike
    count: ArrayLike

    def compute(self) -> float | np.ndarray:
        """The mean as a number to read, or an array of them; NaN where nothing was counted."""
        total, count = (np.asarray(field, np.float64) for field in jax.device_get(self))
        quotient = np.divide(total, count, out=np.full(np.broadcast_shapes(total.shape, count.shape), np.nan), where=count != 0)
        return quotient if quotient.ndim else float(quotient)


def mean(values: ArrayLike, where: ArrayLike | None = None, weights: ArrayLike | None = None) -> Average:
    """The mean of `values`, counted over the elements where `where` is true, each as often as its weight says.

    Args:
      values: numbers of any shape.
      where: booleans that broadcast to them; what is left out may be NaN.
      weights: floats that broadcast to them. The total is Σ w · v, the count Σ w, and a weight of 0 leaves out.

    >>> import jax.numpy as jnp
    >>> mean(jnp.array([1., 3., 8.]), jnp.array([True, True, False]))
    Average(total=Array(4., dtype=float32), count=Array(2., dtype=float32))
    """
    values = jnp.asarray(values).astype(jnp.float32)
    if weights is not None:
        weights = jnp.broadcast_to(jnp.asarray(weights).astype(jnp.float32), values.shape)
        where = weights != 0 if where is None else where & (weights != 0)
    if where is None:
        return Average(jnp.sum(values), jnp.float32(values.size))
    where = jnp.broadcast_to(where, values.shape)
    if weights is None:
        return Average(jnp.sum(values, where=where), jnp.sum(where, dtype=jnp.float32))
    # Zeroed before the product: NaN · 0 is NaN, also on the way back.
    return Average(jnp.sum(jnp.where(where, values, 0.0) * weights, where=where), jnp.sum(weights, where=where))


def divide(metric: Average) -> jax.Array:
    """`total / count` as an array that can be differentiated; 0 where nothing was counted.

    >>> divide(Average(6.0, 4.0)), divide(Average(0.0, 0.0))
    (Array(1.5, dtype=float32), Array(0., dtype=float32))
    """
    total, count = jnp.asarray(metric.total, jnp.float32), jnp.asarray(metric.count, jnp.float32)
    # Not `count > 0`, which is false for NaN and would swallow it.
    return jnp.where(count == 0, 0.0, total / jnp.where(count == 0, 1.0, count))


def add(*metrics: dict[str, Any]) -> dict[str, Any]:
    """Adds up dictionaries of metrics with the same names, on the host, in float64.

    >>> add({'loss': Average(1.0, 2.0)}, {'loss': Average(5.0, 1.0)})
    {'loss': Average(total=np.float64(6.0), count=np.float64(3.0))}
    """
    if any(metric.keys() != metrics[0].keys() for metric in metrics):
        names = ' and '.join(', '.join(sorted(metric)) for metric in metrics)
        raise ValueError(f'metrics to add up must have the same names, got {names}')
    return jax.tree.map(lambda *leaves: sum(np.asarray(leaf, np.float64) for leaf in leaves), *jax.device_get(metrics))


def compute(metrics: Mapping[str, Sums]) -> dict[str, Any]:
    """Computes every metric, for people to read: floats, and arrays of those that are not one number, such as confusions.

    >>> compute({'accuracy': Average(3.0, 4.0)})
    {'accuracy': 0.75}
    """
    return {name: metric.compute() for name, metric in jax.device_get(metrics).items()}
