"""Inputs of losses for hypothesis to draw: logits, labels and masks. They need hypothesis, which kdjax itself does not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kdjax.dependencies import needed_for

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


def logits(shape: tuple[int, ...], *, largest: float = 8.0) -> SearchStrategy[np.ndarray]:
    """Draws float32 arrays, of logits or of features, with elements from -`largest` to `largest`.

    Args:
      shape: of the array.
      largest: a float32 number; beyond about 80, probabilities underflow.

    >>> from hypothesis import given, settings
    >>> from kdjax import losses
    >>> @settings(max_examples=5, database=None, deadline=None)
    ... @given(logits((4, 3)), logits((4, 3)))
    ... def is_never_negative(student, teacher):
    ...     assert np.all(losses.soft_targets(student, teacher) >= 0)
    >>> is_never_negative()
    """
    with needed_for('kdjax.testing.logits'):
        from hypothesis import strategies
        from hypothesis.extra.numpy import arrays
    return arrays(np.float32, shape, elements=strategies.floats(-largest, largest, width=32))


def labels(shape: tuple[int, ...], classes: int, *, missing: bool = False) -> SearchStrategy[np.ndarray]:
    """Draws int32 class indices below `classes`.

    Args:
      shape: of the array.
      classes: how many there are.
      missing: whether some may be -1, which is no label.

    >>> labels((4,), 3).example().shape  # doctest: +SKIP
    (4,)
    """
    with needed_for('kdjax.testing.labels'):
        from hypothesis import strategies
        from hypothesis.extra.numpy import arrays
    return arrays(np.int32, shape, elements=strategies.integers(-1 if missing else 0, classes - 1))


def masks(shape: tuple[int, ...]) -> SearchStrategy[np.ndarray]:
    """Draws booleans, for `where`.

    Args:
      shape: of the array.

    >>> masks((4, 3)).example().dtype  # doctest: +SKIP
    dtype('bool')
    """
    with needed_for('kdjax.testing.masks'):
        from hypothesis.extra.numpy import arrays
    return arrays(np.bool_, shape)
