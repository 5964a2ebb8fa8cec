"""Arrays [examples, ...] in files of some examples each, written whole or not at all, and read where they are indexed.

A file is an uncompressed .npz, which numpy reads too: a zip archive, so every array in it has a CRC-32. Where a mask says which
positions there are, an array has those alone, one after the other, and the mask stands beside it, eight positions a byte.
"""

import contextlib
import dataclasses
import errno
import functools
import io
import os
import pathlib
import secrets
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.lib import format as npy

OPEN = 64
"""Files of a recording that are open at a time; a system lets a process have some hundreds."""

# What reading a file gives whose bytes are not those that were written.
_DAMAGE = (
    OSError, ValueError, EOFError, KeyError, IndexError, SyntaxError, TypeError, NotImplementedError, RuntimeError,
    struct.error, zlib.error, zipfile.BadZipFile,
)  # fmt: skip
_WHERE, _STARTS = 'stored', 'starts'


@contextlib.contextmanager
def _beside(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A name that nobody else writes to, for what then moves to its place."""
    partial = path.with_name(f'{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial')
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def write_first(path: pathlib.Path, content: str) -> None:
    """Writes a file whole, unless there is one."""
    with _beside(path) as partial:
        partial.write_text(content)
        try:
            os.link(partial, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            if not path.exists():
                partial.replace(path)


def write_arrays(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes arrays into a file, whole. Of several processes that write it one is the last, and none is in another's way."""
    # numpy's files have no name for the dtypes that others have defined.
    plain: dict[str, Any] = {name: x.view(f'u{x.dtype.itemsize}') if x.dtype.kind == 'V' else x for name, x in arrays.items()}
    with _beside(path) as partial:
        with partial.open('wb') as file:
            np.savez(file, **plain)
        try:
            partial.replace(path)
        except FileNotFoundError:
            if not path.exists():  # else another process had written it, had all that it wanted, and cleared up
                raise


def open_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of a file as memory maps, each as its rows of bytes [rows, bytes].

    Raises:
      ValueError: the file is not there, or is no such file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
        content = np.memmap(path, mode='r')
        return {member.filename.removesuffix('.npy'): _rows(content, member) for member in members}
    except _DAMAGE as error:
        _raise_others(error)
        raise _damaged(path) from None


def _rows(content: np.ndarray, member: zipfile.ZipInfo) -> np.ndarray:
    start = member.header_offset
    name, extra = struct.unpack('<HH', content[start + 26 : start + 30].tobytes())
    start += 30 + name + extra
    if member.compress_type != zipfile.ZIP_STORED or content[member.header_offset :][:4].tobytes() != b'PK\x03\x04':
        raise ValueError
    header = io.BytesIO(content[start : start + min(4096, member.file_size)].tobytes())
    npy.read_magic(header)
    shape, fortran, dtype = npy.read_array_header_1_0(header)
    rows, size = shape[0], int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize
    if fortran or header.tell() + rows * size != member.file_size:
        raise ValueError
    return np.ndarray((rows, size), np.uint8, content, start + header.tell())


def check_files(paths: Sequence[pathlib.Path]) -> None:
    """Reads files and compares their checksums, several at a time.

    Raises:
      ValueError: a file is damaged; it names the first.
    """
    with ThreadPoolExecutor(8) as threads:
        for path, whole in zip(paths, threads.map(_is_whole, paths), strict=True):
            if not whole:
                raise _damaged(path)


def _is_whole(path: pathlib.Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except _DAMAGE as error:
        _raise_others(error)
        return False


def _raise_others(error: Exception) -> None:
    """Raises what says nothing of a file's bytes, such as too many open files; a position before its start does."""
    if isinstance(error, OSError) and error.errno not in (errno.EINVAL, errno.ENOENT):
        raise error


def _damaged(path: pathlib.Path) -> ValueError:
    return ValueError(f'{path} is truncated or damaged: remove it, and record_teacher writes it again')


def clear(folder: pathlib.Path) -> None:
    """Removes what killed processes have left half written."""
    for partial in folder.glob('*.partial'):
        with contextlib.suppress(OSError):
            partial.unlink()


def packed(arrays: dict[str, np.ndarray], where: np.ndarray | None, views: int | None) -> dict[str, np.ndarray]:
    """What is stored of arrays [examples, views, positions, ...]: values [stored, views, ...], which and how many."""
    if where is None:
        return arrays
    axes = where.ndim - 1
    last = arrays if views is None else {name: np.moveaxis(x, 1, 1 + axes) for name, x in arrays.items()}
    flat = where.reshape(len(where), -1)
    stored = {name: np.ascontiguousarray(x[where]) for name, x in last.items()}
    return {**stored, _WHERE: np.packbits(flat, axis=1), _STARTS: flat.sum(axis=1).astype(np.int64)}


def joined(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """A file of several parts, one after the other; of numbers of values it has where each example begins."""
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if _STARTS in arrays:
        arrays[_STARTS] = np.cumsum(arrays[_STARTS]) - arrays[_STARTS]
    return arrays


@dataclasses.dataclass(frozen=True, eq=False)
class RecordedArray:
    """A read-only array on disk, which is read where it is indexed, by numbers, slices or arrays of them.

    Where nothing was stored it is NaN, or 0 if it is of integers: what an objective does not count may be anything.

    Attributes:
      shape: [examples, ...].
      dtype: that of its values.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    name: str = dataclasses.field(repr=False)
    paths: tuple[pathlib.Path, ...] = dataclasses.field(repr=False)
    per_file: int = dataclasses.field(repr=False)
    positions: tuple[int, ...] | None = dataclasses.field(repr=False)
    views: int | None = dataclasses.field(repr=False)
    opened: Callable[[pathlib.Path], dict[str, np.ndarray]] = dataclasses.field(repr=False)

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of values, those that are not stored among them."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """The bytes of all of it in memory."""
        return self.size * self.dtype.itemsize

    def __len__(self) -> int:
        """The number of examples."""
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All of it, in memory."""
        if copy is False:
            raise ValueError('a recording cannot be read without a copy')
        array = self._read(np.arange(len(self)))
        return array if dtype is None else array.astype(dtype, copy=False)

    def __getitem__(self, index: Any) -> np.ndarray:
        """Examples by number, slice, integers or booleans; further indices are those of what was read."""
        first, *others = index if isinstance(index, tuple) and index else (index,)
        if first is None or first is Ellipsis:
            return np.asarray(self)[index]
        if isinstance(first, slice):
            found = self._read(np.arange(*first.indices(len(self))))
            return found[(slice(None), *others)] if others else found
        wanted = np.asarray(first)
        if wanted.dtype == np.bool_:
            if wanted.shape != self.shape[:1]:
                raise IndexError(f'a mask of examples must be {self.shape[:1]}, got {wanted.shape}')
            wanted = np.flatnonzero(wanted)
        if not np.issubdtype(wanted.dtype, np.integer) and wanted.size:
            raise IndexError(f'index a recording by integers, slices or booleans, got {wanted.dtype}')
        flat = wanted.reshape(-1).astype(np.int64)
        if flat.size and not (-len(self) <= flat.min() and flat.max() < len(self)):
            raise IndexError(f'index out of range of {len(self)} examples')
        found = self._read(np.where(flat < 0, flat + len(self), flat)).reshape(*wanted.shape, *self.shape[1:])
        if not others:
            return found
        return found[(*(slice(None),) * wanted.ndim, *others)] if wanted.ndim else found[tuple(others)]

    def _read(self, indices: np.ndarray) -> np.ndarray:
        """The examples with some numbers, from file after file."""
        result = np.empty((len(indices), *self.shape[1:]), self.dtype)
        files = indices // self.per_file
        for number in np.unique(files):
            chosen = files == number
            path = self.paths[number]
            try:
                result[chosen] = self._read_file(self.opened(path), indices[chosen] - number * self.per_file)
            except (KeyError, IndexError, ValueError):
                raise _damaged(path) from None
        return result

    def _read_file(self, arrays: dict[str, np.ndarray], rows: np.ndarray) -> np.ndarray:
        content = arrays[self.name]
        if self.positions is None:
            return content[rows].view(self.dtype).reshape(len(rows), *self.shape[1:])
        axes, start = len(self.positions), 1 if self.views is None else 2
        inner = (*self.shape[1:start], *self.shape[start + axes :])
        number = int(np.prod(self.positions, dtype=np.int64))
        where = np.unpackbits(arrays[_WHERE][rows], axis=1, count=number).astype(np.bool_)
        begin = arrays[_STARTS][rows].view(np.int64)[:, 0]
        kept = where.sum(axis=1)
        # The numbers of all values of these examples: where each begins, and on from there.
        ends = np.cumsum(kept)
        places = np.repeat(begin - (ends - kept), kept) + np.arange(kept.sum())
        missing = jnp.nan if jnp.issubdtype(self.dtype, jnp.floating) else 0
        result = np.full((len(rows), number, *inner), missing, self.dtype)
        result[where] = content[places].view(self.dtype).reshape(len(places), *inner)
        result = result.reshape(len(rows), *self.positions, *inner)
        return result if self.views is None else np.moveaxis(result, 1 + axes, 1)


def recorded_arrays(
    shapes: dict[str, tuple[tuple[int, ...], Any]],
    paths: Sequence[pathlib.Path],
    examples: int,
    per_file: int,
    positions: tuple[int, ...] | None,
    views: int | None,
) -> dict[str, RecordedArray]:
    """The arrays of these names, whose examples have these shapes and dtypes, in files that they share."""
    opened = functools.lru_cache(OPEN)(open_arrays)
    return {
        name: RecordedArray((examples, *shape), jnp.dtype(dtype), name, tuple(paths), per_file, positions, views, opened)
        for name, (shape, dtype) in shapes.items()
    }
