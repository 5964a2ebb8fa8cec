"""The figures that experiments share, and what is the same in all of them."""

import collections
import contextlib
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np

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
    """Draws accuracy against shipped bytes, with error bars; rows of one size lie side by side."""
    with one_panel(path, title, (7, 4.5)) as axes:
        before = collections.Counter()
        for row, marker in zip(results, MARKERS * len(results), strict=False):
            # Else the error bars of one size would hide each other.
            aside = 1.03 ** before[row['bytes']]
            before[row['bytes']] += 1
            axes.errorbar(
                row['bytes'] * aside,
                100 * row['accuracy_mean'],
                yerr=error_bar(row, 'accuracy'),
                fmt=marker,
                capsize=3,
                markersize=8,
                label=row['name'],
            )
        axes.set(xscale='log', xlabel='shipped bytes', ylabel='test accuracy (%)')


def draw_confusion(path: pathlib.Path, counts: np.ndarray, names: Sequence[str], title: str) -> None:
    """Draws a confusion matrix, each row as shares of its class; numbers only where they can be read."""
    classes = len(names)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = 3 + 0.35 * min(classes, 40)
    figure, axes = plt.subplots(figsize=(side + 1, side), layout='constrained')
    image = axes.imshow(shares, vmin=0, vmax=1, cmap='Blues')
    figure.colorbar(image, label='share of the class')
    ticks = range(0, classes, -(-classes // 40))
    axes.set(title=title, xlabel='preferred', ylabel='class', xticks=ticks, yticks=ticks)
    axes.set_xticklabels([names[i] for i in ticks], rotation=90, fontsize='small')
    axes.set_yticklabels([names[i] for i in ticks], fontsize='small')
    if classes <= 20:
        for (row, column), number in np.ndenumerate(counts):
            if number:
                dark = shares[row, column] > 0.5
                axes.text(column, row, number, ha='center', va='center', fontsize='x-small', color='white' if dark else 'black')
    save(figure, path)


def draw_reliability(path: pathlib.Path, confidence: np.ndarray, accuracy: np.ndarray, counts: np.ndarray, title: str) -> None:
    """Draws accuracy against confidence, bin by bin; the larger a bin the larger its point."""
    with one_panel(path, title, (5, 5)) as axes:
        axes.plot([0, 1], [0, 1], color='grey', linestyle='--')
        kept = counts > 0
        sizes = 20 + 280 * counts[kept] / counts.max()
        axes.plot(confidence[kept], accuracy[kept], color='tab:blue', alpha=0.5)
        axes.scatter(confidence[kept], accuracy[kept], s=sizes, color='tab:blue')
        axes.set(xlabel='confidence', ylabel='share of right answers', xlim=(0, 1.02), ylim=(0, 1.02))


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
