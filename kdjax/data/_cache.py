"""Decoded images on disk, so that they are decoded once, and need not fit in memory."""

import hashlib
import json
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from kdjax.batches import Batch
from kdjax.data._splits import Found, Images

_CHUNK = 512
_SHARE = 0.25
"""Of the free memory, what a data set may take."""


def decoded(
    found: Found,
    shared: Mapping[str, tuple[Images, np.ndarray]],
    *,
    name: str,
    image_size: tuple[int, int] | None,
    data_dir: str | None,
    stream: bool | None,
) -> dict[str, Batch]:
    """The images and labels of every split, in memory, or as memory maps of files that are written first.

    Args:
      found: the data set.
      shared: of every split where it is read, and the indices there.
      name: of the data set, for errors.
      image_size: height and width; those of the images if not given.
      data_dir: where the files are kept; see `folder_of`.
      stream: whether they are read from disk while training; None if they are where memory is short.

    Raises:
      ValueError: images are of several sizes, and none was given.
    """
    height, width, channels = _one_shape(shared, name, image_size)
    examples = sum(len(indices) for _, indices in shared.values())
    size, free = examples * height * width * channels, free_memory()
    if stream is None:
        stream = free is not None and size > _SHARE * free
        if stream:
            print(
                f'{name}: {size / 1e9:.1f} GB of images, {(free or 0) / 1e9:.1f} GB of memory free: they are read from disk '
                'while training',
                file=sys.stderr,
            )
    resized = image_size is not None and found.identity is not None
    if not stream and not resized:
        return {split: _in_memory(*each, (height, width, channels), image_size, name) for split, each in shared.items()}
    described = [found.identity if found.identity is not None else name, image_size, (height, width, channels)]
    described += [[split, indices.tolist()] for split, (_, indices) in shared.items()]
    digest = hashlib.sha256(json.dumps(described, default=str).encode()).hexdigest()[:16]
    folder = folder_of(data_dir) / digest
    # What cannot be told from other data of its name is written anew.
    if found.identity is None or not folder.exists():
        _write(folder, shared, (height, width, channels), image_size, name)
    mode = 'r' if stream else None
    return {
        split: {
            'inputs': np.load(folder / f'{split}.npy', mmap_mode=mode),
            'labels': np.ascontiguousarray(images.labels[indices]),
        }
        for split, (images, indices) in shared.items()
    }


def folder_of(data_dir: str | None) -> pathlib.Path:
    """Where decoded images are kept: in `data_dir`, or in the user's cache."""
    if data_dir is not None:
        return pathlib.Path(data_dir).expanduser() / 'kdjax'
    return pathlib.Path(os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache') / 'kdjax'


def free_memory() -> int | None:
    """Bytes that can be had without swapping; None where the system does not say."""
    try:
        lines = pathlib.Path('/proc/meminfo').read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith('MemAvailable:'))
    except (OSError, StopIteration, ValueError):
        return None


def _one_shape(
    shared: Mapping[str, tuple[Images, np.ndarray]], name: str, image_size: tuple[int, int] | None
) -> tuple[int, int, int]:
    shapes = sorted(set().union(*(images.shapes() for images, _ in shared.values())))
    channels = {shape[2] for shape in shapes}
    if len(channels) > 1:
        raise ValueError(f'{name}: the splits have {" and ".join(map(str, sorted(channels)))} channels')
    if image_size is not None:
        return *image_size, shapes[0][2]
    if len(shapes) > 1:
        least, most = (f'{height} x {width}' for height, width, _ in (shapes[0], shapes[-1]))
        side = min(min(shape[:2]) for shape in shapes)
        raise ValueError(
            f'{name} has images of {len(shapes)} sizes, from {least} to {most} (height x width): give the size that all are to '
            f'have, such as image_size={side}'
        )
    return shapes[0]


def _in_memory(
    images: Images, indices: np.ndarray, shape: tuple[int, int, int], size: tuple[int, int] | None, name: str
) -> Batch:
    inputs = np.empty((len(indices), *shape), np.uint8)
    _fill(inputs, images, indices, size, name)
    return {'inputs': inputs, 'labels': np.ascontiguousarray(images.labels[indices])}


def _write(
    folder: pathlib.Path,
    shared: Mapping[str, tuple[Images, np.ndarray]],
    shape: tuple[int, int, int],
    size: tuple[int, int] | None,
    name: str,
) -> None:
    """Writes the splits as a folder that is there whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='.partial-', dir=folder.parent) as workspace:
        whole = pathlib.Path(workspace) / 'whole'
        whole.mkdir()
        for split, (images, indices) in shared.items():
            inputs = np.lib.format.open_memmap(whole / f'{split}.npy', 'w+', np.uint8, (len(indices), *shape))
            _fill(inputs, images, indices, size, name)
            inputs.flush()
        shutil.rmtree(folder, ignore_errors=True)
        whole.replace(folder)


def _fill(inputs: Any, images: Images, indices: np.ndarray, size: tuple[int, int] | None, name: str) -> None:
    chunks = range(0, len(indices), _CHUNK)
    # A bar for what takes long, and none in a pipe.
    for start in tqdm(chunks, desc=f'reading {name}', leave=False, disable=None, delay=2):
        chosen = indices[start : start + _CHUNK]
        inputs[start : start + len(chosen)] = images.read(chosen, size)
