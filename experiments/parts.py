"""Rows of networks that are measured on several test splits, one for each task or domain."""

from collections.abc import Mapping, Sequence

import numpy as np

from experiments import reporting


def average(parts: Mapping[str, Sequence[reporting.Row]]) -> list[reporting.Row]:
    """One row for each network, whose accuracy is the mean over parts, seed by seed; each part has columns of its own.

    Args:
      parts: the rows of every part, of the same networks in the same order.

    >>> row = reporting.Row('student', [0.5, 0.7], 1, None, {})
    >>> (mean,) = average({'left': [row], 'right': [row._replace(accuracies=[0.7, 0.7])]})
    >>> [round(x, 2) for x in mean.accuracies], round(mean.extra['left_mean'], 2)
    ([0.6, 0.7], 0.6)
    """
    rows = []
    for each in zip(*parts.values(), strict=True):
        extra = {}
        for part, row in zip(parts, each, strict=True):
            extra |= reporting.mean_and_deviation(part, row.accuracies)
        accuracies = np.mean([row.accuracies for row in each], axis=0).tolist()
        rows.append(each[0]._replace(accuracies=accuracies, extra=extra))
    return rows
