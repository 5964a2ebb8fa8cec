"""Shards of a data set, one for each client of a federation."""

from collections.abc import Sequence

import numpy as np

from kdjax.batches import Batch
from kdjax.data._dataset import take


def dirichlet_shards(labels: np.ndarray, shards: int, *, concentration: float, seed: int = 0) -> list[np.ndarray]:
    """Shares examples out so that every shard has a mixture of classes of its own.

    The examples of each class go to the shards in proportions drawn from a symmetric Dirichlet distribution. The smaller its
    concentration, the fewer shards have most of a class; the larger, the more alike the shards are. An empty shard gets an
    example of the largest.

    Args:
      labels: integers [examples].
      shards: how many.
      concentration: α > 0.
      seed: of the draw.

    Returns:
      The indices of each shard's examples; every example is in one of them.

    Raises:
      ValueError: there are fewer examples than shards, no shards, or the concentration is not positive.

    >>> shards = dirichlet_shards(np.repeat([0, 1], 50), 4, concentration=0.1)
    >>> sorted(np.concatenate(shards).tolist()) == list(range(100))
    True

    Reference:
      Hsu, Qi, Brown. Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification. 2019.
      https://arxiv.org/abs/1909.06335
    """
    labels = np.asarray(labels)
    if not 1 <= shards <= len(labels):
        raise ValueError(f'dirichlet_shards: shards must be between 1 and {len(labels)}, the number of examples, got {shards}')
    if concentration <= 0:
        raise ValueError(f'dirichlet_shards: concentration must be positive, got {concentration}')
    rng = np.random.default_rng(seed)
    parts: list[list[int]] = [[] for _ in range(shards)]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        proportions = rng.dirichlet(np.full(shards, concentration))
        ends = np.round(np.cumsum(proportions)[:-1] * len(members)).astype(int)
        for part, share in zip(parts, np.split(members, ends), strict=True):
            part.extend(share.tolist())
    for part in parts:
        if not part:
            part.append(max(parts, key=len).pop())
    return [np.sort(np.asarray(part)) for part in parts]


def stack_shards(data: Batch, shards: Sequence[np.ndarray]) -> Batch:
    """The shards of a data set as arrays [shards, examples, ...]; small ones repeat their own, up to the size of the largest.

    Args:
      data: arrays [examples, ...].
      shards: indices of the examples of each, as `dirichlet_shards` gives them.

    >>> stack_shards({'labels': np.array([5, 6, 7])}, [np.array([0, 2]), np.array([1])])
    {'labels': array([[5, 7],
           [6, 6]])}
    """
    size = max(map(len, shards))
    return take(data, np.stack([np.resize(shard, size) for shard in shards]))
