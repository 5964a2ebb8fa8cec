"""Objectives between networks that are trained together, as the members of one `networks.ensemble`."""

import functools
import operator
from typing import Any

import jax

from kdjax.batches import Batch
from kdjax.networks import Outputs
from kdjax.objectives._arguments import require_feature
from kdjax.objectives._logits import hard_labels, soft_targets
from kdjax.objectives._objective import Objective, Term, Weight, apply_terms


def of_member(objective: Objective, member: int, *, teacher: int | None = None) -> Objective:
    """The same objective for one member of an ensemble that learns, which may have another member for its teacher.

    The members need `networks.tap_logits`. No gradient flows into the member that is the teacher, as into any teacher, so
    what it learns is said by objectives of its own.

    A teacher and a student that learn at once, the teacher from labels and the student from both, are three terms:
    `of_member(hard_labels(), 0) + of_member(hard_labels(), 1) + of_member(soft_targets(), 1, teacher=0)`.

    Args:
      objective: what the member learns.
      member: its index.
      teacher: the index of the member that it learns from; the run's own teacher if not given.

    Raises:
      ValueError: from the objective: the student gives no logits of such a member.

    >>> import jax, jax.numpy as jnp
    >>> from kdjax import objectives
    >>> from kdjax.networks import Outputs
    >>> objective = of_member(objectives.logit_mse(), 1, teacher=0)
    >>> pair = Outputs(None, {'0/logits': jnp.array([[1., 2.]]), '1/logits': jnp.array([[1., 4.]])})
    >>> params, state = objective.init(jax.random.key(0), pair, Outputs(None), {})
    >>> loss, _, _ = objective.apply(params, state, pair, Outputs(None), {}, step=0)
    >>> print(loss)
    2.0
    """

    def sides(name: str, student: Outputs, teacher_outputs: Outputs) -> tuple[Outputs, Outputs]:
        return _outputs(name, student, member), teacher_outputs if teacher is None else _outputs(name, student, teacher)

    def own(term: Term) -> Term:
        name = f'{term.name}_of_{member}' if teacher is None else f'{term.name}_of_{member}_from_{teacher}'

        def init(key: jax.Array, student: Outputs, teacher: Outputs, batch: Batch) -> tuple[Any, Any]:
            return term.init(key, *sides(name, student, teacher), batch)

        def apply(params: Any, state: Any, student: Outputs, teacher: Outputs, batch: Batch, *, step: jax.Array) -> Any:
            student, teacher = sides(name, student, teacher)
            teacher = jax.lax.stop_gradient(teacher)
            found = apply_terms({name: term}, {name: params}, {name: state}, student, teacher, batch, step=step)
            return found[name]

        def check(student: Outputs, teacher: Outputs, batch: Batch) -> None:
            if term.check is not None:
                term.check(*sides(name, student, teacher), batch)

        # It reads features, and so is by position for itself alone.
        return term._replace(name=name, init=init, apply=apply, check=check, by_position=False)

    return Objective(tuple(own(term) for term in objective.terms))


def _outputs(name: str, joined: Outputs, member: int) -> Outputs:
    logits = require_feature(name, 'student', joined, f'{member}/logits')
    prefix = f'{member}/'
    return Outputs(logits, {key.removeprefix(prefix): x for key, x in joined.features.items() if key.startswith(prefix)})


def mutual_learning(members: int, *, temperature: Weight = 1.0) -> Objective:
    """DML, deep mutual learning: several students learn from the labels and from each other, and none is a teacher.

    Σ_i (hard labels of i + 1/(members - 1) · Σ_{j≠i} soft targets of i from j). The student is
    `networks.ensemble([networks.tap_logits(network), ...])`, the teacher None. Where the paper updates one
    network after the other, with new predictions in between, here all learn at once from the predictions of the same step.

    Args:
      members: number of students, at least 2.
      temperature: a number or a schedule.

    Raises:
      ValueError: there are fewer than two.

    >>> mutual_learning(2).names
    ('hard_labels_of_0', 'hard_labels_of_1', 'soft_targets_of_0_from_1', 'soft_targets_of_1_from_0')

    Reference:
      Zhang, Xiang, Hospedales, Lu. Deep Mutual Learning. 2018. https://arxiv.org/abs/1706.00384
    """
    if members < 2:
        raise ValueError(f'mutual_learning: there must be at least 2 members, got {members}')
    soft = (1 / (members - 1)) * soft_targets(temperature=temperature)
    pairs = [(i, j) for i in range(members) for j in range(members) if i != j]
    hard = [of_member(hard_labels(), i) for i in range(members)]
    # Not `sum`, whose type allows for 0.
    return functools.reduce(operator.add, [*hard, *(of_member(soft, i, teacher=j) for i, j in pairs)])
