"""Runs the Python blocks of a Markdown page, as a reader would who types them from the top."""

import pathlib
import re
from typing import Any

# The blocks that run; one that is fenced with another word, or none, is for reading.
BLOCK = re.compile(r'^```python\n(.*?)^```', re.DOTALL | re.MULTILINE)


def run_snippets(path: pathlib.Path) -> dict[str, Any]:
    """Runs the blocks fenced with ```python in order, in one namespace, and returns that namespace.

    Files are written below the working directory, so a test changes to a folder of its own first. An error has the page and the
    line in its traceback.
    """
    text = path.read_text()
    names: dict[str, Any] = {'__name__': '__main__'}
    for block in BLOCK.finditer(text):
        # As many empty lines before it as the page has, so that its line numbers are those of the page.
        source = '\n' * text.count('\n', 0, block.start(1)) + block[1]
        exec(compile(source, path, 'exec'), names)
    return names
