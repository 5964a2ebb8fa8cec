"""One epoch over data that do not fit in memory: read ahead on the host, through grain, while the device trains."""

import collections
import dataclasses
import functools
import itertools
import weakref
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from kdjax import paths
from kdjax.batches import Batch, count_examples
from kdjax.dependencies import needed_for
from kdjax.metrics import Average
from kdjax.networks import Variables
from kdjax.parallel import check_divisible, distribute, shard_batch
from kdjax.problems import Problem, TrainState
from kdjax.training._augmentation import Augment, Views, augmented, check_augmentation, check_recorded, in_view
from kdjax.training._epochs import Epoch, Stop, cached, steps_per_epoch, stream

AHEAD = 3
"""Batches that wait on the device, and steps that the host may be ahead of it."""


class Source(Protocol):
    """Examples that can be read in any order, such as `tfds.data_source`, ArrayRecord or a `grain.MapDataset`.

    One that has `__getitems__(indices) -> examples` reads a batch at once.
    """

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One example, a dictionary of pytrees of arrays: `'inputs'` and perhaps `'labels'`."""
        ...


@dataclasses.dataclass(frozen=True)
class JoinedSource:
    """Examples with further entries from arrays, such as recorded logits: `JoinedSource(source, recorded_teacher(folder))`.

    Attributes:
      source: the examples.
      arrays: further entries [examples, ...]; memory maps are read where they are, and are not sent to workers.

    >>> JoinedSource([{'inputs': 1.0}, {'inputs': 2.0}], {'rest': np.array([5, 6])})[1]
    {'inputs': 2.0, 'rest': np.int64(6)}
    """

    source: Source
    arrays: Batch

    def __post_init__(self) -> None:
        sizes = {name: len(leaf) for name, array in self.arrays.items() for leaf in jax.tree.leaves(array)}
        if set(sizes.values()) != {len(self.source)}:
            raise ValueError(f'JoinedSource: the source has {len(self.source)} examples, and the arrays have {sizes}')

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One example."""
        return {**self.source[index], **jax.tree.map(lambda array: array[index], self.arrays)}


