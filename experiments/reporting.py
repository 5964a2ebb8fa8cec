"""The report of an experiment: a table and a figure, as `report.json`, `report.md` and `report.html`, and on the terminal."""

import functools
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import kdjax
from experiments import figures, pages
from kdjax import data
from kdjax.files import write_whole
from kdjax.networks import Network
from kdjax.paths import leaves_with_paths


class Row(NamedTuple):
    """One line of the table.

    Attributes:
      name: what was trained.
      accuracies: test accuracy of every seed.
      size: of the file that would be shipped, in bytes.
      network: the network.
      variables: those of the first seed, as loaded from that file.
      extra: further columns, by name.
    """

    name: str
    accuracies: Sequence[float]
    size: int
    network: Network
    variables: dict[str, Any]
    extra: dict[str, float] = {}  # noqa: RUF012 (never changed)


class Section(NamedTuple):
    """A further part of a report.

    Attributes:
      title: its heading.
      text: Markdown.
      figure: name of an image in the folder of the report.
    """

    title: str
    text: str
    figure: str | None = None


def write_report(
    output: pathlib.Path,
    rows: Sequence[Row],
    *,
    title: str,
    dataset: data.Dataset,
    started: float,
    notes: str,
    batch_sizes: Sequence[int] = (1,),
    table: Callable[[Sequence[dict[str, Any]]], str] | None = None,
    draw: Callable[[pathlib.Path, Sequence[dict[str, Any]], str], None] = figures.draw_rows,
    devices: int | None = None,
    sections: Sequence[Section] = (),
) -> None:
    """Writes the report's files and prints the table; `report.json` comes last, and says that the run is finished.

    Of several hosts the first does that.

    Args:
      output: the folder.
      rows: of the table.
      title: of report and figure.
      dataset: whose test split was measured; its inputs are those of the latency too.
      started: `time.time()` at the start of this command.
      notes: a paragraph below the table.
      batch_sizes: at which latency is measured; at 1 it is called `latency_ms`, at n `latency_n_ms`.
      table: makes the table of the results; `accuracy_table` if not given.
      draw: makes the figure.
      devices: how many trained; if not given, all that there are.
      sections: what follows.
    """
    if jax.process_index() != 0:
        return
    results = [summarize(row) | row.extra for row in rows]
    seeds = max(row['runs'] for row in results)
    for size in batch_sizes:
        name = 'latency_ms' if size == 1 else f'latency_{size}_ms'
        for result, latency in zip(results, latencies_ms(rows, dataset.test['inputs'][:size]), strict=True):
            result[name] = latency
    seconds = time.time() - started
    over = f'mean ± standard deviation over {seeds} seeds' if seeds > 1 else 'of one seed, so that deviations are unknown'
    measured = (table or accuracy_table)(results)
    sizes = 'Bytes are the size of the file that would be shipped; latency is the median of one forward pass at batch 1.'
    text = (
        f'# {title}\n\nTest accuracy on {dataset.name}, {over}. {sizes if "bytes" in measured else ""}\n\n'
        f'{measured}\n\n{notes}\n\nThis command took {seconds:.0f} s on {machine(devices)}.\n'
    )
    draw(output / 'figure.png', results, title)
    figures_too = f'{text}\n![{title}](figure.png)\n' + ''.join(map(_in_markdown, sections))
    (output / 'report.md').write_text(figures_too, encoding='utf-8')
    (output / 'report.html').write_text(pages.page(figures_too, output), encoding='utf-8')
    report = {'dataset': dataset.name, 'seeds': seeds, 'wall_clock_s': round(seconds, 1), 'rows': results}
    write_json(output / 'report.json', report)
    print(text)
    print(f'The report is {output / "report.md"}, or as one page {output / "report.html"}')


def _in_markdown(section: Section) -> str:
    figure = '' if section.figure is None else f'\n![{section.title}]({section.figure})\n'
    return f'\n## {section.title}\n\n{section.text}\n{figure}'


def write_json(file: pathlib.Path, value: Any) -> None:
    """Writes a file that is there whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(value, indent=2) + '\n')


def summarize(row: Row) -> dict[str, Any]:
    """A row as `report.json` holds it, but for the latency."""
    named = jax.device_get(leaves_with_paths(row.variables))
    # In what `export.load` returns, names with a colon are those of scales.
    leaves = [leaf for path, leaf in named.items() if path.startswith('params/') and ':' not in path]
    return {
        'name': row.name,
        **mean_and_deviation('accuracy', row.accuracies),
        'parameters': sum(leaf.size for leaf in leaves),
        'nonzero': sum(int(np.count_nonzero(leaf)) for leaf in leaves),
        'bytes': row.size,
        'runs': len(row.accuracies),
    }


def mean_and_deviation(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """Mean and standard deviation over seeds, the latter with n - 1; None for a single seed, which says nothing of it."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {f'{name}_mean': float(np.mean(values)), f'{name}_std': deviation}


