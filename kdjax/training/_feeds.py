"""How data of any kind are fed to training: what `fit` has to know of them, and the epoch that suits them."""

import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from kdjax.batches import Batch, check_batch, count_examples, take_examples
from kdjax.parallel import check_divisible, replicate
from kdjax.problems import Problem
from kdjax.training import _fingerprints
from kdjax.training._augmentation import Augment, Views, check_recorded, one_view
from kdjax.training._epochs import Epoch, check_in_memory, in_memory_epoch, steps_per_epoch
from kdjax.training._loaders import LoadedBatches, loader_epoch
from kdjax.training._streaming import JoinedSource, stack_examples, streaming_epoch

# Bytes of a data set that are read to tell it from others; of a larger one, examples spread over it.
_DIGESTED = 2**26
_SPREAD = 64


class Feed(NamedTuple):
    """Data, and how they are trained on.

    Attributes:
      epoch: the function that trains.
      data: what it takes.
      example: a first batch, for shapes.
      at_hand: all of the data whose values can be looked at: those in memory, or the first batch.
      steps_per_epoch: None where the data do not say.
      settings: what a run that is resumed must have in common with this one.
      position: where the data stand, in what JSON can hold.
      seek: `seek(step, position, say)` has the data go on where an earlier run left them.
    """

    epoch: Epoch
    data: Any
    example: Batch
    at_hand: Batch
    steps_per_epoch: int | None
    settings: dict[str, Any]
    position: Callable[[], Any]
    seek: Callable[[int, Any, bool], None]


def feed(
    problem: Problem,
    data: Any,
    *,
    batch_size: int | None,
    mesh: Mesh | None = None,
    augment: Augment | None = None,
    views: Views | None = None,
    workers: int = 0,
) -> Feed:
    """Chooses by the data: in memory, streamed, or in a loader's batches.

    Raises:
      ValueError: the data are none of these, or were recorded otherwise than they would be seen.
    """
    if isinstance(data, dict) or (isinstance(data, tuple) and not isinstance(data, JoinedSource)) or hasattr(data, 'shape'):
        check_in_memory(data)
        if batch_size is None:
            raise ValueError('data in memory need a batch_size')
        return _of_examples(problem, data, batch_size, mesh, augment, views, workers)
    text = isinstance(data, (str, bytes))
    if hasattr(data, '__getitem__') and hasattr(data, '__len__') and batch_size is not None and not text:
        return _of_examples(problem, data, batch_size, mesh, augment, views, workers)
    if text or not isinstance(data, Iterable):
        raise ValueError(
            "data must be a dictionary {'inputs': ..., 'labels': ...} of arrays, a source of such examples, or a loader of "
            f'such batches, got {type(data).__name__}'
        )
    if views is not None:
        raise ValueError('views need to know which example is which, and batches of a loader do not say: pass a source')
    return _of_batches(problem, LoadedBatches(data), batch_size, mesh, augment)


def _of_examples(
    problem: Problem,
    data: Any,
    batch_size: int,
    mesh: Mesh | None,
    augment: Augment | None,
    views: Views | None,
    workers: int,
) -> Feed:
    check_recorded(data, augment, views)
    mapped = isinstance(data, dict) and any(_on_disk(x) for x in jax.tree.leaves(data['inputs']))
    options: dict[str, Any] = {'batch_size': batch_size, 'augment': augment, 'views': views, 'mesh': mesh}
    if isinstance(data, dict) and not mapped:
        epoch = in_memory_epoch(problem, **options)
    else:
        epoch = streaming_epoch(problem, workers=workers, **options)
    steps = steps_per_epoch(data, batch_size)
    example = _examples(data, np.arange(batch_size))
    check_batch(example)
    at_hand = data if isinstance(data, dict) else example
    settings = {'examples': count_examples(data), 'batch_size': batch_size, 'data': _digest(data)}
    if isinstance(data, dict) and not mapped:
        # Once, and not at every interval.
        data = jax.tree.map(jnp.asarray, data) if mesh is None else replicate(mesh, data)
    example = example if views is None else one_view(example, 0)
    return Feed(epoch, data, example, at_hand, steps, settings, lambda: None, lambda step, position, say: None)


def _on_disk(array: Any) -> bool:
    """Whether an array is read when it is indexed, as memory maps are and what else is neither numpy's nor jax's."""
    return isinstance(array, np.memmap) or not isinstance(array, (np.ndarray, jax.Array))


def _of_batches(
    problem: Problem, batches: LoadedBatches, batch_size: int | None, mesh: Mesh | None, augment: Augment | None
) -> Feed:
    example = batches.peek()
    check_recorded(example, augment, None)
    found = count_examples(example)
    if batch_size not in (None, found):
        raise ValueError(
            f'the first batch has {found} examples, and batch_size is {batch_size}: leave it out, or set the loader'
        )
    if mesh is not None:
        check_divisible(mesh, found)

    def seek(step: int, position: Any, say: bool) -> None:
        if batches.seek(step, position) and say and jax.process_index() == 0:
            tqdm.write(
                f'the loader keeps no state of its own: {step} batches were read and left out, which is right if it gives the '
                'same batches again',
                file=sys.stderr,
            )

    settings = {'batch_size': found, 'batches': batches.length}
    epoch = loader_epoch(problem, augment=augment, mesh=mesh)
    return Feed(epoch, batches, example, example, batches.length, settings, batches.state, seek)


def _examples(data: Any, indices: np.ndarray) -> Batch:
    if isinstance(data, dict):
        return jax.tree.map(np.asarray, take_examples(data, indices))
    return stack_examples(data, indices)[0]


def _digest(data: Any) -> str:
    """What tells data from others: SHA-256 of them, or, where they are large or read one by one, of examples from all over."""
    examples = count_examples(data)
    small = isinstance(data, dict) and sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(data)) <= _DIGESTED
    some = np.arange(examples) if small else np.unique(np.linspace(0, examples - 1, min(examples, _SPREAD)).astype(int))
    return _fingerprints.of_arrays(_examples(data, some))[:16]