def streaming_epoch(
    problem: Problem,
    *,
    batch_size: int,
    workers: int = 0,
    augment: Augment | None = None,
    views: Views | None = None,
    mesh: Mesh | None = None,
) -> Epoch:
    """Makes a function that runs one epoch as `training.in_memory_epoch` does, over data that are read while they are used.

    The order of the examples is a function of the run's key and the number of the epoch alone, though not that of
    `training.in_memory_epoch`; their augmentation has the same keys as there. Reading goes on from one epoch to the next, so
    workers start once. Examples that do not fill a last batch are left out; others are in the next epoch.

    Args:
      problem: the training problem.
      batch_size: examples a step.
      workers: processes that read; 0 reads in threads, which is enough where the libraries that decode release Python's lock.
        A script with workers needs `if __name__ == '__main__':`, and its source must pickle.
      augment: applied to every example on the device, with a key of its own.
      views: augmented views that repeat, in place of `augment`: those that `record_teacher` has recorded.
      mesh: devices to split each batch over; state and teacher must be on it as `shard` lays them out.

    Returns:
      The function; its data is a `Source`, a `JoinedSource`, or a dictionary of arrays, such as memory maps.

    Raises:
      ValueError: the batch does not divide over the devices, an argument is out of range, or, from the function, there are
        fewer examples than a batch has, or examples are not alike.
    """
    if batch_size < 1 or workers < 0:
        raise ValueError(f'batch_size must be at least 1 and workers at least 0, got {batch_size} and {workers}')
    check_augmentation(augment, views)
    put = jax.device_put
    if mesh is not None:
        check_divisible(mesh, batch_size)
        put = functools.partial(shard_batch, mesh)
    fixed = None if views is None else (views.augment, views.number)
    dispatch = cached(_dispatcher, problem, augment, fixed, mesh)
    views_key = None if views is None else views.key

    # At most one: what goes on reading where the last epoch ended, by data, which it holds, order and step.
    reading: dict[tuple[int, int, int], Generator[Any, None, None]] = {}

    def close() -> None:
        while reading:
            reading.popitem()[1].close()

    def run(
        state: TrainState, teacher_variables: Variables | None, data: Any, stop: Stop | None, begin: int, limit: int | None
    ) -> tuple[TrainState, list[dict[str, Average]]]:
        check_recorded(data, augment, views)
        steps = steps_per_epoch(data, batch_size)
        seed = int(jax.random.bits(stream(state.key, 'shuffle')))
        batches = reading.pop((id(data), seed, begin), None)
        if batches is None:
            close()
            batches = read_batches(data, batch_size, seed=seed, start=begin, workers=workers, put=put, views=views)
        metrics: list[dict[str, Average]] = []
        end = (begin // steps + 1) * steps
        for step in range(begin, end if limit is None else min(end, begin + limit)):
            batch, indices = next(batches)
            state, some = dispatch(state, teacher_variables, batch, indices, np.int32(step // steps), views_key)
            metrics.append(some)
            if len(metrics) >= AHEAD:
                # Else a fast reader would fill the device with batches that wait for their step.
                jax.block_until_ready(metrics[-AHEAD])
            if stop is not None and stop():
                break
        reading[id(data), seed, begin + len(metrics)] = batches
        return state, metrics

    weakref.finalize(run, close)
    return Epoch(run, batch_size)


@functools.lru_cache(maxsize=32)
def _dispatcher(problem: Problem, augment: Augment | None, fixed: tuple[Augment, int] | None, mesh: Mesh | None) -> Any:
    """The jitted step on a batch that was read; cached, so that a problem is compiled once for all its runs."""
    if mesh is not None:
        problem = distribute(mesh, problem)

    @functools.partial(jax.jit, donate_argnums=0)
    def dispatch(
        state: TrainState, teacher_variables: Any, batch: Batch, indices: jax.Array, number: jax.Array, views_key: Any
    ) -> Any:
        views = None if fixed is None else Views(fixed[0], views_key, fixed[1])
        key = stream(state.key, 'augment')
        inputs = augmented(batch['inputs'], indices, number, augment=augment, key=key, views=views)
        state, metrics = problem.step(state, teacher_variables, {**batch, 'inputs': inputs})
        return state, jax.tree.map(lambda x: x[None], metrics)

    return dispatch


def read_batches(
    data: Any,
    batch_size: int,
    *,
    seed: int,
    start: int = 0,
    workers: int = 0,
    put: Callable[[Any], Any] = jax.device_put,
    views: Views | None = None,
) -> Generator[tuple[Batch, jax.Array], None, None]:
    """Reads the batches of epoch after epoch, without end, some of them before they are asked for.

    Args:
      data: as in the function of `streaming_epoch`.
      batch_size: examples a batch.
      seed: of the order, which is a function of it and the number of the epoch.
      start: number of the first batch, counted from the first epoch on.
      workers: processes that read.
      put: puts arrays on the device.
      views: whose recorded predictions to pick.

    Yields:
      Batches, and the indices of their examples in the data.
    """
    if isinstance(data, dict):
        source, arrays = None, data
    elif isinstance(data, JoinedSource):
        source, arrays = data.source, data.arrays
    else:
        source, arrays = data, {}
    steps = steps_per_epoch(data, batch_size)
    records = _read_records(source, count_examples(data), batch_size, seed, start, workers)

    def next_batch(number: int) -> tuple[Batch, jax.Array]:
        batch, indices = next(records)
        batch = {**batch, **jax.tree.map(lambda array: np.asarray(array[indices]), arrays)}
        if 'inputs' not in batch:
            raise ValueError(f"an example needs 'inputs', got {', '.join(sorted(batch))}: map the source to these names")
        if views is not None:
            batch = in_view(batch, views, number // steps)
        return put(batch), put(indices.astype(np.int32))

    reader = ThreadPoolExecutor(1)
    try:
        ahead = collections.deque(reader.submit(next_batch, start + i) for i in range(AHEAD))
        for number in itertools.count(start + AHEAD):
            batch = ahead.popleft().result()
            ahead.append(reader.submit(next_batch, number))
            yield batch
    finally:
        reader.shutdown(cancel_futures=True)
        records.close()


def _read_records(source: Source | None, examples: int, batch_size: int, seed: int, start: int, workers: int) -> Any:
    """A grain iterator over batches of a source and their indices; of nothing but indices where there is no source."""
    with needed_for('reading examples from a source'):
        import grain

    indices = grain.MapDataset.range(examples).seed(seed).shuffle()
    indices = indices[: examples // batch_size * batch_size].batch(batch_size).repeat()[start:]
    batches = indices.map(functools.partial(stack_examples, source))
    # Buffers count batches; grain's own sizes are meant for single records.
    dataset = batches.to_iter_dataset(grain.ReadOptions(num_threads=AHEAD, prefetch_buffer_size=AHEAD))
    if workers:
        from absl import flags

        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain reads flags in its workers, and absl's parser may not have run
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=AHEAD))
        # Copied out of the memory that workers share, which is then free.
        dataset = dataset.map(functools.partial(jax.tree.map, np.array))
    return iter(dataset)


def stack_examples(source: Source | None, indices: np.ndarray) -> tuple[Batch, np.ndarray]:
    """A batch of examples, read at once where the source can do that."""
    if source is None:
        return {}, indices
    read = getattr(source, '__getitems__', None)
    examples = [source[int(i)] for i in indices] if read is None else read(indices.tolist())
    if not isinstance(examples[0], dict):
        raise ValueError(
            "an example must be a dictionary {'inputs': ..., 'labels': ...}, got "
            f'{type(examples[0]).__name__}: map the source'
        )

    def stack(path: Any, *leaves: Any) -> np.ndarray:
        arrays = [np.asarray(leaf) for leaf in leaves]
        shapes = {array.shape for array in arrays}
        if len(shapes) > 1:
            name = paths.path_of(path)
            raise ValueError(f'the examples have {name!r} of {len(shapes)} shapes, such as {sorted(shapes)[:2]}')
        return np.stack(arrays)

    return jax.tree_util.tree_map_with_path(stack, *examples), indices
