"""Data sets that fit in memory, with splits that do not change between runs."""

from typing import NamedTuple

import numpy as np

from kdjax.batches import Batch
from kdjax.data._digits import read_digits
from kdjax.dependencies import needed_for


class Dataset(NamedTuple):
    """Three splits, each {'inputs': uint8 [examples, height, width, channels], 'labels': int32 [examples]}.

    Attributes:
      name: what it is called.
      classes: number of classes.
      train: for training.
      validation: for choosing: recipes, epochs, weights.
      test: for the one final measurement.
    """

    name: str
    classes: int
    train: Batch
    validation: Batch
    test: Batch


def load(name: str, *, data_dir: str | None = None, validation: float = 0.1, seed: int = 0) -> Dataset:
    """Loads an image classification data set into memory.

    Args:
      name: `'digits'`, which comes with scikit-learn, or a name of TensorFlow Datasets such as `'mnist'`,
        `'fashion_mnist'`, `'cifar10'` or `'cifar100:3.0.2'`. The latter are read without TensorFlow; one that is not
        prepared yet is downloaded and prepared first, which needs TensorFlow once.
      data_dir: where TFDS keeps its data sets; by default $TFDS_DATA_DIR or TFDS's own default.
      validation: share of the official training split that is held out, drawn with `seed`.
      seed: of the draw; the same seed gives the same splits.

    Returns:
      The data set.

    Raises:
      ValueError: there is no such data set, it can be neither read nor prepared (the message says what to do), or a split
        is empty.
      ModuleNotFoundError: a package that reads it is not installed; the message names it.
    """
    if not 0 < validation < 1:
        raise ValueError(f'validation must be a share between 0 and 1, got {validation}')
    if name == 'digits':
        train, test = read_digits()
        classes = 10
    else:
        with needed_for(name):
            from kdjax.data._tfds import read_tfds  # tensorflow-datasets and grain take long to import

        train, test, classes = read_tfds(name, data_dir)
    examples = len(train['labels'])
    held_out = round(validation * examples)
    for split, size in (('train', examples - held_out), ('validation', held_out), ('test', len(test['labels']))):
        if not size:
            raise ValueError(
                f'{name}: the {split} split is empty, with {examples} training examples and validation={validation}'
            )
    order = np.random.default_rng(seed).permutation(examples)
    return Dataset(
        name=name,
        classes=classes,
        train=take(train, np.sort(order[held_out:])),
        validation=take(train, np.sort(order[:held_out])),
        test=test,
    )


def take(data: Batch, indices: np.ndarray) -> Batch:
    """The examples of a split with these indices.

    >>> take({'labels': np.array([5, 6, 7])}, np.array([2, 0]))
    {'labels': array([7, 5])}
    """
    return {key: array[indices] for key, array in data.items()}


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
