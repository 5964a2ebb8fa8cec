"""TensorFlow Datasets, read through grain and without TensorFlow."""

import difflib
import importlib.util
import pathlib
from typing import Any

import array_record  # noqa: F401  # this and Pillow are imported by tfds, but only in the threads that read
import grain
import numpy as np
import PIL  # noqa: F401
import tensorflow_datasets as tfds
from tensorflow_datasets.core import constants

from kdjax.batches import Batch
from kdjax.errors import first_line

_CHUNK = 1024


def read_tfds(name: str, data_dir: str | None) -> tuple[Batch, Batch, int]:
    """Reads the training and the test split of an image classification data set, and its number of classes.

    Raises:
      ValueError: TFDS knows no such data set, it cannot be prepared or read, or it is not one of images of one size with
        labels.
    """
    builder = _prepared_builder(name, data_dir)
    keys = builder.info.supervised_keys
    if keys is None or len(keys) != 2 or not isinstance(builder.info.features[keys[1]], tfds.features.ClassLabel):
        raise ValueError(f'{name} is not a classification data set: its supervised keys are {keys}')
    images = builder.info.features[keys[0]]
    if images.np_dtype != np.uint8 or len(images.shape) != 3:
        kind = np.dtype(images.np_dtype)
        raise ValueError(f'{name} is not a data set of uint8 images: its {keys[0]} is {kind} {images.shape}')
    test = next((split for split in ('test', 'validation') if split in builder.info.splits), None)
    if 'train' not in builder.info.splits or test is None:
        raise ValueError(f'{name} needs a train and a test split; it has {", ".join(builder.info.splits)}')
    splits = [_read_split(builder, split, *keys) for split in ('train', test)]
    return splits[0], splits[1], builder.info.features[keys[1]].num_classes


def _prepared_builder(name: str, data_dir: str | None) -> Any:
    base = name.split(':')[0].split('/')[0]
    folder = pathlib.Path(data_dir or constants.DATA_DIR).expanduser() / base
    # Asked of a name that it does not know, tfds.builder looks in the web, and fails for want of TensorFlow.
    known = tfds.list_builders(with_community_datasets=False)
    if base not in known and not folder.exists():
        close = difflib.get_close_matches(base, ['digits', *known])
        hint = f'; did you mean {" or ".join(close)}?' if close else ''
        raise ValueError(f'there is no data set {name!r}, neither embedded nor in TFDS{hint}')
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format='array_record')
    except Exception as error:  # no such version or config, or code that imports TensorFlow
        raise ValueError(f'TFDS cannot make {name}: {first_line(error)}') from error
    if builder.is_prepared():
        return builder
    where = f'{name} is not prepared in {builder.data_dir}'
    place = '' if data_dir is None else f', data_dir={data_dir!r}'
    by_hand = f"tfds.builder('{name}'{place}, file_format='array_record').download_and_prepare()"
    if importlib.util.find_spec('tensorflow') is None:
        raise ValueError(
            f'{where}, and preparing it needs TensorFlow once: pip install tensorflow and run this again, '
            f'or run {by_hand} where it is installed and copy the folder'
        )
    try:
        builder.download_and_prepare(file_format='array_record')
    except Exception as error:  # whatever the network, the disk or the data set's own code raise
        raise ValueError(
            f'{where} and could not be downloaded ({first_line(error)}); '
            f'run {by_hand} where there is a network and copy the folder'
        ) from error
    return builder


def _read_split(builder: Any, split: str, image: str, label: str) -> Batch:
    try:
        source = builder.as_data_source(split=split)
    except NotImplementedError as error:
        raise ValueError(f'{builder.name} in {builder.data_dir} is not in ArrayRecord format: {error}') from error
    # Reading in chunks is ten times faster than one by one, and grain reads them ahead in threads.
    chunks = grain.MapDataset.range(-(-len(source) // _CHUNK)).map(
        lambda i: source.__getitems__(list(range(i * _CHUNK, min((i + 1) * _CHUNK, len(source)))))
    )
    examples = [example for chunk in chunks.to_iter_dataset(grain.ReadOptions(num_threads=4)) for example in chunk]
    shapes = {example[image].shape for example in examples}
    if len(shapes) > 1:
        raise ValueError(f'{builder.name} has images of {len(shapes)} sizes, and only images of one size are supported')
    shape = (0, 1, 1, 1) if not examples else (-1, *shapes.pop())
    return {
        'inputs': np.array([example[image] for example in examples], np.uint8).reshape(shape),
        'labels': np.array([example[label] for example in examples], np.int32),
    }
