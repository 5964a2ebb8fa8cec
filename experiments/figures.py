"""The figures that experiments share, and what is the same in all of them."""

import collections
import contextlib
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from matplotlib import ticker

MARKERS = 'osD^vP*Xd<>hp'
ACCURACY = {'accuracy': ''}
COSTS = {'bytes': 'shipped bytes', 'latency_ms': 'latency at batch 1 (ms)'}


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
    # A legend may be wider than its figure: names are the user's, and constrained layout lets them be cut off.
    figure.savefig(path, dpi=150, bbox_inches='tight')
    plt.close(figure)


def error_bar(row: dict[str, Any], key: str, scale: float = 100) -> float:
    """The deviation of a column, for matplotlib; NaN, which it does not draw, where one seed says nothing of it."""
    return float('nan') if row[f'{key}_std'] is None else scale * row[f'{key}_std']


def draw_accuracy(
    path: pathlib.Path,
    results: Sequence[dict[str, Any]],
    title: str,
    *,
    costs: Mapping[str, str] = COSTS,
    look: Callable[[str], dict[str, Any]] | None = None,
    key: Sequence[Any] = (),
) -> None:
    """Draws accuracy against what a network costs, a panel for each cost, with the Pareto fronts.

    Points of one cost stand side by side, so that their error bars can be told apart. The axis is logarithmic in the error, so
    that the best and the worst can.

    Args:
      path: file to write.
      results: the rows.
      title: of the figure.
      costs: label by key of what a network costs.
      look: the style of a row by its name; a marker and a colour of its own, with its name in the legend, if not given. With a
        look, rows on a front have their number in the table beside them, and their names below.
      key: handles of the legend that explain the look.
    """
    figure, panels = plt.subplots(1, len(costs), figsize=(5.2 * len(costs), 6), sharey=True, layout='constrained')
    figure.suptitle(title)
    ends = [
        100 * row['accuracy_mean'] + sign * np.nan_to_num(error_bar(row, 'accuracy')) for row in results for sign in (-1, 1)
    ]
    for axes, (cost, label) in zip(np.atleast_1d(panels), costs.items(), strict=True):
        front = pareto_front(results, cost)
        prices = [row[cost] for row in front] + [max(row[cost] for row in results)]
        heights = [100 * row['accuracy_mean'] for row in front]
        axes.step(prices, [*heights, heights[-1]], where='post', color='grey', linewidth=1, zorder=0)
        before = collections.Counter()
        for number, (row, marker) in enumerate(zip(results, MARKERS * len(results), strict=False), start=1):
            place = row[cost] * 1.03 ** before[row[cost]], 100 * row['accuracy_mean']
            before[row[cost]] += 1
            style = {'fmt': marker, 'label': row['name']} if look is None else look(row['name'])
            axes.errorbar(*place, yerr=error_bar(row, 'accuracy'), capsize=2, markersize=8, **style)
            if look is not None and row in front:
                axes.annotate(str(number), place, xytext=(-4, 7), textcoords='offset points', ha='right', fontsize='small')
        if look is not None:
            names = [f'{results.index(row) + 1}  {row["name"]}' for row in front]
            handles = [plt.Line2D([], [], linestyle='', label=name) for name in names]
            place = {'loc': 'upper center', 'bbox_to_anchor': (0.5, -0.12), 'handlelength': 0}
            axes.legend(handles=handles, title='on the front', fontsize='small', **place)
        axes.set(xscale='log', xlabel=label)
        _label_few(axes.xaxis)
        _scale_by_error(axes, min(ends), max(ends))
        axes.grid(alpha=0.3)
    first = np.atleast_1d(panels)[0]
    first.set(ylabel='test accuracy (%)')
    handles = [*(key or first.get_legend_handles_labels()[0]), plt.Line2D([], [], color='grey', label='Pareto front')]
    figure.legend(handles=handles, loc='outside lower center', ncols=min(len(handles), 2 * len(costs)), fontsize='small')
    save(figure, path)


