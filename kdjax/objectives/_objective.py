"""Objectives: what a student is trained for, as a weighted sum of terms that can be added, scaled and scheduled.

Every term honours `batch['mask']` exactly as slicing would, and `batch['weights']`: a mean over examples or positions divides
by the sum of the weights, and a weight of 0 is a mask. A term with one value for an example of several positions gives it the
largest of their weights; one that relates the examples of a batch to each other asks only which weights are 0.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from kdjax.batches import Batch, check_weights
from kdjax.meshes import on_any_mesh
from kdjax.metrics import Average, divide, mean
from kdjax.networks import LinearLogits, Outputs, dense_logits, sum_in_chunks
from kdjax.objectives._arguments import batch_mean

Schedule = Callable[[Any], Any]
"""A function of the step, such as optax's schedules."""

Weight = float | jax.Array | Schedule


class TermInit(Protocol):
    """Makes what a term trains and remembers."""

    def __call__(self, key: jax.Array, student: Outputs, teacher: Outputs, batch: Batch) -> tuple[Any, Any]:
        """Returns `(params, state)` from the shapes of its arguments; their leaves may be `jax.ShapeDtypeStruct`."""
        ...


class TermApply(Protocol):
    """Computes a term for a batch."""

    def __call__(
        self, params: Any, state: Any, student: Outputs, teacher: Outputs, batch: Batch, *, step: jax.Array
    ) -> tuple[Average, dict[str, Average], Any]:
        """Returns the loss as an `Average`, further metrics by name, and the state after this batch."""
        ...


Check = Callable[[Outputs, Outputs, Batch], None]
"""Raises where a batch holds values that a term cannot mean; `check(student, teacher, batch)`, of which the first two may be
shapes. It runs on the host, where values are at hand: inside jit a label beyond the classes can be no error."""


