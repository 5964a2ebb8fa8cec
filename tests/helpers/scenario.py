"""Runs a scenario script and records what each of its networks was trained on, and by whom."""

import json
import math
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from experiments import settings
from kdjax import training
from kdjax.batches import Batch


class Trained(NamedTuple):
    """One call of `training.fit`."""

    split: Batch
    epochs: int
    seed: int
    teacher: Any
    student: Any
    variables: dict[str, Any]


def config(script: Any, **flags: Any) -> Any:
    """The config of a script with these flags, as its command line would make it."""
    return settings.with_flags(script.Config(), **flags)


def run(script: Any, config: Any) -> tuple[dict[str, dict[str, Any]], dict[str, Trained]]:
    """The rows of the report by name, and what was trained by name, such as 'seed0/student-alone'."""
    trained: dict[str, Trained] = {}
    fit = training.fit

    def record(problem: training.Problem, split: Batch, teacher: Any = None, **more: Any) -> Any:
        fitted = fit(problem, split, teacher, **more)
        given = jax.device_get((teacher, more.get('student_variables'), fitted.variables))
        assert more['name'] not in trained
        seed = int(jax.random.key_data(more['key'])[-1])
        trained[more['name']] = Trained(split, more['epochs'], seed, *given)
        return fitted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, 'fit', record)
        script.main(config)
    flags = {name: value for name, _, value in settings.fields(config)}
    output, seeds = pathlib.Path(flags['output']), flags['seeds']
    rows = {row['name']: row for row in json.loads((output / 'report.json').read_text())['rows']}
    text = (output / 'report.md').read_text()
    for name, row in rows.items():
        assert f'| {name} |' in text
        assert 0 <= row['accuracy_mean'] <= 1
        assert row['runs'] == seeds
        assert all(math.isfinite(row[key]) for key in ('bytes', 'latency_ms'))
        # One seed says nothing of the deviation.
        assert row['accuracy_std'] is None if seeds == 1 else math.isfinite(row['accuracy_std'])
    assert (output / 'figure.png').stat().st_size > 1000
    return rows, trained


def equal(one: Any, other: Any) -> bool:
    """Whether two trees hold the same arrays."""
    return jax.tree.structure(one) == jax.tree.structure(other) and all(
        np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )
