"""Data sets with splits that do not change between runs, of all the kinds that people have."""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from kdjax.batches import Batch, take_examples
from kdjax.data._arrays import read_arrays
from kdjax.data._cache import decoded
from kdjax.data._digits import read_digits
from kdjax.data._folders import read_folder, read_table
from kdjax.data._huggingface import PREFIX, is_saved, read_huggingface
from kdjax.data._pixels import as_labels
from kdjax.data._rows import Rows
from kdjax.data._splits import Found, Images, share_out
from kdjax.dependencies import needed_for


class Dataset(NamedTuple):
    """Three splits, each {'inputs': uint8 [examples, height, width, channels], 'labels': int32 [examples]}.

    Attributes:
      name: what it is called.
      classes: number of classes.
      train: for training.
      validation: for choosing: recipes, epochs, weights.
      test: for the one final measurement.
      class_names: of all classes, by label; empty where nobody has named them.
    """

    name: str
    classes: int
    train: Batch
    validation: Batch
    test: Batch
    class_names: tuple[str, ...] = ()


def load(
    name: str | pathlib.Path,
    *,
    data_dir: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    validation: float = 0.1,
    test: float = 0.2,
    seed: int = 0,
    stream: bool | None = None,
) -> Dataset:
    """Loads an image classification data set: one's own files, or one by its name.

    Args:
      name: one of
        - the path of a folder of images, with a folder for each class (`photos/cat/1.jpg`), perhaps below `train`, `val` and
          `test`;
        - the path of a CSV or Parquet file with a column of paths and one of labels, and perhaps one called `split`;
        - the path of an `.npz` file, or of a folder of `.npy` files: `x_train`, `y_train`, `x_test`, `y_test`, or `inputs` and
          `labels`;
        - the path of a folder that `save_to_disk` of Hugging Face's `datasets` wrote, or `'huggingface:name'`;
        - `'digits'`, which comes with scikit-learn;
        - a name of TensorFlow Datasets such as `'mnist'`, `'cifar10'` or `'cifar100:3.0.2'`. They are read without TensorFlow;
          one that is not prepared yet is downloaded and prepared first, which needs TensorFlow once.
        What begins with a dot, `~` or `/`, ends in one of these suffixes, or exists, is a path.
      data_dir: where TFDS keeps its data sets, by default $TFDS_DATA_DIR or TFDS's own default, and where decoded images are
        kept, by default in the user's cache.
      image_size: height and width that all images are to have, one number for both; images are scaled until they cover it, and
        cropped in the middle. Files are decoded and resized once, and kept.
      validation: share of the training split that is held out, where there is no validation split.
      test: share that is held out before, where there is no test split.
      seed: of the draws, which have every class in proportion, except for splits of TFDS; the same seed gives the same splits.
      stream: whether inputs stay on disk, as memory maps of decoded images, which `training.fit` reads while it trains. By
        default they do where they would take more than a quarter of the memory that is free, which is then said on stderr.

    Returns:
      The data set. Images have three channels if any of them has colour, and else one.

    Raises:
      ValueError: there is no such data set, it can be neither read nor prepared, files cannot be decoded, sizes differ and none
        was given, or a split is empty; the message says what to do.
      ModuleNotFoundError: a package that reads it is not installed; the message names it.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f'image_size must be a positive number, or height and width, got {image_size}')
    found = _find(name, data_dir)
    called = name if isinstance(name, str) and not _is_path(name) else pathlib.Path(name).expanduser().resolve().stem
    shared = share_out(found, name=called, validation=validation, test=test, seed=seed)
    splits = decoded(found, shared, name=called, image_size=size, data_dir=data_dir, stream=stream)
    return Dataset(called, len(found.class_names), **splits, class_names=found.class_names)


def from_arrays(
    inputs: Any,
    labels: Any,
    *,
    validation: float = 0.1,
    test: float | tuple[Any, Any] = 0.2,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
    name: str = 'arrays',
) -> Dataset:
    """Makes a data set of arrays, whatever their inputs are, with splits that are drawn as those of `load`.

    Args:
      inputs: arrays [examples, ...], any pytree; they stay what they are.
      labels: integers or names [examples]. Names are sorted; integers that do not count up from 0 are numbered.
      validation: share of the training split that is held out.
      test: inputs and labels of a test split, or the share that is held out before.
      seed: of the draws.
      class_names: by label.
      name: of the data set.

    Raises:
      ValueError: inputs and labels do not fit each other, there is one class only, or a split is empty.

    >>> dataset = from_arrays(np.zeros((20, 8, 8, 1), np.uint8), ['cat', 'dog'] * 10)
    >>> dataset.class_names, [len(split['labels']) for split in (dataset.train, dataset.validation, dataset.test)]
    (('cat', 'dog'), [14, 2, 4])
    """
    parts = {'train': (inputs, labels)} | ({'test': test} if isinstance(test, tuple) else {})
    for split, (own, these) in parts.items():
        sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(own)}
        if sizes != {np.shape(these)[:1]}:
            raise ValueError(f'{name}: the {split} inputs have {sorted(sizes)} examples, and its labels {np.shape(these)}')
    joined = np.concatenate([np.asarray(these) for _, these in parts.values()])
    numbers, names = as_labels(joined, where=name, class_names=class_names)
    each = np.split(numbers, np.cumsum([len(these) for _, these in parts.values()])[:-1])
    # To share examples out takes labels alone.
    images = {split: Images(own, lambda indices, size: [], set) for split, own in zip(parts, each, strict=True)}
    share = 0.5 if isinstance(test, tuple) else test
    shared = share_out(Found(names, images), name=name, validation=validation, test=share, seed=seed)
    whole = {split: {'inputs': own, 'labels': numbers} for (split, (own, _)), numbers in zip(parts.items(), each, strict=True)}
    splits = {split: take_examples(whole.get(split, whole['train']), indices) for split, (_, indices) in shared.items()}
    return Dataset(name, len(names), **splits, class_names=names)


def _is_path(name: str) -> bool:
    if name.startswith(PREFIX):
        return False
    path = pathlib.Path(name)
    return name.startswith(('.', '~', '/')) or path.suffix.lower() in _READERS or (name != 'digits' and path.exists())


def _find(name: str | pathlib.Path, data_dir: str | None) -> Found:
    """Reads what and how much there is, by what kind of thing the name is."""
    if isinstance(name, str) and not _is_path(name):
        if name == 'digits':
            return read_digits()
        if name.startswith(PREFIX):
            return read_huggingface(name)
        with needed_for(name):
            from kdjax.data._tfds import read_tfds  # tensorflow-datasets and grain take long to import

        return read_tfds(name, data_dir)
    path = pathlib.Path(name).expanduser()
    if not path.exists():
        raise ValueError(f'there is no file or folder {path}')
    if path.is_file():
        if path.suffix.lower() not in _READERS:
            raise ValueError(f'{path} is no data set: give a folder, or a file that ends in {", ".join(_READERS)}')
        return _READERS[path.suffix.lower()](path)
    if is_saved(path):
        return read_huggingface(path)
    return read_arrays(path) if any(path.glob('*.npy')) else read_folder(path)


_READERS = {'.npz': read_arrays, '.csv': read_table, '.parquet': read_table}


def take(data: Batch, indices: np.ndarray) -> Batch:
    """The examples of a split with these indices; of memory maps they stay on disk.

    >>> take({'labels': np.array([5, 6, 7])}, np.array([2, 0]))
    {'labels': array([7, 5])}
    """
    return {key: _rows(array, indices) for key, array in data.items()}


def _rows(array: Any, indices: np.ndarray) -> Any:
    if isinstance(array, Rows):
        return array.take(indices)
    return Rows(array, indices) if isinstance(array, np.memmap) else array[indices]


def hide_labels(data: Batch, *, keep: int, seed: int = 0) -> Batch:
    """Keeps the labels of some examples, as many of each class as can be, and sets those of the others to -1.

    Args:
      data: a split.
      keep: number of labels to keep.
      seed: of the choice.

    Raises:
      ValueError: there are fewer labels than are to be kept, or none is.

    >>> data = hide_labels({'labels': np.array([0, 0, 1, 1])}, keep=2)
    >>> print(np.sort(data['labels']))
    [-1 -1  0  1]
    """
    labels = np.asarray(data['labels'])
    labelled = np.flatnonzero(labels >= 0)
    if not 1 <= keep <= len(labelled):
        raise ValueError(f'hide_labels: keep must be between 1 and {len(labelled)}, the number of labels, got {keep}')
    order = np.random.default_rng(seed).permutation(labelled)
    # Sorting by the rank within its class, then by chance, takes one of each class before the second of any.
    rank = np.empty(len(labels), int)
    for label in np.unique(labels[labelled]):
        members = order[labels[order] == label]
        rank[members] = np.arange(len(members))
    chosen = order[np.argsort(rank[order], kind='stable')][:keep]
    hidden = np.full_like(labels, -1)
    hidden[chosen] = labels[chosen]
    return {**data, 'labels': hidden}


def repeat_labelled(data: Batch) -> Batch:
    """Only the examples that have a label, repeated to the number of all: a baseline that takes as many steps.

    >>> repeat_labelled({'labels': np.array([-1, 7, -1, 8, -1])})
    {'labels': array([7, 8, 7, 8, 7])}
    """
    labels = np.asarray(data['labels'])
    return take(data, np.resize(np.flatnonzero(labels >= 0), len(labels)))