class Term(NamedTuple):
    """One summand of an objective. The weight is the product of `weights`, each a number or a schedule.

    `by_position` says that it is a mean over positions, of values that see nothing but the logits of a position and what the
    batch says of it, and that it keeps no state; see `objectives.by_position`. `teacher(student, teacher, batch)` gives what
    stands in for the teacher's outputs in `apply`, before any are cut into chunks.
    """

    name: str
    init: TermInit
    apply: TermApply
    weights: tuple[Weight, ...] = ()
    check: Check | None = None
    by_position: bool = False
    teacher: Callable[[Outputs, Outputs, Batch], Outputs] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Objective:
    """A weighted sum of terms, closed under `weight * objective`, `objective + objective` and `combine`.

    It is a pair of pure functions: `init` makes the parameters (such as connectors) and the state (such as a memory bank) that
    the terms need, `apply` computes the loss. Weights and hyperparameters may be schedules; they are evaluated inside jit.

    >>> from kdjax import objectives
    >>> objective = 0.1 * objectives.hard_labels() + 0.9 * objectives.soft_targets(temperature=4.0)
    >>> objective.names
    ('hard_labels', 'soft_targets')
    """

    terms: tuple[Term, ...]

    def __post_init__(self) -> None:
        if any(term.name == 'loss' for term in self.terms):
            raise ValueError("a term cannot be named 'loss', which is the name of the sum in the metrics")

    # Makes numpy's scalars leave `scalar * objective` to this class.
    __array_ufunc__ = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the terms, under which parameters, state and metrics are kept; repeated ones get numbers."""
        names: list[str] = []
        for term in self.terms:
            name, number = term.name, 2
            while name in names:
                name, number = f'{term.name}_{number}', number + 1
            names.append(name)
        return tuple(names)

    def init(self, key: jax.Array, student: Outputs, teacher: Outputs, batch: Batch) -> tuple[dict, dict]:
        """Makes parameters and state, each a dictionary by term.

        Args:
          key: a random key.
          student: the student's outputs for a batch, or their shapes (`jax.eval_shape`).
          teacher: the teacher's, likewise.
          batch: the batch, or its shapes.

        Raises:
          ValueError: the outputs lack what a term needs, or shapes do not fit.
        """
        params, state = {}, {}
        for i, (name, term) in enumerate(zip(self.names, self.terms, strict=True)):
            params[name], state[name] = term.init(jax.random.fold_in(key, i), student, teacher, batch)
        # Abstract: costs no arithmetic, and reports shapes that do not fit before anything has been trained or written.
        jax.eval_shape(lambda *arguments: self.apply(*arguments, step=jnp.int32(0)), params, state, student, teacher, batch)
        return params, state

    def check(self, student: Outputs, teacher: Outputs, batch: Batch) -> None:
        """Checks the values of a batch, or of a whole data set, as far as the terms can tell right from wrong.

        Args:
          student: the student's outputs, or their shapes, for any number of examples.
          teacher: the teacher's, likewise.
          batch: numpy arrays, or others whose values are at hand.

        Raises:
          ValueError: the data do not fit, such as a label beyond the classes or a negative weight.

        >>> from kdjax import objectives
        >>> student = Outputs(jax.ShapeDtypeStruct((8, 3), jnp.float32))
        >>> objectives.hard_labels().check(student, Outputs(None), {'labels': np.array([0, 3])})
        Traceback (most recent call last):
        ...
        ValueError: hard_labels: batch['labels'] must be below 3, or negative where there is none, got 3 (1 such)
        """
        check_weights(batch)
        for term in self.terms:
            if term.check is not None:
                term.check(student, teacher, batch)

    @on_any_mesh
    def apply(
        self, params: dict, state: dict, student: Outputs, teacher: Outputs, batch: Batch, *, step: Any
    ) -> tuple[jax.Array, dict[str, Average], dict]:
        """Computes the loss of a batch.

        Args:
          params: the terms' parameters.
          state: the terms' state.
          student: the student's outputs.
          teacher: the teacher's outputs; no gradient flows into them.
          batch: the batch.
          step: the training step, for schedules.

        Returns:
          `(loss, metrics, state)`. The metrics hold `'loss'` and, for every term, `'name'` and `'name/weighted'`; a
          scheduled weight as `'name/weight'`, a scheduled hyperparameter as `'name/hyperparameter'`.
        """
        loss = jnp.float32(0.0)
        metrics: dict[str, Average] = {}
        new_state = {}
        terms = dict(zip(self.names, self.terms, strict=True))
        found = apply_terms(terms, params, state, student, teacher, batch, step=step)
        for name, term in terms.items():
            value, extra, new_state[name] = found[name]
            weight = jnp.float32(1.0)
            for factor in term.weights:
                weight = weight * evaluate(factor, step)
            weighted = weight * divide(value)
            loss = loss + weighted
            metrics[name] = value
            metrics[f'{name}/weighted'] = Average(weight * value.total, value.count)
            if any(callable(factor) for factor in term.weights):
                metrics[f'{name}/weight'] = mean(weight)
            metrics |= {f'{name}/{key}': metric for key, metric in extra.items()}
        return loss, {'loss': mean(loss), **metrics}, new_state

    def __mul__(self, weight: Weight) -> 'Objective':
        """Scales every term by a number, a scalar array or a schedule."""
        if not callable(weight) and not (
            isinstance(weight, (int, float, np.number, np.ndarray, jax.Array)) and np.ndim(weight) == 0
        ):
            return NotImplemented
        return Objective(tuple(term._replace(weights=(*term.weights, weight)) for term in self.terms))

    __rmul__ = __mul__

    def __add__(self, other: 'Objective') -> 'Objective':
        """Adds objectives; a name that is taken gets a number: `hint`, `hint_2`."""
        return Objective(self.terms + other.terms) if isinstance(other, Objective) else NotImplemented

    def __radd__(self, other: Any) -> 'Objective':
        """Lets `sum(...)` begin with its 0."""
        return self if isinstance(other, int) and other == 0 else NotImplemented


def apply_terms(
    terms: Mapping[str, Term], params: Any, state: Any, student: Outputs, teacher: Outputs, batch: Batch, *, step: Any
) -> dict[str, tuple[Average, dict[str, Average], Any]]:
    """What every term gives, by name; of `LinearLogits` those by position a chunk at a time, all in one pass."""
    found: dict[str, Any] = {}
    # Those that have one teacher in common, for one pass.
    for stand_in in dict.fromkeys(term.teacher for term in terms.values()):
        own = {name: term for name, term in terms.items() if term.teacher is stand_in}
        given = teacher if stand_in is None else stand_in(student, teacher, batch)
        found |= _apply_to_teacher(own, params, state, student, given, batch, step=step)
    return found


def _apply_to_teacher(
    terms: Mapping[str, Term], params: Any, state: Any, student: Outputs, teacher: Outputs, batch: Batch, *, step: Any
) -> dict[str, tuple[Average, dict[str, Average], Any]]:
    linear = any(isinstance(outputs.logits, LinearLogits) for outputs in (student, teacher))
    chunked = {name: term for name, term in terms.items() if linear and term.by_position}
    found = {
        name: term.apply(params[name], state[name], student, teacher, batch, step=step)
        for name, term in terms.items()
        if name not in chunked
    }
    if not chunked:
        return found
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(batch)):
        for term in chunked.values():
            if term.check is not None:
                term.check(student, teacher, batch)  # in a loop no value is at hand

    def sums(student: Outputs, teacher: Outputs, batch: Batch) -> Any:
        given = {
            name: term.apply(params[name], state[name], student, teacher, batch, step=step) for name, term in chunked.items()
        }
        return {name: (value, extra) for name, (value, extra, _) in given.items()}

    # What is no mean over positions, such as a scheduled temperature, is the same in every chunk, and so is its mean.
    added = sum_in_chunks(sums, (student, jax.lax.stop_gradient(teacher)), batch)
    for name, (value, extra) in added.items():
        found[name] = value, {key: mean(divide(metric)) for key, metric in extra.items()}, state[name]
    return found


def combine(**objectives: Objective) -> Objective:
    """Adds objectives under names of the caller's choice.

    >>> from kdjax import objectives
    >>> combine(hard=0.1 * objectives.hard_labels(), soft=0.9 * objectives.soft_targets()).names
    ('hard', 'soft')
    """
    terms = []
    for name, objective in objectives.items():
        if not isinstance(objective, Objective):
            raise TypeError(f'combine: {name} must be an Objective, got {type(objective).__name__}')
        inner = [name] if len(objective.terms) == 1 else [f'{name}/{own}' for own in objective.names]
        terms += [term._replace(name=own) for own, term in zip(inner, objective.terms, strict=True)]
    return Objective(tuple(terms))


def with_check(objective: Objective, check: Check) -> Objective:
    """The same objective, which also runs `check(student, teacher, batch)` when its data are checked; see `Objective.check`.

    Args:
      objective: any.
      check: raises a ValueError where the batch, whose values are at hand, holds what the objective cannot mean.

    >>> def check(student, teacher, batch):
    ...     if batch['share'].max() > 1:
    ...         raise ValueError('shares must be at most 1')
    >>> share = from_function('share', lambda student, teacher, batch: batch['share'])
    >>> with_check(share, check).check(Outputs(None), Outputs(None), {'share': np.array([2.0])})
    Traceback (most recent call last):
    ...
    ValueError: shares must be at most 1
    """
    first = objective.terms[0]

    def both(student: Outputs, teacher: Outputs, batch: Batch) -> None:
        if first.check is not None:
            first.check(student, teacher, batch)
        check(student, teacher, batch)

    return Objective((first._replace(check=both), *objective.terms[1:]))


def evaluate(value: Weight, step: Any) -> jax.Array:
    """A number, or a schedule at a step, as a float32 scalar."""
    # optax's schedules promote dtypes implicitly, which would fail for users who forbid that in their own code.
    with jax.numpy_dtype_promotion('standard'):
        return jnp.asarray(value(step) if callable(value) else value, jnp.float32)


def from_function(name: str, function: Callable[..., jax.Array | Average], **hyperparameters: Any) -> Objective:
    """Makes an objective of a function that trains and remembers nothing.

    Args:
      name: the term's name.
      function: `function(student, teacher, batch, **hyperparameters)` of the networks' `Outputs`; returns one value per example
        [batch, ...], of which `batch_mean` takes those that count, by their weights, or a scalar, or an `Average`. No gradient
        flows into the teacher's outputs. Logits are arrays, also those of a `networks.linear_head`: all of them, or a chunk of
        positions at a time with `objectives.by_position`.
      **hyperparameters: handed to the function; one that is callable is a schedule, and the function gets its value at the
        step.

    >>> import jax, jax.numpy as jnp
    >>> from kdjax.networks import Outputs
    >>> objective = from_function('gap', lambda student, teacher, batch: (student.logits - teacher.logits).max(-1))
    >>> student, teacher = Outputs(jnp.array([[1., 5.]])), Outputs(jnp.array([[1., 2.]]))
    >>> params, state = objective.init(jax.random.key(0), student, teacher, {})
    >>> loss, metrics, state = objective.apply(params, state, student, teacher, {}, step=0)
    >>> print(loss)
    3.0
    """

    def without_parameters(params: Any, *arguments: Any, **resolved: Any) -> jax.Array | Average:
        del params
        return function(*arguments, **resolved)

    return with_parameters(name, lambda key, student, teacher, batch: {}, without_parameters, **hyperparameters)


def with_parameters(
    name: str,
    init: Callable[[jax.Array, Outputs, Outputs, Batch], Any],
    function: Callable[..., jax.Array | Average],
    **hyperparameters: Any,
) -> Objective:
    """Makes an objective of a function that has parameters of its own to train, such as a connector's.

    Args:
      name: the term's name.
      init: `init(key, student, teacher, batch) -> params`, of shapes alone (`jax.ShapeDtypeStruct`).
      function: `function(params, student, teacher, batch, **hyperparameters)`, otherwise as in `from_function`.
      **hyperparameters: as in `from_function`.
    """

    def init_term(key: jax.Array, student: Outputs, teacher: Outputs, batch: Batch) -> tuple[Any, Any]:
        return init(key, student, teacher, batch), {}

    def apply(
        params: Any, state: Any, student: Outputs, teacher: Outputs, batch: Batch, *, step: jax.Array
    ) -> tuple[Average, dict[str, Average], Any]:
        scheduled = {key: evaluate(value, step) for key, value in hyperparameters.items() if callable(value)}
        student, teacher = (Outputs(dense_logits(x.logits), x.features) for x in (student, jax.lax.stop_gradient(teacher)))
        values = function(params, student, teacher, batch, **{**hyperparameters, **scheduled})
        value = values if isinstance(values, Average) else batch_mean(values, batch)
        return value, {key: mean(x) for key, x in scheduled.items()}, state

    return Objective((Term(name, init_term, apply),))
