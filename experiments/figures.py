"""The figures that experiments share, and what is the same in all of them."""

import contextlib
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt

MARKERS = 'osD^vP*Xd<>hp'
ACCURACY = {'accuracy': ''}


@contextlib.contextmanager
def one_panel(path: pathlib.Path, title: str, size: tuple[float, float]) -> Iterator[plt.Axes]:
    """Axes to draw on, with a grid; at the end they get a legend if anything has a label, and are written to a file."""
    figure, axes = plt.subplots(figsize=size, layout='constrained')
    axes.set(title=title)
    axes.grid(alpha=0.3)
    yield axes
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize='small')
    save(figure, path)


def save(figure: plt.Figure, path: pathlib.Path) -> None:
    """Writes a figure and forgets it."""
    figure.savefig(path, dpi=150)
    plt.close(figure)


def error_bar(row: dict[str, Any], key: str, scale: float = 100) -> float:
    """The deviation of a column, for matplotlib; NaN, which it does not draw, where one seed says nothing of it."""
    return float('nan') if row[f'{key}_std'] is None else scale * row[f'{key}_std']


def draw_accuracy(path: pathlib.Path, results: Sequence[dict[str, Any]], title: str) -> None:
    """Draws accuracy against shipped bytes, with error bars."""
    with one_panel(path, title, (7, 4.5)) as axes:
        for row, marker in zip(results, MARKERS * len(results), strict=False):
            axes.errorbar(
                row['bytes'],
                100 * row['accuracy_mean'],
                yerr=error_bar(row, 'accuracy'),
                fmt=marker,
                capsize=3,
                markersize=8,
                label=row['name'],
            )
        axes.set(xscale='log', xlabel='shipped bytes', ylabel='test accuracy (%)')


def draw_rows(
    path: pathlib.Path, results: Sequence[dict[str, Any]], title: str, *, series: Mapping[str, str] = ACCURACY
) -> None:
    """Draws the accuracy of every row with its deviation, one below the other.

    Args:
      path: file to write.
      results: the rows.
      title: of the figure.
      series: label by key of what is drawn, where that is more than the accuracy; a row may lack some.
    """
    with one_panel(path, title, (8, 1.5 + 0.28 * len(results))) as axes:
        for (key, label), marker in zip(series.items(), MARKERS, strict=False):
            rows = [(i, row) for i, row in enumerate(results) if f'{key}_mean' in row]
            means, bars = [100 * row[f'{key}_mean'] for _, row in rows], [error_bar(row, key) for _, row in rows]
            axes.errorbar(means, [i for i, _ in rows], xerr=bars, fmt=marker, capsize=3, label=label)
        axes.set(xlabel='test accuracy (%)', yticks=range(len(results)), yticklabels=[row['name'] for row in results])
        axes.invert_yaxis()
