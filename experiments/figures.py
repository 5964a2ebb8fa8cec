"""Figures that scenarios share."""

import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt


def draw_rows(path: pathlib.Path, results: Sequence[dict[str, Any]], title: str) -> None:
    """Draws the accuracy of every row with its deviation, one below the other, for networks that are all of one size."""
    figure, axes = plt.subplots(figsize=(8, 1.5 + 0.3 * len(results)), layout='constrained')
    means, deviations = ([100 * row[f'accuracy_{part}'] for row in results] for part in ('mean', 'std'))
    axes.errorbar(means, range(len(results)), xerr=deviations, fmt='o', capsize=3)
    axes.set(xlabel='test accuracy (%)', title=title, yticks=range(len(results)), yticklabels=[row['name'] for row in results])
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)
