"""Which student layer learns from which teacher layer: a method summed over a mapping of paths."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kdjax.objectives._objective import Objective, Term


def over_layers(objective: Callable[..., Objective], layers: Mapping[str, str], **hyperparameters: Any) -> Objective:
    """The mean of an objective over pairs of layers: `{student path: teacher path, ...}`.

    >>> from kdjax import objectives
    >>> over_layers(objectives.attention_transfer, {'stage2': 'stage2', 'stage3': 'stage5'}).names
    ('stage2 <- stage2', 'stage3 <- stage5')

    Args:
      objective: one that takes the two paths first.
      layers: which student layer learns from which teacher layer.
      **hyperparameters: of the objective.
    """
    if not layers:
        raise ValueError('over_layers: the mapping of student layers to teacher layers is empty')
    terms: list[Term] = []
    for student, teacher in layers.items():
        made = (1 / len(layers) * objective(student, teacher, **hyperparameters)).terms
        terms += [term._replace(name=f'{student} <- {teacher}') for term in made]
    return Objective(tuple(terms))


def uniform_layers(student: Sequence[str], teacher: Sequence[str]) -> dict[str, str]:
    """Maps every student layer to the teacher layer at the same relative depth, the last to the last.

    >>> uniform_layers(['block0', 'block1'], ['block0', 'block1', 'block2', 'block3'])
    {'block0': 'block1', 'block1': 'block3'}
    """
    return {path: teacher[-(-(i + 1) * len(teacher) // len(student)) - 1] for i, path in enumerate(student)}
