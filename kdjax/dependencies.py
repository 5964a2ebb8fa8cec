"""Packages that are imported only once they are needed: they take long to import, and much can be done without them."""

import contextlib
from collections.abc import Iterator

# Where a package is not called what its module is.
_PACKAGES = {'PIL': 'pillow', 'dm_pix': 'dm-pix', 'sklearn': 'scikit-learn', 'tensorflow_datasets': 'tensorflow-datasets'}


@contextlib.contextmanager
def needed_for(purpose: str) -> Iterator[None]:
    """Says what to install where an import in its block finds nothing.

    Args:
      purpose: what cannot be done without it, as the subject of a sentence.

    Raises:
      ModuleNotFoundError: a module is missing; the message names its package.

    >>> with needed_for('reading minds'):
    ...     import telepathy
    Traceback (most recent call last):
    ModuleNotFoundError: reading minds needs telepathy, which is not installed: pip install telepathy
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None:
            raise
        package = _PACKAGES.get(error.name.split('.')[0], error.name.split('.')[0])
        message = f'{purpose} needs {package}, which is not installed: pip install {package}'
        raise ModuleNotFoundError(message, name=error.name) from error
