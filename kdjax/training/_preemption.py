"""Notice of the end: SIGTERM, by which schedulers and people ask a run to stop, as a question that training asks."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


class Preempted(RuntimeError):  # noqa: N818 - nothing went wrong
    """Training was asked to stop by SIGTERM; the message says where its state is saved."""


@contextlib.contextmanager
def notices(step: int) -> Iterator[Callable[..., bool]]:
    """Listens for SIGTERM while the context lasts.

    In a single process only the main thread can listen; elsewhere nothing changes. A signal that nobody acted upon goes to the
    earlier handler at the end. Several processes hear of it through jax.distributed, and agree on one step at which to stop.

    Args:
      step: number of the steps before training begins, the same in all processes.

    Yields:
      `stop(step=None)`, whether training must stop. Several processes must ask it equally often, and at most once for each
      step; then with the number of steps so far, by which what they count agrees with what Orbax asks.
    """
    if jax.process_count() > 1:
        yield _of_all_processes(step)
        return
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda step=None: False
        return
    previous = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        yield lambda step=None: bool(received)
    finally:
        # None stands for a handler that was not set from Python.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)
    if received:
        signal.raise_signal(signal.SIGTERM)


def _of_all_processes(asked: int) -> Callable[..., bool]:
    """JAX picks the first number that no process has asked for yet, so none may be left out."""
    reached = False

    def stop(step: int | None = None) -> bool:
        nonlocal asked, reached
        until = asked + 1 if step is None else step
        while not reached and asked < until:
            asked += 1
            reached = multihost_utils.reached_preemption_sync_point(asked)
        return reached

    return stop
