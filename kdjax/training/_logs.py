"""What a run tells while it trains: a file of JSON lines, and a progress bar, or lines where nobody watches a terminal."""

import json
import math
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from kdjax.files import write_whole


class MetricsLog:
    """A file of JSON lines that several runs share; a run that resumes drops its own lines after the step it resumes from."""

    def __init__(self, path: str | pathlib.Path | None, name: str, resume_from: int) -> None:
        self.path = None if path is None or jax.process_index() != 0 else pathlib.Path(path)
        self.name = name
        if self.path is None or not self.path.exists():
            return
        lines = self.path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if not self._is_stale(line, resume_from)]
        if len(kept) < len(lines):
            write_whole(self.path, ''.join(kept))

    def _is_stale(self, line: str, resume_from: int) -> bool:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            return True  # A run that was killed may have left half a line.
        return record['run'] == self.name and record['step'] > resume_from

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends a record; a number that is not finite, which JSON lacks, becomes null."""
        if self.path is None:
            return
        finite = {key: [*map(_finite, x)] if isinstance(x, list) else _finite(x) for key, x in record.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open('a') as file:
            file.write(json.dumps({'run': self.name, **finite}) + '\n')


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Progress:
    """A bar of the steps on a terminal; a line for every interval in a pipe or a file; nothing where it is not `wanted`."""

    def __init__(self, name: str, begun: int, total: int, *, wanted: bool) -> None:
        self._name, self._step, self._total = name, begun, total
        self._begun, self._since = begun, time.monotonic()
        wanted = wanted and jax.process_index() == 0
        terminal = wanted and sys.stderr is not None and sys.stderr.isatty()
        self._lines = wanted and not terminal
        self._bar = tqdm(total=total, initial=begun, desc=name, unit='step', leave=False, disable=not terminal)

    def __enter__(self) -> 'Progress':
        """Shows the bar until the context ends."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Takes the bar away."""
        self._bar.close()

    def advance(self, steps: int) -> None:
        """Counts steps."""
        self._step += steps
        self._bar.update(steps)

    def show(self, record: Mapping[str, Any], *, line: bool) -> None:
        """Tells the loss, and everything of a validation: on the bar, or, if it is the end of an interval, as a line.

        Of the numbers of several students it tells the mean.
        """
        told = {key: x for key, x in record.items() if key in ('loss', 'learning_rate') or key.startswith('validation/')}
        if 'loss' in told:
            self._bar.set_postfix(loss=f'{np.mean(told["loss"]):.4f}')
        if self._lines and line:
            numbers = ', '.join(f'{key} {np.mean(x):.4g}' for key, x in told.items())
            speed = (self._step - self._begun) / max(time.monotonic() - self._since, 1e-9)
            left = tqdm.format_interval((self._total - self._step) / max(speed, 1e-9))
            tqdm.write(
                f'{self._name}: step {record["step"]} of {self._total}, {numbers} ({speed:.3g} steps a second, {left} left)',
                file=sys.stderr,
            )
