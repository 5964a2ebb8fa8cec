"""Some examples of an array that stays on disk."""

from typing import Any

import numpy as np


class Rows:
    """Chosen rows of a memory map [examples, ...], which are read when they are asked for and not before.

    It is indexed as the array of these rows would be along its first axis, and becomes that array where one is needed, as in
    `np.asarray`. `training.fit` reads it piece by piece.

    >>> rows = Rows(np.array([[5], [6], [7]]), np.array([2, 0, 0]))
    >>> rows.shape, rows[1:].tolist(), rows[0].tolist()
    ((3, 1), [[5], [5]], [7])
    """

    def __init__(self, array: Any, indices: np.ndarray) -> None:
        # Masks and negative numbers choose as they do from an array.
        self._array, self._indices = array, np.arange(len(array))[indices]
        self.shape, self.dtype = (len(self._indices), *array.shape[1:]), array.dtype

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        """Rows, or elements of them where axes after the first are indexed too."""
        rows, *rest = index if isinstance(index, tuple) else (index,)
        return self._array[(self._indices[rows], *rest)]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All of the rows, in memory."""
        if copy is False:
            raise ValueError('rows of a file cannot become an array without a copy')
        return np.asarray(self[:], dtype)

    def take(self, indices: np.ndarray) -> 'Rows':
        """Chosen ones of these rows."""
        return Rows(self._array, self._indices[indices])
