"""Images of all kinds as uint8 pixels of one size, read with Pillow."""

import os
import pathlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from kdjax.dependencies import needed_for
from kdjax.errors import first_line

SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.gif', '.webp', '.tif', '.tiff', '.ppm', '.pgm')
_GRAY = ('1', 'L', 'LA', 'La', 'I;16', 'I;16L', 'I;16B', 'I')
_THREADS = min(16, 2 * (os.cpu_count() or 1))


def decode(file: Any, *, channels: int, size: tuple[int, int] | None = None) -> np.ndarray:
    """Reads an image.

    It is turned as its EXIF data say, transparent pixels lie on white, and 16 bits become 8. An image that is resized is scaled
    until it covers the size, with antialiasing, and the middle of it is kept, so that nothing is stretched.

    Args:
      file: a path, an open file, or an image of Pillow.
      channels: 1 for gray, 3 for colour.
      size: height and width; its own if not given.

    Returns:
      uint8 [height, width, channels].
    """
    from PIL import Image, ImageOps

    with Image.open(file) if not isinstance(file, Image.Image) else file.copy() as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith('I'):
            # Such images have 16 bits, whatever Pillow holds them in.
            image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
        if image.mode in ('RGBA', 'LA', 'PA') or 'transparency' in image.info:
            white = Image.new('RGBA', image.size, 'white')
            image = Image.alpha_composite(white, image.convert('RGBA'))
        image = image.convert('L' if channels == 1 else 'RGB')
        if size is not None and image.size != size[::-1]:
            image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BICUBIC)
        return np.asarray(image, np.uint8).reshape(*image.size[::-1], channels)


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """An image uint8 [height, width, channels] in another size, as `decode` resizes."""
    if image.shape[:2] == size:
        return image
    from PIL import Image

    channels = image.shape[-1]
    return decode(Image.fromarray(image[..., 0] if channels == 1 else image), channels=channels, size=size)


def shape(file: Any) -> tuple[int, int, int]:
    """Height, width and channels of an image, from its header: 1 for gray ones and 3 for all others."""
    from PIL import Image

    with Image.open(file) if not isinstance(file, Image.Image) else file.copy() as image:
        width, height = image.size
        if image.getexif().get(0x0112, 1) >= 5:  # its orientation: on its side
            width, height = height, width
        return height, width, 1 if image.mode in _GRAY else 3


def in_threads(function: Callable[[Any], Any], files: Sequence[Any], *, where: str) -> list[Any]:
    """Applies a function to every file, side by side.

    Raises:
      ValueError: some cannot be read; the message names the first and counts the others.
    """
    with needed_for('reading images'):
        import PIL.Image

    def attempt(file: Any) -> Any:
        try:
            return function(file)
        except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
            return _Failure(file, first_line(error))

    with ThreadPoolExecutor(_THREADS) as pool:
        results = list(pool.map(attempt, files))
    failures = [result for result in results if isinstance(result, _Failure)]
    if failures:
        first = failures[0]
        more = f' and {len(failures) - 1} more' if len(failures) > 1 else ''
        name = first.file if isinstance(first.file, str | pathlib.Path) else 'an image'
        raise ValueError(f'{where}: {name}{more} cannot be read ({first.reason}): remove or replace it')
    return results


class _Failure:
    def __init__(self, file: Any, reason: str):
        self.file, self.reason = file, reason


def as_pixels(images: np.ndarray, *, where: str) -> np.ndarray:
    """Arrays as uint8 images [examples, height, width, channels].

    Args:
      images: [examples, height, width], perhaps with 1, 3 or 4 channels, of which the fourth is dropped: uint8, booleans,
        uint16, floats from 0 to 1, or whole numbers from 0 to 255.
      where: what they are of, for errors.

    Raises:
      ValueError: they are none of these.
    """
    images = images[..., None] if images.ndim == 3 else images
    if images.ndim != 4 or images.shape[-1] not in (1, 3, 4):
        raise ValueError(
            f'{where}: images must be [examples, height, width], or that with 1 or 3 channels at the end, got {images.shape}'
        )
    images = images[..., :3]
    if images.dtype == np.uint8:
        return images
    if images.dtype == np.bool_:
        return images.astype(np.uint8) * np.uint8(255)
    if images.dtype == np.uint16:
        return (images >> 8).astype(np.uint8)
    low, high = (float(images.min()), float(images.max())) if images.size else (0.0, 0.0)
    if not (np.isfinite(low) and low >= 0 and high <= 255):
        raise ValueError(f'{where}: pixels must be from 0 to 1, or from 0 to 255, got {low:g} to {high:g}')
    if np.issubdtype(images.dtype, np.floating) and high <= 1:
        return np.round(images * 255).astype(np.uint8)
    if not np.array_equal(images, np.round(images)):
        raise ValueError(f'{where}: pixels up to {high:g} that are no whole numbers: scale them to 0 to 1')
    return images.astype(np.uint8)


def as_labels(labels: Any, *, where: str, class_names: Sequence[str] | None = None) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels as int32 from 0 on, and the names of the classes.

    Names are sorted. Integers from 0 to the number of classes stay what they are; others are numbered in rising order, and keep
    what they were as their names.

    Args:
      labels: integers or names [examples].
      where: what they are of, for errors.
      class_names: names by label, if they are known.

    Raises:
      ValueError: they are neither, there is only one class, or there are names for fewer classes.
    """
    labels = np.asarray(labels)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in 'iuUSO':
        raise ValueError(f'{where}: labels must be integers or names [examples], got {labels.dtype} {labels.shape}')
    if labels.dtype.kind in 'SO':
        labels = np.array([x.decode() if isinstance(x, bytes) else str(x) for x in labels], np.str_)
    found, numbers = np.unique(labels, return_inverse=True)
    if labels.dtype.kind in 'iu':
        known = class_names is not None or np.array_equal(found, np.arange(len(found)))
        if known and len(found) and found[0] >= 0:
            classes = len(found) if class_names is None else len(class_names)
            if found[-1] >= classes:
                raise ValueError(f'{where}: label {found[-1]} is beyond the {classes} classes')
            numbers, found = labels, np.arange(classes)
    names = tuple(str(each) for each in found) if class_names is None else tuple(map(str, class_names))
    if len(names) < 2:
        raise ValueError(f'{where}: there must be at least two classes, got {", ".join(names) or "none"}')
    return numbers.astype(np.int32), names