def difference(one: Row, other: Row) -> tuple[float, float | None]:
    """The mean change of accuracy, and its standard error; seed by seed, as the rows of a seed share labels and teacher.

    The error is None for a single seed.
    """
    changes = np.subtract(one.accuracies, other.accuracies)
    return float(np.mean(changes)), float(np.sqrt(_variance_of_mean(changes))) if len(changes) > 1 else None


def difference_of_means(one: Sequence[float], other: Sequence[float]) -> tuple[float, float | None]:
    """The difference of two means, and its standard error; the latter is None where either is of a single seed."""
    change = float(np.mean(one) - np.mean(other))
    if min(len(one), len(other)) < 2:
        return change, None
    return change, float(np.sqrt(_variance_of_mean(one) + _variance_of_mean(other)))


def _variance_of_mean(values: Sequence[float]) -> float:
    return np.var(values, ddof=1) / len(values)


def in_points(change: float, error: float | None, digits: int = 2) -> str:
    """A difference of accuracies in points, with its standard error.

    >>> in_points(0.012, 0.003, digits=1), in_points(0.012, None)
    ('+1.2 points (standard error 0.3)', '+1.20 points (standard error unknown with one seed)')
    """
    known = 'unknown with one seed' if error is None else f'{100 * error:.{digits}f}'
    return f'{100 * change:+.{digits}f} points (standard error {known})'


def latencies_ms(rows: Sequence[Row], example: Any) -> list[float]:
    """Median time of each row's jitted forward pass, in milliseconds; taken in turns, as the machine's speed drifts.

    Rows of one network share its compiled function, and so its time. There are 100 rounds at batch 1, and fewer at larger
    batches, but at least 10.
    """

    @functools.partial(jax.jit, static_argnums=0)
    def forward(network: Network, variables: dict[str, Any], inputs: jax.Array) -> jax.Array:
        return network.apply(variables, inputs)[0].logits

    variables = {row.network: row.variables for row in rows}
    prepared = [(network, *jax.device_put((own, jnp.asarray(example)), jax.devices()[0])) for network, own in variables.items()]
    times: dict[Network, list[float]] = {network: [] for network in variables}
    for _ in range(max(10, 100 // len(example))):
        for arguments in prepared:
            forward(*arguments).block_until_ready()  # the first call of a round finds cold caches
            start = time.perf_counter()
            forward(*arguments).block_until_ready()
            times[arguments[0]].append(time.perf_counter() - start)
    return [1000 * float(np.median(times[row.network])) for row in rows]


def machine(devices: int | None = None) -> str:
    """What the numbers were measured on, with how many of its devices if not all."""
    there = jax.device_count()
    used = f'{there}' if devices in (None, there) else f'{devices} of {there}'
    return (
        f'{used} x {jax.devices()[0].device_kind} ({platform.machine()}, {os.cpu_count()} cores), '
        f'Python {platform.python_version()}, jax {jax.__version__}, kdjax {kdjax.__version__}'
    )


def accuracy_table(results: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table; further columns stand at the end, as `mean ± deviation`."""
    further = [key.removesuffix('_mean') for key in results[0] if key.endswith('_mean') and key != 'accuracy_mean']
    heads = [
        'network',
        'test accuracy (%)',
        'parameters',
        'nonzero',
        'bytes',
        'latency (ms)',
        *(k.replace('_', ' ') for k in further),
    ]
    lines = ['| ' + ' | '.join(heads) + ' |', '|---' * len(heads) + '|']
    for row in results:
        cells = [
            row['name'],
            spread(row, 'accuracy', 1, scale=100),
            *(f'{row[key]:,}' for key in ('parameters', 'nonzero', 'bytes')),
            f'{row["latency_ms"]:.3f}',
            # What was changed after training has no best epoch, and the like.
            *(spread(row, key, 3) if f'{key}_mean' in row else '' for key in further),
        ]
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def spread(row: dict[str, Any], key: str, digits: int, scale: float = 1) -> str:
    """A column as `mean ± deviation`, or the mean alone where there is no deviation.

    >>> spread({'nll_mean': 0.25, 'nll_std': 0.125}, 'nll', 3), spread({'nll_mean': 0.25, 'nll_std': None}, 'nll', 3)
    ('0.250 ± 0.125', '0.250')
    """
    mean, deviation = row[f'{key}_mean'], row[f'{key}_std']
    known = '' if deviation is None else f' ± {scale * deviation:.{digits}f}'
    return f'{scale * mean:.{digits}f}{known}'
