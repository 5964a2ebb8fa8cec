"""What the scenarios share: a learning rate, rows by name, and the accuracy of what was shipped."""

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import optax

from experiments import reporting, shipping
from kdjax import metrics, networks, training
from kdjax.batches import Batch


def falling(rate: float, epochs: int, split: Batch, batch_size: int) -> optax.Schedule:
    """A learning rate that falls from `rate` to 0 along a cosine, over so many epochs of a split."""
    return optax.cosine_decay_schedule(rate, epochs * training.steps_per_epoch(split, batch_size))


def by_name(seeds: Iterable[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """What the seeds made, each under the same names, as one list for every name.

    >>> by_name([{'teacher': 1, 'student': 2}, {'teacher': 3, 'student': 4}])
    {'teacher': [1, 3], 'student': [2, 4]}
    """
    collected: dict[str, list[Any]] = {}
    for made in seeds:
        for name, value in made.items():
            collected.setdefault(name, []).append(value)
    return collected


def measure(
    network_of: Mapping[str, networks.Network],
    trained: Mapping[str, Sequence[Any]],
    test: Batch,
    output: pathlib.Path,
) -> list[reporting.Row]:
    """Ships the variables of every name and seed, loads them again, and measures their accuracy.

    Args:
      network_of: by name.
      trained: variables of every seed, by name.
      test: the test split.
      output: folder of the run.
    """
    evaluators = {network: training.evaluator(network) for network in network_of.values()}

    def row(name: str, each_seed: Sequence[Any]) -> reporting.Row:
        network = network_of[name]
        shipped = [shipping.ship(output, name, seed, variables) for seed, variables in enumerate(each_seed)]
        accuracies = [metrics.compute(evaluators[network](variables, test))['accuracy'] for _, variables in shipped]
        return reporting.Row(name, accuracies, max(size for size, _ in shipped), network, shipped[0][1])

    return [row(name, each_seed) for name, each_seed in trained.items()]


def gain(rows: Sequence[reporting.Row], name: str, baseline: str) -> str:
    """The difference of two rows in points, with its standard error, as in '+1.2 points (standard error 0.3)'."""
    found = {row.name: row for row in rows}
    return reporting.in_points(*reporting.difference(found[name], found[baseline]))
