"""What an example looks like in an epoch: fresh in every one, or one of a fixed number of views whose teacher is recorded."""

import json
import zlib
from typing import Any, NamedTuple

import jax
import numpy as np

from kdjax.batches import Batch, rest_entry
from kdjax.data.augment import Augment

RECORDED = ('teacher_logits', 'teacher_hidden', 'top_logits', 'top_indices', 'rest')
"""The teacher's predictions among the entries of data that `record_teacher` makes; and `rest_entry` of temperatures."""

RECORDED_VIEWS = 'recorded_views'
"""The entry of these that says which views they are of, [examples]: the number of `identify_views`."""


class Views(NamedTuple):
    """A fixed number of augmented views of every example, for `record_teacher` and then for `in_memory_epoch`.

    Example i looks in epoch e as in epoch e + number: `augment` gets `fold_in(fold_in(key, e % number), i)`. So a teacher that
    has seen each view once has seen all that the student will.

    Attributes:
      augment: `augment(key, input) -> input`.
      key: the views' own random key; runs with other keys share recorded logits.
      number: how many views there are.
    """

    augment: Augment
    key: jax.Array
    number: int


def is_recorded(name: str) -> bool:
    """Whether an entry of data is a teacher's prediction."""
    return name in RECORDED or name.startswith(rest_entry(''))


def one_view(batch: Batch, view: Any) -> Batch:
    """A batch, or a data set, with the teacher's recorded predictions of one view.

    What `problem.init` needs of data with several views: `problem.init(key, one_view(batch, 0))`.

    Args:
      batch: arrays [examples, ...], those of `record_teacher` [examples, views, ...].
      view: number of the view.

    >>> import numpy as np
    >>> one_view({'labels': np.zeros(2), 'teacher_logits': np.zeros((2, 5, 10))}, 0)['teacher_logits'].shape
    (2, 10)
    """
    return {name: array[:, view] if is_recorded(name) else array for name, array in batch.items()}


def in_view(batch: Batch, views: Views, epoch: Any) -> Batch:
    """The batch with the predictions of the view that an epoch shows.

    Raises:
      ValueError: another number of views was recorded.
    """
    for name in filter(is_recorded, batch):
        if batch[name].shape[1:2] != (views.number,):
            raise ValueError(
                f'{name} {batch[name].shape} was not recorded with {views.number} views: give those of the recording'
            )
    return one_view(batch, epoch % views.number)


def augmented(
    inputs: jax.Array,
    indices: jax.Array,
    epoch: Any,
    *,
    augment: Augment | None = None,
    key: jax.Array | None = None,
    views: Views | None = None,
) -> jax.Array:
    """The inputs [batch, ...] as they look in an epoch: as they are, augmented under the run's key, or in one of the views.

    Args:
      inputs: a batch of inputs.
      indices: their indices in the data, [batch]; each has a key of its own.
      epoch: number of the epoch.
      augment: if every epoch is to be different.
      key: the run's key for that.
      views: if the epochs are to repeat.
    """
    if views is not None:
        augment, key, epoch = views.augment, views.key, epoch % views.number
    if augment is None:
        return inputs
    if key is None:
        raise ValueError('augmented: augment needs a key')
    key = jax.random.fold_in(key, epoch)
    keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(indices)
    return jax.vmap(augment)(keys, inputs)


def check_augmentation(augment: Augment | None, views: Views | None) -> None:
    """Raises if there are both, or views without number."""
    if augment is not None and views is not None:
        raise ValueError('give either augment or views, which have an augment of their own')
    if views is not None and views.number < 1:
        raise ValueError(f'the number of views must be at least 1, got {views.number}')


def describe_views(views: Views | None) -> dict[str, Any] | None:
    """What can be written down of views: their key and their number."""
    if views is None:
        return None
    key = [str(jax.random.key_impl(views.key)), *np.asarray(jax.random.key_data(views.key)).tolist()]
    return {'key': key, 'number': views.number}


def identify_views(description: dict[str, Any] | None) -> np.uint32:
    """A number for what `describe_views` gives, the same in every process; 0 for no views."""
    return np.uint32(0 if description is None else zlib.crc32(json.dumps(description).encode()) or 1)


def check_recorded(data: Any, augment: Augment | None, views: Views | None) -> None:
    """Raises unless the student will see what a recorded teacher has seen.

    Args:
      data: a dictionary of entries, or a `JoinedSource`; other sources are not looked into.
      augment: the augmentation of a run whose epochs are all different.
      views: the views of one whose epochs repeat.

    Raises:
      ValueError: the data hold predictions of inputs that look otherwise: as they are, or in other views.
    """
    entries = data if isinstance(data, dict) else getattr(data, 'arrays', {})
    recorded = [name for name in entries if is_recorded(name) or name == RECORDED_VIEWS]
    if recorded and augment is not None:
        raise ValueError(
            f'data has {recorded[0]}, recorded of inputs that augment would change: record with '
            'views=training.Views(augment, key, number), and give these views in place of augment'
        )
    if RECORDED_VIEWS not in entries:
        return
    found = np.asarray(entries[RECORDED_VIEWS])
    if views is None and found.any():
        raise ValueError('the teacher was recorded with views: give the same views=, so that the student sees what it has seen')
    if views is not None and not found.all():
        raise ValueError('the teacher was recorded without views: record it with views=, or train without them')
    if views is not None and (found != identify_views(describe_views(views))).any():
        raise ValueError('the teacher was recorded with other views: give those of the recording, of the same key and number')
