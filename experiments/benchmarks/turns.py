"""Timing of several things in turns, so that what else the machine does falls on all of them."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax


def in_turns(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of every call, by name; each function is called once before, untimed, and what it returns is waited for."""
    for function in functions.values():
        jax.block_until_ready(function())
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            started = time.perf_counter()
            jax.block_until_ready(function())
            times[name].append(1e3 * (time.perf_counter() - started))
    return times


def ratio(ours: list[float], theirs: list[float]) -> float:
    """The median of the ratios, turn by turn."""
    return statistics.median(one / other for one, other in zip(ours, theirs, strict=True))


def compare(ours: Callable[[], Any], theirs: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Median milliseconds of both, taken in turns, and their ratio, as every benchmark's last line has them."""
    times = in_turns({'ours': ours, 'theirs': theirs}, repeats)
    medians = {f'{side}_ms': statistics.median(values) for side, values in times.items()}
    return {'ratio': ratio(times['ours'], times['theirs']), **medians}
