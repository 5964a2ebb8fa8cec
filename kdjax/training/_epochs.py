"""One epoch over a data set that lives on the device."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kdjax.batches import Batch, check_batch, count_examples, take_examples
from kdjax.metrics import Average
from kdjax.networks import Variables
from kdjax.parallel import check_divisible, distribute
from kdjax.problems import Problem, TrainState
from kdjax.training._augmentation import Augment, Views, augmented, check_augmentation, check_recorded, in_view

Stop = Callable[[], bool]


class Run(Protocol):
    """What calling an `Epoch` does."""

    def __call__(
        self,
        state: TrainState,
        teacher_variables: Variables | None,
        data: Any,
        stop: Stop | None,
        begin: int,
        limit: int | None,
    ) -> tuple[TrainState, list[dict[str, Average]]]:
        """Runs from step `begin` on, `limit` steps at most, and not beyond the end of the epoch."""
        ...


class Epoch(NamedTuple):
    """One epoch of training: `epoch(state, teacher_variables, data, stop=None, begin=None, limit=None) -> (state, metrics)`.

    It runs from where the state stands to the end of the epoch, or for `limit` steps; `stop()` is asked after every dispatch,
    and ends it there if it is true. `begin` is the number of steps behind the state, for those who know it: reading it off the
    state waits for the device. The metrics are those of the steps that ran, in order, each leaf with a leading axis of the
    steps that were dispatched together.

    Attributes:
      run: what calling the epoch does.
      batch_size: examples a step; None where the data come in batches.
    """

    run: Run
    batch_size: int | None

    def __call__(
        self,
        state: TrainState,
        teacher_variables: Variables | None,
        data: Any,
        stop: Stop | None = None,
        begin: int | None = None,
        limit: int | None = None,
    ) -> tuple[TrainState, list[dict[str, Average]]]:
        """Runs the epoch, or what is left of it."""
        return self.run(state, teacher_variables, data, stop, int(state.step) if begin is None else begin, limit)


def in_memory_epoch(
    problem: Problem,
    *,
    batch_size: int,
    augment: Augment | None = None,
    views: Views | None = None,
    mesh: Mesh | None = None,
    steps_per_dispatch: int | None = None,
) -> Epoch:
    """Makes a function that runs one epoch: shuffle, gather, augment and step, all on the device.

    The order of the examples and their augmentation are functions of the run's key, the number of the epoch and the index of
    the example alone. Examples that do not fill a last batch are left out; others are in the next epoch. What is compiled is
    kept with the problem, so epochs that are made again with the same arguments do not compile again.

    Args:
      problem: the training problem.
      batch_size: examples a step, over all devices.
      augment: applied to every example's inputs with a key of its own.
      views: augmented views that repeat, in place of `augment`: those that `record_teacher` has recorded.
      mesh: devices to split each batch over; state and teacher must be on it as `shard` lays them out, and stay so, the data
        replicated.
      steps_per_dispatch: steps that run as one `lax.scan`. By default the whole epoch on accelerators and one step on CPUs,
        where XLA runs convolutions inside loops several times slower than outside.

    Returns:
      The function; data is a dictionary of pytrees of arrays, `'inputs'` and perhaps `'labels'`, [examples, ...].

    Raises:
      ValueError: the batch does not divide over the devices, or, from the function, data are not such a dictionary, or there
        are fewer examples than a batch has.
    """
    if batch_size < 1:
        raise ValueError(f'batch_size must be at least 1, got {batch_size}')
    check_augmentation(augment, views)
    if mesh is not None:
        check_divisible(mesh, batch_size)
    fixed = None if views is None else (views.augment, views.number)
    dispatch = cached(_dispatcher, problem, augment, fixed, mesh)
    views_key = None if views is None else views.key

    def run(
        state: TrainState, teacher_variables: Variables | None, data: Batch, stop: Stop | None, begin: int, limit: int | None
    ) -> tuple[TrainState, list[dict[str, Average]]]:
        check_in_memory(data)
        check_recorded(data, augment, views)
        steps = steps_per_epoch(data, batch_size)
        end = steps if limit is None else min(steps, begin % steps + limit)
        at_once = steps_per_dispatch or (1 if jax.default_backend() == 'cpu' else steps)
        data = jax.tree.map(jnp.asarray, data)
        order = _shuffle(state.key, state.step, count_examples(data), batch_size)
        metrics = []
        for start in range(begin % steps, end, at_once):
            state, some = dispatch(state, teacher_variables, data, order, views_key, min(at_once, end - start))
            metrics.append(some)
            if stop is not None and stop():
                break
        return state, metrics

    return Epoch(run, batch_size)


def cached(make: Any, *arguments: Any) -> Any:
    """`make(*arguments)` of an `lru_cache`, or made anew where an argument, such as somebody's callable, has no hash."""
    try:
        return make(*arguments)
    except TypeError:
        return make.__wrapped__(*arguments)


