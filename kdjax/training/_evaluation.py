"""What a network is worth on a data set, as sums and counts."""

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from kdjax.batches import Batch, check_batch, count_examples, take_examples
from kdjax.metrics import Metric, Sums, accuracy, add, agreement, calibration_error, nll
from kdjax.networks import Network, Outputs, Variables
from kdjax.parallel import mesh_of, shard_batch
from kdjax.training._streaming import Source, stack_examples


class Evaluate(Protocol):
    """Measures a network on a data set."""

    def __call__(
        self, variables: Variables, data: Batch | Source | Iterable[Batch], teacher_variables: Variables | None = None
    ) -> dict[str, Sums]:
        """Returns every metric by name, as sums."""
        ...


"""`evaluate(variables, data, teacher_variables=None) -> metrics`."""


def evaluator(
    network: Network,
    *,
    teacher: Network | None = None,
    metrics: Mapping[str, Metric] | Sequence[Metric] | None = None,
    batch_size: int = 256,
) -> Evaluate:
    """Makes a function that measures a network on a data set; `metrics.compute` reads what it returns.

    Where variables live on a mesh, of several hosts perhaps, each batch is split over its devices, and every host gets the
    same numbers.

    Args:
      network: the network.
      teacher: a network to compare with, whose logits metrics find in `batch['teacher_logits']`.
      metrics: what to measure, of `kdjax.metrics` or one's own, by name; of a sequence, each has the name of its function. By
        default `accuracy`, `nll` and `calibration_error`, and with a teacher `agreement`.
      batch_size: examples at a time, rounded up to a multiple of the devices; the last batch is padded and the padding is not
        counted.

    Returns:
      A function of the network's variables, the data, and the teacher's variables. Data is a dictionary of arrays
      {'inputs', perhaps 'labels', 'mask', 'weights' and what else metrics need}, a `Source`, or an iterable of batches, such as
      a loader or the iterator of a list, each of which is one step. It returns the sums of every metric over all of them, in
      float64 on the host.

    Raises:
      ValueError: two metrics have one name, or, from the function: the data are empty, an entry that a metric needs is missing
        or does not fit, or labels are beyond the classes.

    >>> import flax.linen as nn
    >>> from kdjax import metrics, networks
    >>> network = networks.from_linen(nn.Dense(3))
    >>> data = {'inputs': np.ones((4, 5), np.float32), 'labels': np.array([0, 1, 2, -1])}
    >>> measured = evaluator(network, metrics=[metrics.accuracy()])(network.init(jax.random.key(0), data['inputs']), data)
    >>> metrics.compute(measured)
    {'accuracy': 0.333}
    """
    if batch_size < 1:
        raise ValueError(f'evaluator: batch_size must be at least 1, got {batch_size}')
    measures = _by_name(
        [accuracy(), nll(), calibration_error(), *[agreement()] * (teacher is not None)] if metrics is None else metrics
    )

    def predict(variables: Variables, teacher_variables: Variables | None, batch: Batch) -> tuple[Outputs, Batch]:
        outputs, _ = network.apply(variables, batch['inputs'], train=False)
        if teacher is not None:
            teacher_outputs, _ = teacher.apply(teacher_variables, batch['inputs'], train=False)
            batch = {**batch, 'teacher_logits': teacher_outputs.logits}
        return outputs, batch

    @functools.partial(jax.jit, static_argnums=3)
    def measure(variables: Variables, teacher_variables: Variables | None, batch: Batch, mesh: Mesh | None) -> dict[str, Sums]:
        outputs, batch = predict(variables, teacher_variables, batch)
        measured = {name: metric(outputs, batch) for name, metric in measures.items()}
        return measured if mesh is None else jax.lax.with_sharding_constraint(measured, NamedSharding(mesh, PartitionSpec()))

    def explain(variables: Variables, teacher_variables: Variables | None, batch: Batch) -> None:
        """Raises what a metric has to say about the batch. In the program it could only answer with NaN."""
        shapes = jax.eval_shape(predict, variables, teacher_variables, batch)
        outputs, predicted = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        for metric in measures.values():
            metric(outputs, {**predicted, **batch})

    def evaluate(
        variables: Variables, data: Batch | Source | Iterable[Batch], teacher_variables: Variables | None = None
    ) -> dict[str, Sums]:
        mesh, total = mesh_of((variables, teacher_variables)), None

        def measured() -> Iterator[Any]:
            for batch in _batches(data, batch_size, 1 if mesh is None else mesh.size):
                placed = batch if mesh is None else shard_batch(mesh, batch)
                yield batch, measure(variables, teacher_variables, placed, mesh)

        # In pairs, so that the host adds one batch up while the device computes the next.
        for (batch, sums), _ in itertools.pairwise(itertools.chain(measured(), [None])):
            sums = add(sums)
            if any(np.isnan(leaf).any() for leaf in jax.tree.leaves(sums)):
                explain(variables, teacher_variables, batch)
            total = sums if total is None else add(total, sums)
        if total is None:
            raise ValueError('evaluation: there are no examples; an iterator, such as a generator, can be read only once')
        return total

    return evaluate


def _by_name(metrics: Mapping[str, Metric] | Sequence[Metric]) -> dict[str, Metric]:
    if isinstance(metrics, Mapping):
        return dict(metrics)
    names = [getattr(metric, '__name__', '') for metric in metrics]
    if not all(names) or len(set(names)) < len(names):
        raise ValueError(f'evaluator: metrics need names of their own, got {names}: give a dictionary of names and metrics')
    return dict(zip(names, metrics, strict=True))


def _batches(data: Any, batch_size: int, devices: int) -> Iterator[Batch]:
    """Batches of one size, so that one program serves all; where one is filled up, its mask says so."""
    if not isinstance(data, dict) and not (hasattr(data, '__len__') and hasattr(data, '__getitem__')):
        # The last batch of a loader is smaller; one that is larger makes room for those after it.
        size = 1
        for batch in data:
            check_batch(batch)
            size = max(size, count_examples(batch))
            yield from _batches(batch, size, devices)
        return
    if isinstance(data, dict):
        check_batch(data)
        data = {name: jax.tree.map(_as_array, value) for name, value in data.items()}
        examples, read = count_examples(data), functools.partial(take_examples, data)
    else:
        examples, read = len(data), lambda indices: stack_examples(data, indices)[0]
    size = -(-batch_size // devices) * devices
    for start in range(0, examples, size):
        indices = np.arange(start, start + size)
        exists = indices < examples
        batch = read(np.where(exists, indices, start))
        check_batch(batch)
        mask = batch.get('mask', exists)
        # A mask of another dtype is left for the error that it will get.
        if mask.dtype == np.bool_:
            mask = mask & exists.reshape(-1, *(1,) * (mask.ndim - 1))
        yield {**batch, 'mask': mask}


def _as_array(leaf: Any) -> Any:
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


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
