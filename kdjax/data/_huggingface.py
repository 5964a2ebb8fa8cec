"""Data sets of Hugging Face, from disk or by name, through their own library."""

import pathlib
from typing import Any

import numpy as np

from kdjax.data._folders import SPLIT_NAMES
from kdjax.data._pixels import as_labels, decode, in_threads, shape
from kdjax.data._splits import Found, Images
from kdjax.dependencies import needed_for
from kdjax.errors import first_line

PREFIX = 'huggingface:'


def is_saved(folder: pathlib.Path) -> bool:
    """Whether `save_to_disk` wrote the folder."""
    return (folder / 'dataset_dict.json').exists() or (folder / 'state.json').exists()


def read_huggingface(name: str | pathlib.Path) -> Found:
    """Reads a data set that `save_to_disk` wrote, or one of the hub, by its first column of images and its classes.

    Raises:
      ValueError: it cannot be read, or has no column of images, or none of classes.
      ModuleNotFoundError: the library `datasets` is not installed.
    """
    with needed_for('a data set of Hugging Face'):
        import datasets

    try:
        if isinstance(name, pathlib.Path):
            loaded = datasets.load_from_disk(str(name))
        else:
            loaded = datasets.load_dataset(name.removeprefix(PREFIX))
    except Exception as error:  # whatever the network, the files or the data set's own description raise
        raise ValueError(f'{name} cannot be read as a data set of Hugging Face: {first_line(error)}') from error
    parts = loaded if isinstance(loaded, dict) else {'train': loaded}
    splits = {SPLIT_NAMES[str(key)]: part for key, part in parts.items() if str(key) in SPLIT_NAMES}
    if 'train' not in splits:
        raise ValueError(f'{name} needs a split called train; it has {", ".join(map(str, parts))}')
    features = splits['train'].features
    image = next((key for key, kind in features.items() if isinstance(kind, datasets.Image)), None)
    label = next((key for key, kind in features.items() if isinstance(kind, datasets.ClassLabel)), None)
    label = label or next((key for key in ('label', 'labels', 'class', 'target') if key in features), None)
    if image is None or label is None:
        told = ', '.join(f'{key}: {type(kind).__name__}' for key, kind in features.items())
        raise ValueError(f'{name} needs a column of images and one of classes; it has {told}')
    given = tuple(features[label].names) if isinstance(features[label], datasets.ClassLabel) else None
    joined = [value for part in splits.values() for value in part[label]]
    numbers, names = as_labels(joined, where=str(name), class_names=given)
    each = np.split(numbers, np.cumsum([len(part) for part in splits.values()])[:-1])
    found = {split: _images(part, image, own, str(name)) for (split, part), own in zip(splits.items(), each, strict=True)}
    # One number of channels for all: where one image has colour, all have.
    channels = max(channels for images in found.values() for *_, channels in images.shapes())
    found = {split: images._replace(read=_reader(splits[split], image, channels, str(name))) for split, images in found.items()}
    shapes = {split: {(*each[:2], channels) for each in images.shapes()} for split, images in found.items()}
    found = {split: images._replace(shapes=lambda own=shapes[split]: own) for split, images in found.items()}
    prints = [getattr(part, '_fingerprint', None) for part in splits.values()]
    return Found(names, found, (str(name), prints) if all(prints) else None)


def _images(part: Any, column: str, labels: np.ndarray, where: str) -> Images:
    shapes = set(in_threads(lambda i: shape(part[i][column]), range(len(part)), where=where))
    return Images(labels, _reader(part, column, 3, where), lambda: shapes)


def _reader(part: Any, column: str, channels: int, where: str) -> Any:
    def read(indices: np.ndarray, size: tuple[int, int] | None) -> list[np.ndarray]:
        return in_threads(lambda i: decode(part[int(i)][column], channels=channels, size=size), indices.tolist(), where=where)

    return read
