"""Files of arrays."""

import pathlib
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kdjax.data._pixels import as_labels, as_pixels, resize
from kdjax.data._splits import Found, Images
from kdjax.errors import first_line

_INPUTS = ('inputs', 'images', 'x', 'X', 'data')
_LABELS = ('labels', 'y', 'Y', 'targets', 'label')
_SUFFIXES = {'train': ('', '_train'), 'validation': ('_val', '_valid', '_validation'), 'test': ('_test',)}


def read_arrays(path: pathlib.Path) -> Found:
    """Reads images and labels of an `.npz` file, or of a folder of `.npy` files.

    Arrays are found by their usual names: `inputs` and `labels`, `images` and `labels`, `x` and `y`, all of them with `_train`,
    `_val` and `_test` at the end (or `train_images` and the like) where there are several splits, and `class_names`.

    Raises:
      ValueError: there are no such arrays, they do not fit each other, or they are pickled objects.
    """
    arrays = _load(path)
    splits: dict[str, tuple[np.ndarray, Any]] = {}
    for split in _SUFFIXES:
        spelled = [_spelled(names, split) for names in (_INPUTS, _LABELS)]
        found = [next((arrays[name] for name in names if name in arrays), None) for names in spelled]
        inputs, labels = found
        if inputs is None and labels is None:
            continue
        if inputs is None or labels is None:
            missing = ', '.join(spelled[0] if inputs is None else spelled[1])
            raise ValueError(f'{path} lacks an array called one of {missing}; it has {", ".join(sorted(arrays))}')
        splits[split] = inputs, labels
    if 'train' not in splits:
        raise ValueError(
            f"{path} must hold 'inputs' and 'labels', or 'x_train', 'y_train', 'x_test' and 'y_test'; it has "
            f'{", ".join(sorted(arrays)) or "nothing"}'
        )
    for split, (inputs, labels) in splits.items():
        if len(inputs) != len(labels):
            raise ValueError(f'{path}: there are {len(inputs)} images and {len(labels)} labels in the {split} split')
    names = arrays.get('class_names')
    names = None if names is None else tuple(str(name) for name in names)
    joined = np.concatenate([np.asarray(labels).reshape(len(labels), -1) for _, labels in splits.values()])
    numbers, names = as_labels(joined, where=str(path), class_names=names)
    each = np.split(numbers, np.cumsum([len(labels) for _, labels in splits.values()])[:-1])
    images = {split: as_pixels(inputs, where=str(path)) for split, (inputs, _) in splits.items()}
    return Found(names, {split: of_arrays(images[split], own) for split, own in zip(splits, each, strict=True)})


def of_arrays(images: np.ndarray, labels: np.ndarray) -> Images:
    """Images that are in memory."""

    def read(indices: np.ndarray, size: tuple[int, int] | None) -> Sequence[np.ndarray] | np.ndarray:
        if size is None or images.shape[1:3] == size:
            return images[indices]
        return [resize(images[i], size) for i in indices]

    return Images(labels, read, lambda: {(int(images.shape[1]), int(images.shape[2]), int(images.shape[3]))})


def _spelled(names: Sequence[str], split: str) -> list[str]:
    ends = [f'{name}{end}' for end in _SUFFIXES[split] for name in names]
    return ends + [f'{end[1:]}_{name}' for end in _SUFFIXES[split] if end for name in names]


def _load(path: pathlib.Path) -> Mapping[str, np.ndarray]:
    files = sorted(path.glob('*.npy')) if path.is_dir() else [path]
    arrays: dict[str, np.ndarray] = {}
    for file in files:
        try:
            # numpy leaves a file that it opens itself open where it is torn.
            with file.open('rb') as opened:
                content = np.load(opened, allow_pickle=False)
                arrays |= dict(content) if isinstance(content, np.lib.npyio.NpzFile) else {file.stem: content}
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f'{file} cannot be read as numpy arrays: {first_line(error)}') from error
    return arrays
