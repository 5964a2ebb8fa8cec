"""Correcting the bias of a class that training showed too rarely, or never."""

import numpy as np
from jax.typing import ArrayLike


def best_class_shift(logits: ArrayLike, labels: ArrayLike, label: int) -> float:
    """What to add to the logit of one class, for all examples, so that the most predictions are right.

    argmax_b Σ_i [argmax_c (z_ic + b [c = label]) = y_i], exactly: predictions change only where b passes the gap between
    the logit of the class and the largest of the others, so only the intervals between two such gaps are compared. Add the
    result to the bias of the head. A student that never saw a class knows it from soft targets, yet has learned a bias that
    is far too low; labelled examples to choose the shift with, of a validation split, are a few numbers' worth of information.

    Args:
      logits: [examples, classes].
      labels: integers [examples]; examples with a negative label are left out.
      label: the class.

    Returns:
      The middle of the best interval, 0 where no shift is better than none; of equally good intervals that nearest to 0. An
      interval without an end gives the number by which its only end is passed by 1.

    Raises:
      ValueError: shapes do not fit, there is no such class, no other class, or no example with a label.

    >>> import numpy as np
    >>> logits = np.array([[2.0, 0.0], [3.0, 0.0], [1.0, 0.0]])
    >>> best_class_shift(logits, np.array([1, 0, 1]), 1)
    2.5

    Reference:
      Hinton, Vinyals, Dean. Distilling the Knowledge in a Neural Network. 2015. https://arxiv.org/abs/1503.02531
    """
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f'best_class_shift: logits must be [examples, classes] and labels [examples], got {logits.shape}, {labels.shape}'
        )
    if logits.shape[1] < 2 or not 0 <= label < logits.shape[1]:
        raise ValueError(f'best_class_shift: label must be one of at least two classes, got {label} of {logits.shape[1]}')
    logits, labels = logits[labels >= 0], labels[labels >= 0]
    if not len(labels):
        raise ValueError('best_class_shift: there is no example with a label')
    others = logits.copy()
    others[:, label] = -np.inf
    gaps = others.max(axis=1) - logits[:, label]
    # An example moves to the class where the shift passes its gap, to the good or to the bad.
    gains = (labels == label).astype(int) - (others.argmax(axis=1) == labels).astype(int)
    edges, positions = np.unique(gaps, return_inverse=True)
    right = np.concatenate([[0], np.cumsum(np.bincount(positions, gains))])
    ends = np.concatenate([[edges[0] - 2], edges, [edges[-1] + 2]])
    middles = (ends[:-1] + ends[1:]) / 2
    if right[np.searchsorted(edges, 0.0)] == right.max():
        return 0.0
    best = middles[right == right.max()]
    return float(best[np.abs(best).argmin()])
