"""TensorFlow Datasets, read through grain and without TensorFlow."""

import difflib
import importlib.util
import pathlib
import sys
from typing import Any

import array_record  # noqa: F401  # this and Pillow are imported by tfds, but only in the threads that read
import grain
import numpy as np
import PIL  # noqa: F401
import tensorflow_datasets as tfds
from tensorflow_datasets.core import constants

from kdjax.data._cache import free_memory
from kdjax.data._pixels import as_pixels, resize
from kdjax.data._splits import Found, Images
from kdjax.errors import first_line

_CHUNK = 1024
_AT_ONCE = 0.25
"""Of the free memory, what one split may take."""


def read_tfds(name: str, data_dir: str | None) -> Found:
    """Finds the images and classes of a data set of TensorFlow Datasets.

    Its splits `train`, `validation` and `test` are taken; where there is one of the latter two, it is the test split.

    Raises:
      ValueError: TFDS knows no such data set, it cannot be prepared or read, or it is not one of images with labels.
    """
    builder = _prepared_builder(name, data_dir)
    keys = builder.info.supervised_keys
    if keys is None or len(keys) != 2 or not isinstance(builder.info.features[keys[1]], tfds.features.ClassLabel):
        raise ValueError(f'{name} is not a classification data set: its supervised keys are {keys}')
    feature = builder.info.features[keys[0]]
    if len(feature.shape) != 3 or feature.np_dtype not in (np.uint8, np.uint16, np.float32, np.bool_):
        kind = np.dtype(feature.np_dtype)
        raise ValueError(f'{name} is not a data set of images: its {keys[0]} is {kind} {feature.shape}')
    there = [split for split in builder.info.splits if builder.info.splits[split].num_examples]
    test = next((split for split in ('test', 'validation') if split in there), None)
    if 'train' not in there:
        raise ValueError(f'{name} needs a split called train; it has {", ".join(there) or "none with examples"}')
    splits = {'train': 'train'} | ({} if test is None else {'test': test})
    if test is None:
        print(f'{name} has no test split: one is drawn from its training split', file=sys.stderr)
    images = {split: _images(builder, official, *keys) for split, official in splits.items()}
    # As they have always been drawn here, so that results stay what they were.
    return Found(tuple(builder.info.features[keys[1]].names), images, stratified=False)


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


def _images(builder: Any, split: str, image: str, label: str) -> Images:
    """A split whose images are read at once where their number and size are no reason against it, and piece by piece else."""
    feature, number = builder.info.features[image], builder.info.splits[split].num_examples
    static = None not in feature.shape
    size = number * int(np.prod(feature.shape)) if static else builder.info.splits[split].num_bytes
    free = free_memory()
    if free is None or size < _AT_ONCE * free:
        examples = [example for chunk in _chunks(_source(builder, split)) for example in chunk]
        labels = np.array([example[label] for example in examples], np.int32)
        pixels = _pixels([example[image] for example in examples], builder.name)
        at_hand = lambda indices, size: _sized([pixels[i] for i in indices], size)  # noqa: E731
        return Images(labels, at_hand, lambda: {x.shape for x in pixels})
    undecoded = _source(builder, split, decoders={image: tfds.decode.SkipDecoding()})
    labels = np.array([example[label] for chunk in _chunks(undecoded) for example in chunk], np.int32)
    source = _source(builder, split)

    def read(indices: np.ndarray, size: tuple[int, int] | None) -> list[np.ndarray]:
        found = source.__getitems__([int(i) for i in indices])
        return _sized(_pixels([example[image] for example in found], builder.name), size)

    def shapes() -> set[tuple[int, int, int]]:
        if static:
            return {tuple(feature.shape)}
        return {
            x.shape for start in range(0, number, _CHUNK) for x in read(np.arange(start, min(number, start + _CHUNK)), None)
        }

    return Images(labels, read, shapes)


def _pixels(images: list[np.ndarray], name: str) -> list[np.ndarray]:
    return [image if image.dtype == np.uint8 else as_pixels(image[None], where=name)[0] for image in images]


def _sized(images: list[np.ndarray], size: tuple[int, int] | None) -> list[np.ndarray]:
    if size is None:
        return images
    return [resize(image, size) for image in images]


def _source(builder: Any, split: str, **options: Any) -> Any:
    try:
        return builder.as_data_source(split=split, **options)
    except NotImplementedError as error:
        raise ValueError(f'{builder.name} in {builder.data_dir} is not in ArrayRecord format: {error}') from error


def _chunks(source: Any) -> Any:
    # Reading in chunks is ten times faster than one by one, and grain reads them ahead in threads.
    chunks = grain.MapDataset.range(-(-len(source) // _CHUNK)).map(
        lambda i: source.__getitems__(list(range(i * _CHUNK, min((i + 1) * _CHUNK, len(source)))))
    )
    return chunks.to_iter_dataset(grain.ReadOptions(num_threads=4))
