"""Folders of images by class, and tables that name image files."""

import csv
import functools
import itertools
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from kdjax.data._pixels import SUFFIXES, as_labels, decode, in_threads, shape
from kdjax.data._splits import Found, Images
from kdjax.dependencies import needed_for

SPLIT_NAMES = {
    'train': 'train', 'training': 'train',
    'val': 'validation', 'valid': 'validation', 'validation': 'validation', 'dev': 'validation',
    'test': 'test', 'testing': 'test',
}  # fmt: skip
_PATHS = ('path', 'file', 'filename', 'file_name', 'image', 'image_path')
_LABELS = ('label', 'class', 'target', 'category', 'class_name')


def read_folder(folder: pathlib.Path) -> Found:
    """Finds the images of a folder with a folder for every class, or with such folders for `train`, `val` and `test`.

    Classes are the names of their folders; what lies deeper belongs to them too. Hidden files, and files of other kinds, are
    left out.

    Raises:
      ValueError: there are no classes, or only one, or two whose names differ in case alone, or no image.
    """
    inner = {SPLIT_NAMES.get(each.name.lower()): each for each in _folders(folder)}
    splits = {split: each for split, each in inner.items() if split is not None}
    if 'train' not in splits:
        splits = {'train': folder}
    listed = {split: _by_class(each) for split, each in splits.items()}
    names = sorted({name for classes in listed.values() for name in classes})
    if len(names) < 2:
        raise ValueError(
            f'{folder} must hold a folder of images for each of at least two classes, or folders train, val and test that do; '
            f'it holds images of {", ".join(names) or "none"}'
        )
    folded = sorted(names, key=str.casefold)
    same = next((one for one, other in itertools.pairwise(folded) if one.casefold() == other.casefold()), None)
    if same is not None:
        raise ValueError(f'{folder} holds two classes that differ in case alone, such as {same}: rename or join them')
    empty = [split for split, classes in listed.items() if not any(classes.values())]
    if empty:
        raise ValueError(f'{splits[empty[0]]} holds no image ({", ".join(SUFFIXES[:3])}, ...)')
    bare = [name for name in names if not any(classes.get(name) for classes in listed.values())]
    if bare:
        raise ValueError(f'{folder} holds no image of the class {bare[0]}: remove its folder, or put images there')
    files = {split: [file for name in names for file in classes.get(name, [])] for split, classes in listed.items()}
    labels = {
        split: np.repeat(np.arange(len(names), dtype=np.int32), [len(classes.get(name, [])) for name in names])
        for split, classes in listed.items()
    }
    return of_files(folder, files, labels, tuple(names))


def read_table(file: pathlib.Path) -> Found:
    """Finds the images that a CSV or Parquet table names, by their columns of paths and labels, and perhaps of splits.

    Paths are relative to the table. The columns are found by their usual names: path, file, filename or image; label, class,
    target or category; split.

    Raises:
      ValueError: a column is missing, a split has another name than train, val or test, or a file is not there.
    """
    columns = _columns(file)
    found = {name.strip().lower(): values for name, values in columns.items()}
    paths, labels = (next((found[name] for name in names if name in found), None) for names in (_PATHS, _LABELS))
    if paths is None or labels is None:
        wanted = ', '.join(_PATHS if paths is None else _LABELS)
        raise ValueError(f'{file} needs a column called one of {wanted}; it has {", ".join(columns) or "none"}')
    numbers, names = as_labels(_parsed(labels), where=str(file))
    of_split = [str(each).lower() for each in found.get('split', ['train'] * len(paths))]
    unknown = sorted({*of_split} - {*SPLIT_NAMES})
    if unknown:
        raise ValueError(f'{file}: a split is train, val or test, got {unknown[0]!r}')
    files: dict[str, list[pathlib.Path]] = {}
    chosen: dict[str, list[int]] = {}
    for path, number, split in zip(paths, numbers, of_split, strict=True):
        files.setdefault(SPLIT_NAMES[split], []).append(file.parent / str(path))
        chosen.setdefault(SPLIT_NAMES[split], []).append(number)
    missing = [each for listed in files.values() for each in listed if not each.is_file()]
    if missing:
        more = f' and {len(missing) - 1} more' if len(missing) > 1 else ''
        raise ValueError(f'{file} names {missing[0]}{more}, which is not there; paths are relative to the table')
    if 'train' not in files:
        raise ValueError(f'{file} has no row of the split train')
    return of_files(file, files, {split: np.array(each, np.int32) for split, each in chosen.items()}, names)


def of_files(
    where: pathlib.Path,
    files: Mapping[str, Sequence[pathlib.Path]],
    labels: Mapping[str, np.ndarray],
    class_names: tuple[str, ...],
) -> Found:
    """The data set of these image files."""
    everything = [file for listed in files.values() for file in listed]
    shapes = dict(zip(everything, in_threads(shape, everything, where=str(where)), strict=True))
    channels = max(channels for *_, channels in shapes.values())

    def images(split: str) -> Images:
        def read(indices: np.ndarray, size: tuple[int, int] | None = None) -> list[np.ndarray]:
            one = functools.partial(decode, channels=channels, size=size)
            return in_threads(one, [files[split][i] for i in indices], where=str(where))

        return Images(labels[split], read, lambda: {(*shapes[file][:2], channels) for file in files[split]})

    stats = [(os.path.relpath(file, where.parent), file.stat().st_size, file.stat().st_mtime_ns) for file in everything]
    return Found(class_names, {split: images(split) for split in files}, (str(where.absolute()), stats))


def _folders(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(each for each in folder.iterdir() if each.is_dir() and not each.name.startswith('.'))


def _by_class(folder: pathlib.Path) -> dict[str, list[pathlib.Path]]:
    """The images of every class, in an order that no file system changes."""
    return {
        each.name: sorted(
            file
            for file in each.rglob('*')
            if file.suffix.lower() in SUFFIXES and not file.name.startswith('.') and file.is_file()
        )
        for each in _folders(folder)
    }


def _columns(file: pathlib.Path) -> dict[str, list]:
    if file.suffix.lower() == '.parquet':
        with needed_for('reading Parquet'):
            import pyarrow.parquet

        return pyarrow.parquet.read_table(file).to_pydict()
    with file.open(newline='', encoding='utf-8-sig') as lines:
        rows = list(csv.DictReader(lines))
    if any(None in row or None in row.values() for row in rows):
        raise ValueError(f'{file} has rows of more or fewer cells than it has columns')
    return {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}


def _parsed(labels: Sequence) -> Sequence:
    """What CSV has as text as integers, if all of it is."""
    try:
        return [int(label) for label in labels]
    except (TypeError, ValueError):
        return labels
