"""Objectives made of objectives: in turn, under a condition, and over some positions."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.batches import Batch
from kdjax.metrics import Average, mean
from kdjax.networks import Outputs
from kdjax.objectives._arguments import require_entry
from kdjax.objectives._objective import Objective, Schedule, Term, Weight, evaluate


def in_stages(objectives: Sequence[Objective], boundaries: Sequence[int]) -> Objective:
    """One objective after the other, as optax joins schedules.

    FitNets' two stages are `in_stages([hint('stage2', 'stage2'), hard_labels()], [10_000])`. All are computed at every step,
    and those whose turn it is not weigh 0. The optimizer goes on from stage to stage; for a fresh one, or to train less of the
    student, run one `distillation` per stage and hand the second `student_variables=`.

    Args:
      objectives: the stages.
      boundaries: the steps at which all but the first begin.

    Raises:
      ValueError: boundaries and stages do not fit.

    >>> from kdjax import objectives
    >>> two_stages = in_stages([objectives.hint('stage2', 'stage2'), objectives.hard_labels()], [100])
    >>> [float(weight(99)) for term in two_stages.terms for weight in term.weights]
    [1.0, 0.0]
    """
    if len(boundaries) != len(objectives) - 1 or list(boundaries) != sorted(boundaries):
        raise ValueError(
            f'in_stages: {len(objectives)} stages need {len(objectives) - 1} rising boundaries, got {list(boundaries)}'
        )

    def turn(i: int) -> Schedule:
        first = boundaries[i - 1] if i > 0 else None
        last = boundaries[i] if i < len(boundaries) else None

        def weight(step: Any) -> jax.Array:
            begun = True if first is None else jnp.asarray(step) >= first
            ended = False if last is None else jnp.asarray(step) >= last
            return jnp.where(begun & jnp.logical_not(ended), jnp.float32(1.0), jnp.float32(0.0))

        return weight

    return Objective(tuple(term for i, objective in enumerate(objectives) for term in (turn(i) * objective).terms))


def constraint(objective: Objective, limit: Weight, *, learning_rate: float = 0.1, multiplier: float = 0.0) -> Objective:
    """Keeps an objective below a limit while the rest of a sum is minimised.

    `activation_size('stage3') + constraint(hard_labels(), 0.3)` looks for small activations with a cross-entropy of 0.3.

    The value is λ·(loss - limit), with a Lagrange multiplier λ ≥ 0 that climbs while the limit is not kept:
    λ ← max(0, λ + learning_rate · (loss - limit)) after every step. Where the sum stops changing, either the limit is kept
    with λ = 0, or it is met exactly. λ is the term's state; its metrics are the objective's, `'multiplier'` and `'excess'`.

    Args:
      objective: what must stay below the limit.
      limit: the largest value it may have; a number or a schedule.
      learning_rate: how fast λ climbs.
      multiplier: λ at the start. From 0, the rest of the sum is all that counts until λ has climbed.

    Raises:
      ValueError: the multiplier is negative.

    >>> import jax, jax.numpy as jnp
    >>> from kdjax import objectives
    >>> from kdjax.networks import Outputs
    >>> output = objectives.from_function('output', lambda student, teacher, batch: student.logits)
    >>> constrained = constraint(output, 0.5, learning_rate=0.1)
    >>> student = Outputs(jnp.array([2.0]))
    >>> params, state = constrained.init(jax.random.key(0), student, Outputs(None), {})
    >>> for step in range(3):
    ...     value, metrics, state = constrained.apply(params, state, student, Outputs(None), {}, step=step)
    >>> print(value)
    0.45

    Reference:
      Platt, Barr. Constrained Differential Optimization. 1988.
      https://papers.nips.cc/paper/1987/hash/a87ff679a2f3e71d9181a67b7542122c-Abstract.html
    """
    if isinstance(multiplier, (int, float)) and not multiplier >= 0:
        raise ValueError(f'constraint: multiplier must be at least 0, got {multiplier}')

    def init(key: jax.Array, student: Outputs, teacher: Outputs, batch: Batch) -> tuple[Any, Any]:
        params, state = objective.init(key, student, teacher, batch)
        return params, {'objective': state, 'multiplier': jnp.float32(multiplier)}

    def apply(
        params: Any, state: Any, student: Outputs, teacher: Outputs, batch: Batch, *, step: jax.Array
    ) -> tuple[Average, dict[str, Average], Any]:
        loss, metrics, inner = objective.apply(params, state['objective'], student, teacher, batch, step=step)
        excess = loss - evaluate(limit, step)
        current = state['multiplier']
        climbed = jnp.maximum(0.0, current + learning_rate * jax.lax.stop_gradient(excess))
        extra = {**metrics, 'multiplier': mean(current), 'excess': mean(excess)}
        return mean(current * excess), extra, {'objective': inner, 'multiplier': climbed}

    return Objective((Term('constraint', init, apply, check=objective.check),))


def over_positions(objective: Objective, entry: str) -> Objective:
    """The same objective over the positions where an entry of the batch is true, on top of the batch's mask.

    `over_positions(0.5 * soft_targets() + hard_labels(), 'completion')` learns what follows the prompt, where
    `batch['completion']` [batch, length] is true: the mask still says what is padding. It scales, adds and combines as any
    objective. Its terms are named 'hard_labels_over_completion'.

    Args:
      objective: any; to all of it the rest does not exist.
      entry: the name of booleans [batch] or [batch, positions].

    Raises:
      ValueError: where it is used, if the batch has no such entry, or one that does not fit.

    >>> import jax, jax.numpy as jnp
    >>> from kdjax import objectives
    >>> objective = over_positions(objectives.logit_mse(), 'completion')
    >>> student, teacher = Outputs(jnp.array([[[1.0, 2.0], [3.0, 4.0]]])), Outputs(jnp.zeros((1, 2, 2)))
    >>> batch = {'completion': jnp.array([[False, True]])}
    >>> params, state = objective.init(jax.random.key(0), student, teacher, batch)
    >>> loss, metrics, _ = objective.apply(params, state, student, teacher, batch, step=0)
    >>> print(loss, *metrics)
    12.5 loss logit_mse_over_completion logit_mse_over_completion/weighted
    """

    def masked(batch: Batch) -> Batch:
        masks = [require_entry('over_positions', batch, entry), *([batch['mask']] if 'mask' in batch else [])]
        shape = max((np.shape(mask) for mask in masks), key=len)
        if any(mask.dtype != jnp.bool_ or np.shape(mask) != shape[: np.ndim(mask)] for mask in masks):
            told = ' and a mask '.join(f'{mask.dtype} {np.shape(mask)}' for mask in masks)
            raise ValueError(f"over_positions: batch['{entry}'] must be boolean, and fit the mask, got {told}")
        spread = (jnp.reshape(mask, (*np.shape(mask), *(1,) * (len(shape) - np.ndim(mask)))) for mask in masks)
        return {**batch, 'mask': functools.reduce(jnp.logical_and, spread)}

    def own(term: Term) -> Term:
        def init(key: jax.Array, student: Outputs, teacher: Outputs, batch: Batch) -> tuple[Any, Any]:
            require_entry('over_positions', batch, entry)
            # Of the masks alone: what else is in the batch, numbers of a type that JAX lacks perhaps, need not be traced.
            masks = {name: batch[name] for name in (entry, 'mask') if name in batch}
            return term.init(key, student, teacher, {**batch, 'mask': jax.eval_shape(masked, masks)['mask']})

        def apply(params: Any, state: Any, student: Outputs, teacher: Outputs, batch: Batch, *, step: jax.Array) -> Any:
            return term.apply(params, state, student, teacher, masked(batch), step=step)

        def check(student: Outputs, teacher: Outputs, batch: Batch) -> None:
            if term.check is not None:
                term.check(student, teacher, masked(batch))

        return term._replace(name=f'{term.name}_over_{entry}', init=init, apply=apply, check=check)

    return Objective(tuple(own(term) for term in objective.terms))
