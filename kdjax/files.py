"""Files that are there whole or not at all, whenever the process that writes them is killed."""

import os
import pathlib


def write_whole(path: str | os.PathLike, content: str | bytes) -> None:
    """Writes a file beside its place and moves it there: until then what was there before stays.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / 'note'
    ...     write_whole(path, 'whole')
    ...     path.read_text(), len(list(path.parent.iterdir()))
    ('whole', 1)
    """
    path = pathlib.Path(path)
    partial = path.with_name(f'{path.name}.partial')
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