@functools.lru_cache(maxsize=32)
def _dispatcher(problem: Problem, augment: Augment | None, fixed: tuple[Augment, int] | None, mesh: Mesh | None) -> Any:
    """The jitted function that runs several steps; cached, so that a problem is compiled once for all its runs."""
    if mesh is not None:
        problem = distribute(mesh, problem)

    def step(state: TrainState, teacher_variables: Any, data: Batch, order: jax.Array, views_key: Any) -> Any:
        number, position = jnp.divmod(state.step, order.shape[0])
        indices = order[position]
        batch = take_examples(data, indices)
        views = None if fixed is None else Views(fixed[0], views_key, fixed[1])
        if views is not None:
            batch = in_view(batch, views, number)
        key = stream(state.key, 'augment')
        batch['inputs'] = augmented(batch['inputs'], indices, number, augment=augment, key=key, views=views)
        return problem.step(state, teacher_variables, batch)

    @functools.partial(jax.jit, donate_argnums=0, static_argnums=5)
    def dispatch(
        state: TrainState, teacher_variables: Any, data: Batch, order: jax.Array, views_key: jax.Array | None, steps: int
    ) -> Any:
        if steps == 1:
            state, metrics = step(state, teacher_variables, data, order, views_key)
            return state, jax.tree.map(lambda x: x[None], metrics)
        return jax.lax.scan(lambda state, _: step(state, teacher_variables, data, order, views_key), state, length=steps)

    return dispatch


def check_in_memory(data: Any) -> None:
    """Raises unless the data are a dictionary of arrays, and says what else takes what they are."""
    if isinstance(data, dict):
        check_batch(data)
        return
    if isinstance(data, tuple) and hasattr(data, 'train'):
        raise ValueError(f'the data are a {type(data).__name__} of several splits: pass one of them, such as its .train')
    if isinstance(data, (tuple, list)) and len(data) == 2 and all(hasattr(x, 'shape') for x in data):
        raise ValueError("the data are a pair of arrays: pass {'inputs': x, 'labels': y}")
    shape = getattr(data, 'shape', None)
    if shape is not None:
        raise ValueError(f"the data are one array {tuple(shape)}: pass {{'inputs': array}}, with 'labels' where there are")
    raise ValueError(
        f"data in memory are a dictionary of arrays with 'inputs', got {type(data).__name__}: training.fit and "
        'training.streaming_epoch take sources that are read example by example, and training.fit loaders of batches'
    )


def steps_per_epoch(data: Any, batch_size: int) -> int:
    """Number of whole batches in a data set.

    Raises:
      ValueError: there is none.
    """
    examples = count_examples(data)
    if examples < batch_size:
        raise ValueError(f'the training split has {examples} examples, fewer than one batch of {batch_size}')
    return examples // batch_size


# Outside of `in_memory_epoch`, so that all runs of a process share what it compiles to.
@functools.partial(jax.jit, static_argnums=(2, 3))
def _shuffle(key: jax.Array, step: jax.Array, examples: int, batch_size: int) -> jax.Array:
    steps = examples // batch_size
    key = jax.random.fold_in(stream(key, 'shuffle'), step // steps)
    return jax.random.permutation(key, examples)[: steps * batch_size].reshape(steps, batch_size)


def stream(key: jax.Array, use: str) -> jax.Array:
    """The key of a run's order, or of its augmentation."""
    # Steps fold their number into the run's key; these streams must not meet theirs, so they fold in numbers above any step's.
    return jax.random.fold_in(key, {'shuffle': 2**32 - 1, 'augment': 2**32 - 2}[use])
