"""What kdjax means by a batch, or a data set: a dictionary of pytrees of arrays with one leading axis of examples.

    {'inputs': any pytree, 'labels': ..., 'mask': ..., 'weights': ..., more}

*Positions* are examples times further axes: tokens [batch, length], pixels [batch, height, width]. `counts` and `weights_of`
say which of them count and how much; objectives, metrics and whatever else reads a batch ask these two.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Batch = dict[str, Any]
"""Labels are integers, negative where there is none. `mask` is true for the positions that exist, `weights` are floats by which
they count; both are [batch], or [batch, positions]. All but the inputs are optional."""


def check_batch(batch: Batch) -> None:
    """Raises unless the batch is a dictionary of arrays with one number of examples, `'inputs'` among them.

    >>> check_batch({'labels': 3})
    Traceback (most recent call last):
    ...
    ValueError: a batch is a dictionary with 'inputs' and perhaps 'labels', 'mask' and 'weights', got labels
    """
    if not isinstance(batch, dict) or 'inputs' not in batch:
        found = ', '.join(sorted(batch)) if isinstance(batch, dict) else type(batch).__name__
        raise ValueError(f"a batch is a dictionary with 'inputs' and perhaps 'labels', 'mask' and 'weights', got {found}")
    if 'weight' in batch and 'weights' not in batch:
        raise ValueError("a batch has its weights under 'weights', got 'weight', which nothing reads: rename it")
    sizes = {name: {np.shape(leaf)[:1] for leaf in jax.tree.leaves(value)} for name, value in batch.items()}
    found = set().union(*sizes.values())
    if len(found) > 1 or found & {()}:
        told = {name: sorted(own)[0] if len(own) == 1 else sorted(own) for name, own in sizes.items()}
        raise ValueError(f'the arrays of a batch must have the same number of examples, got {told}')


def check_weights(batch: Batch) -> None:
    """Raises where weights that count are not finite or are negative, of a batch whose values are at hand.

    >>> check_weights({'weights': np.array([1.0, -1.0])})
    Traceback (most recent call last):
    ...
    ValueError: batch['weights'] must be finite and not negative, got -1.0
    """
    if 'weights' in batch:
        weights = np.asarray(weights_of(batch, np.shape(batch['weights'])))
        wrong = weights[~(np.isfinite(weights) & (weights >= 0))]
        if wrong.size:
            raise ValueError(f"batch['weights'] must be finite and not negative, got {wrong[0]}")


def count_examples(data: Any) -> int:
    """The number of examples of a batch, of a data set in memory, or of a sequence of examples.

    >>> count_examples({'inputs': {'tokens': np.zeros((5, 2)), 'types': np.zeros((5, 2))}}), count_examples([{'inputs': 1}] * 3)
    (5, 3)
    """
    return np.shape(jax.tree.leaves(data['inputs'])[0])[0] if isinstance(data, dict) else len(data)


def take_examples(batch: Batch, indices: Any) -> Batch:
    """The examples with some indices, or in a slice, of every array.

    >>> take_examples({'inputs': {'x': np.array([1, 2, 3])}}, slice(0, 2))
    {'inputs': {'x': array([1, 2])}}
    """
    return jax.tree.map(lambda leaf: leaf[indices], batch)


def rest_entry(temperature: Any) -> str:
    """The entry of a teacher's mass beside its largest logits, of a recording for several temperatures.

    >>> rest_entry(4.0), rest_entry(0.5)
    ('rest_at_4', 'rest_at_0.5')
    """
    return f'rest_at_{temperature if isinstance(temperature, str) else format(float(temperature), "g")}'


def counts(batch: Batch, shape: tuple[int, ...]) -> jax.Array | None:
    """Which values of this shape count: those whose position exists, by `batch['mask']`, and has a weight other than 0.

    Values [batch, ...] of every position of the mask, or of more axes, count where the mask is true; values of fewer axes, one
    for each example where the mask is of tokens, count where any of their positions does.

    Returns:
      Booleans with as many axes as `shape`, which broadcast to it; None where everything counts.

    Raises:
      ValueError: the mask is not boolean, the weights are not floating point, or their axes are not those of the values.

    >>> print(counts({'mask': jnp.array([[True, False], [False, False]])}, (2,)))
    [ True False]
    """
    counted = _counted(batch, shape)
    return None if counted is None else _fit(counted, shape, jnp.any)


def weights_of(batch: Batch, shape: tuple[int, ...]) -> jax.Array | None:
    """By how much values of this shape count, `batch['weights']`; 0 where the mask is false, None where there are no weights.

    Values of fewer axes than the weights have the largest weight of their positions: with equal weights, that weight.

    Returns:
      float32 with as many axes as `shape`, which broadcasts to it.

    Raises:
      ValueError: as `counts`.

    >>> print(weights_of({'weights': jnp.array([[0.5, 2.0], [0.0, 1.0]]), 'mask': jnp.array([True, False])}, (2,)))
    [2. 0.]
    """
    counted = _counted(batch, shape)
    if counted is None or 'weights' not in batch:
        return None
    weights = jnp.asarray(batch['weights']).astype(jnp.float32)
    return _fit(jnp.where(counted, _spread(weights, counted.ndim), 0.0), shape, jnp.max)


def counted_examples(batch: Batch) -> jax.Array | None:
    """The examples [batch] of which any position counts; None where all do."""
    named = [np.shape(batch[name])[:1] for name in ('mask', 'weights') if name in batch]
    return counts(batch, named[0]) if named else None


def _counted(batch: Batch, shape: tuple[int, ...]) -> jax.Array | None:
    """What counts by mask and weights, with the axes of the longer of the two, once both are known to fit the values."""
    found = {name: jnp.asarray(batch[name]) for name in ('mask', 'weights') if name in batch}
    for name, array in found.items():
        right = array.dtype == jnp.bool_ if name == 'mask' else jnp.issubdtype(array.dtype, jnp.floating)
        if not right or array.ndim == 0 or array.shape[: len(shape)] != shape[: array.ndim]:
            kind = 'boolean' if name == 'mask' else 'floating point'
            raise ValueError(
                f"batch['{name}'] must be {kind}, [batch] or [batch, positions] for values of shape {shape}, got "
                f'{array.dtype} {array.shape}'
            )
    if len(found) == 2 and any(m != w for m, w in zip(found['mask'].shape, found['weights'].shape, strict=False)):
        raise ValueError(f"batch['mask'] {found['mask'].shape} and batch['weights'] {found['weights'].shape} must fit")
    if 'weights' in found:
        found['weights'] = found['weights'] != 0
    axes = max((array.ndim for array in found.values()), default=0)
    # A position counts by both, before any is asked of an example: all that the mask leaves may have weights of 0.
    return functools.reduce(jnp.logical_and, (_spread(array, axes) for array in found.values())) if found else None


def _spread(array: jax.Array, axes: int) -> jax.Array:
    """With further axes of length 1."""
    return array.reshape(*array.shape, *(1,) * (axes - array.ndim))


def _fit(array: jax.Array, shape: tuple[int, ...], reduce: Any) -> jax.Array:
    """An array of positions with the axes of values of a shape."""
    return reduce(array, axis=tuple(range(len(shape), array.ndim))) if array.ndim > len(shape) else _spread(array, len(shape))
