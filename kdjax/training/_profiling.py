"""A profile of a few steps of a run."""

import pathlib
from typing import Any

import jax


class Profile:
    """Traces five steps of a run with `jax.profiler`, after five that compile; the middle of a run that is shorter.

    Attributes:
      steps: where the trace begins and ends, both counted in steps of the run; empty without a folder.
    """

    def __init__(self, folder: str | pathlib.Path | None, begun: int, total: int) -> None:
        self._folder, self._runs = folder, False
        first = begun + min(5, (total - begun) // 2)
        self.steps = () if folder is None or begun >= total else (first, min(first + 5, total))

    def __enter__(self) -> 'Profile':
        """A trace that has begun ends with the context."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Ends the trace."""
        if self._runs:
            jax.profiler.stop_trace()
            self._runs = False

    def at(self, step: int, state: Any) -> None:
        """Begins or ends the trace if this is its step."""
        if not self.steps:
            return
        if not self._runs and step == self.steps[0]:
            # What was dispatched before does not belong to the trace.
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self._folder))
            self._runs = True
        elif self._runs and step >= self.steps[1]:
            # What was dispatched in it does.
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self._runs = False
