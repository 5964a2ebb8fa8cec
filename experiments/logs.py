"""What a training tells beside its progress: how large it is before it begins, and its numbers as TensorBoard reads them."""

import contextlib
import functools
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from tensorboardX import SummaryWriter

from kdjax import networks, training
from kdjax.batches import Batch, take_examples


def summary(problem: training.Problem, split: Batch, batch_size: int, teacher_variables: networks.Variables | None) -> str:
    """Parameters and bytes of student and teacher, and the operations of a step as XLA counts them.

    Operations on numbers of floating point, multiplications and additions each for one; a step is a batch forward through both
    networks, and backward through the student.
    """
    batch = jax.eval_shape(lambda: take_examples(split, slice(0, batch_size)))
    state = jax.eval_shape(problem.init, jax.random.key(0), batch)
    taught_by = {} if teacher_variables is None else jax.eval_shape(lambda: teacher_variables)
    told = [_size('student' if taught_by else 'network', state.variables)]
    if taught_by:
        told.append(_size('teacher', taught_by))
    if jax.tree.leaves(state.objective_params):
        told.append(_size('objective', {'params': state.objective_params}))
    operations = _operations(problem, *_hashable((state, taught_by, batch)))
    if math.isfinite(operations):
        told.append(f'{_short(operations)} operations a step of {batch_size} examples')
    return '; '.join(told)


# Lowering a step takes as long as tracing it, and all seeds have the same.
@functools.lru_cache(maxsize=64)
def _operations(problem: training.Problem, shapes: tuple[jax.ShapeDtypeStruct, ...], structure: Any) -> float:
    """Of a step; NaN where jax cannot count them, as on some platforms."""
    counted = jax.jit(problem.step).lower(*jax.tree.unflatten(structure, shapes)).cost_analysis() or {}
    return counted.get('flops', math.nan)


def _hashable(tree: Any) -> tuple[tuple[Any, ...], Any]:
    leaves, structure = jax.tree.flatten(tree)
    return tuple(leaves), structure


@contextlib.contextmanager
def tensorboard(folder: str | pathlib.Path | None) -> Iterator[Callable[[dict[str, Any]], None] | None]:
    """An `on_record` for `training.fit` that writes event files for TensorBoard; None without a folder.

    A run that resumes writes another file, which replaces what was written after the step it resumes from.
    """
    if folder is None or jax.process_index() != 0:
        yield None
        return
    writer = None

    def write(record: dict[str, Any]) -> None:
        nonlocal writer
        if writer is None:
            writer = SummaryWriter(str(folder), purge_step=record['step'])
        for name, value in record.items():
            for i, number in enumerate(value if isinstance(value, list) else ()):
                writer.add_scalar(f'{name}/{i}', number, record['step'])
            if name != 'step' and not isinstance(value, list):
                writer.add_scalar(name, value, record['step'])
        writer.flush()

    try:
        yield write
    finally:
        if writer is not None:
            writer.close()


def _size(name: str, variables: Any) -> str:
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables['params']))
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(variables))
    return f'{name} {_short(parameters)} parameters, {_short(size)} bytes'


def _short(number: float) -> str:
    """Three digits and a unit.

    >>> _short(1234567), _short(950)
    ('1.23M', '950')
    """
    power = min(max(0, math.floor(math.log10(max(number, 1)) / 3)), 5)
    return f'{number / 1000**power:.3g}{("", "k", "M", "G", "T", "P")[power]}'
