"""Objectives with a teacher from disk."""

import dataclasses
from typing import Any

import jax

from kdjax.batches import Batch
from kdjax.networks import LinearLogits, Outputs
from kdjax.objectives._arguments import require_entry, require_logits
from kdjax.objectives._objective import Objective, Term


def from_recorded_logits(objective: Objective) -> Objective:
    """The same objective with what was recorded in place of a teacher's logits, for a run without the network.

    `distillation(student, None, from_recorded_logits(0.9 * soft_targets() + 0.1 * hard_labels()), optimizer)`
    learns from what `training.record_teacher` has made: `batch['teacher_logits']`. The teacher has no features then.

    Where the batch has `'teacher_hidden'` instead, [batch, ..., width], the teacher's logits are their product with its head,
    `LinearLogits`, so that all of them are never in memory. The head is that of the problem's teacher:
    `training.recorded_head(folder)`, which is a network of nothing else, or the network that was recorded, made by
    `networks.linear_head`, of which jit computes only what is used.

    Args:
      objective: an objective on logits.

    Raises:
      ValueError: where it is used, if the batch has nothing recorded, or still what was recorded of several views, or there
        are hidden states and the teacher has no head for them.

    >>> import jax, jax.numpy as jnp
    >>> from kdjax import objectives
    >>> recorded = from_recorded_logits(objectives.logit_mse())
    >>> batch = {'teacher_logits': jnp.array([[1., 2.]])}
    >>> params, state = recorded.init(jax.random.key(0), Outputs(jnp.zeros((1, 2))), Outputs(None), batch)
    >>> loss, _, _ = recorded.apply(params, state, Outputs(jnp.zeros((1, 2))), Outputs(None), batch, step=0)
    >>> print(loss)
    2.5
    """

    def recorded(term: Term) -> Term:
        def init(key: jax.Array, student: Outputs, teacher: Outputs, batch: Batch) -> tuple[Any, Any]:
            return term.init(key, student, _recorded_teacher(student, teacher, batch), batch)

        def check(student: Outputs, teacher: Outputs, batch: Batch) -> None:
            if term.check is not None:
                term.check(student, _recorded_teacher(student, teacher, batch), batch)

        return term._replace(init=init, check=check, teacher=_recorded_teacher)

    return Objective(tuple(recorded(term) for term in objective.terms))


def _recorded_teacher(student: Outputs, teacher: Outputs, batch: Batch) -> Outputs:
    """The teacher's outputs as they were recorded."""
    entry = 'teacher_hidden' if 'teacher_hidden' in batch else 'teacher_logits'
    found = require_entry('from_recorded_logits', batch, entry)
    expected = len(require_logits('from_recorded_logits', 'student', student).shape)
    if len(found.shape) != expected:
        what = 'hidden states' if entry == 'teacher_hidden' else 'logits'
        raise ValueError(
            f'from_recorded_logits: recorded {what} {found.shape} do not fit a student with logits of {expected} axes; '
            'of several views, training.one_view takes one'
        )
    if entry == 'teacher_logits':
        return Outputs(found)
    head = teacher.features.get('head') if teacher.logits is None else teacher.logits
    if not isinstance(head, LinearLogits):
        raise ValueError(
            "from_recorded_logits: batch['teacher_hidden'] needs the teacher's head: give distillation the network of "
            'training.recorded_head, and its variables, as the teacher'
        )
    width = head.kernel.shape[1 if head.transposed else 0]
    if found.shape[-1] != width:
        raise ValueError(
            f"from_recorded_logits: batch['teacher_hidden'] {found.shape} was recorded of another head than one of {width} "
            'numbers'
        )
    return Outputs(dataclasses.replace(head, hidden=found))