def _label_few(axis: Any) -> None:
    """Labels so few places of a logarithmic axis that they do not collide."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(ticker.MaxNLocator(5) if high < 5 * low else ticker.LogLocator(subs=(1, 2, 5), numticks=8))
    short = ticker.EngFormatter(sep='')
    axis.set_major_formatter(lambda x, position: short(x) if x >= 1000 else f'{x:g}')
    axis.set_minor_locator(ticker.NullLocator())


def _scale_by_error(axes: plt.Axes, lowest: float, highest: float) -> None:
    """Makes the height of a percentage the logarithm of what it lacks to 101, and shows what lies between these two."""
    axes.set_yscale('function', functions=(lambda y: -np.log10(np.maximum(101 - y, 1e-3)), lambda y: 101 - 10**-y))
    below, above = max(0.0, lowest - 0.3 * (101 - lowest)), min(100.3, highest + 0.3 * (101 - highest))
    ticks = [
        tick
        for tick in (0, 20, 30, 40, 50, 60, 70, 75, 80, 85, 90, 93, 95, 96, 97, 98, 99, 99.5, 100)
        if below <= tick <= above
    ]
    axes.set_ylim(below, above)
    axes.set_yticks(ticks, [f'{tick:g}' for tick in ticks])
    axes.yaxis.set_minor_locator(ticker.NullLocator())


def pareto_front(results: Sequence[dict[str, Any]], cost: str) -> list[dict[str, Any]]:
    """The rows for which no other costs as little or less and is as accurate or more, cheapest first.

    >>> rows = [{'bytes': size, 'accuracy_mean': accuracy} for size, accuracy in ((3, 0.9), (1, 0.8), (2, 0.7), (4, 0.9))]
    >>> [row['bytes'] for row in pareto_front(rows, 'bytes')]
    [1, 3]
    """
    front: list[dict[str, Any]] = []
    for row in sorted(results, key=lambda row: (row[cost], -row['accuracy_mean'])):
        if not front or row['accuracy_mean'] > front[-1]['accuracy_mean']:
            front.append(row)
    return front


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


def draw_classes(
    path: pathlib.Path, shares: Mapping[str, np.ndarray], names: Sequence[str], title: str, *, most: int = 40
) -> None:
    """Draws a share for each class, such as the recall, as one bar of every network; of many classes the worst of the last one.

    Args:
      path: file to write.
      shares: [classes] of every network, by name; NaN for a class without examples.
      names: of the classes.
      title: of the figure.
      most: classes that are drawn.
    """
    last = list(shares.values())[-1]
    order = [i for i in np.argsort(last, kind='stable') if not np.isnan(last[i])][:most]
    with one_panel(path, title, (8, 1.5 + (0.15 + 0.15 * len(shares)) * len(order))) as axes:
        height = 0.8 / len(shares)
        for i, (name, each) in enumerate(shares.items()):
            axes.barh(np.arange(len(order)) + (i + 0.5) * height - 0.4, 100 * each[order], height, label=name)
        axes.set(xlabel='found (%)', xlim=(0, 100), yticks=range(len(order)), yticklabels=[names[i] for i in order])
        axes.invert_yaxis()


def draw_curves(path: pathlib.Path, records: Sequence[dict[str, Any]], title: str) -> None:
    """Draws the loss and the validation accuracy over the epochs, the mean over seeds with its range.

    Args:
      path: file to write.
      records: lines of a metrics log; what follows the seed in the name of a run is the name of a curve.
      title: of the figure.
    """
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), layout='constrained')
    figure.suptitle(title)
    for axes, (key, scale, label) in zip(
        panels, (('loss', 1, 'training loss'), ('validation/accuracy', 100, 'validation accuracy (%)')), strict=True
    ):
        curves: dict[str, dict[int, list[float]]] = collections.defaultdict(lambda: collections.defaultdict(list))
        for record in records:
            if record.get(key) is not None:
                name = re.sub(r'^seed\d+/', '', record['run'])
                curves[name][record['epoch']].append(scale * record[key])
        for name, points in curves.items():
            epochs = sorted(points)
            (line,) = axes.plot(epochs, [np.mean(points[epoch]) for epoch in epochs], label=name)
            ends = [min(points[epoch]) for epoch in epochs], [max(points[epoch]) for epoch in epochs]
            axes.fill_between(epochs, *ends, color=line.get_color(), alpha=0.2, linewidth=0)
        axes.set(xlabel='epoch', ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    # Losses of different objectives differ by orders of magnitude.
    panels[0].set(yscale='log')
    panels[1].legend(fontsize='small')
    save(figure, path)


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
