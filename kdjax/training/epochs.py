"""One epoch over a data set that lives on the device."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kdjax.batches import Batch
from kdjax.metrics import Average
from kdjax.networks import Variables
from kdjax.training.augmentation import Augment, Views, augmented, check_augmentation, in_view
from kdjax.training.sharding import check_divisible, distribute
from kdjax.training.step import Problem, TrainState


class Epoch(NamedTuple):
    """One epoch of training, a function: `epoch(state, teacher_variables, data, stop=None, begin=None) -> (state, metrics)`.

    It runs from where the state stands to the end of the epoch; `stop()` is asked after every dispatch, and ends it there if it
    is true. `begin` is the number of steps behind the state, for those who know it: reading it off the state waits for the
    device. The metrics are those of the steps that ran, in order, each leaf with a leading axis of the steps that were
    dispatched together.

    Attributes:
      run: `run(state, teacher_variables, data, stop, begin)`, which is what calling the epoch does.
      batch_size: examples a step.
    """

    run: Callable[..., tuple[TrainState, list[dict[str, Average]]]]
    batch_size: int

    def __call__(
        self,
        state: TrainState,
        teacher_variables: Variables,
        data: Any,
        stop: Callable[[], bool] | None = None,
        begin: int | None = None,
    ) -> tuple[TrainState, list[dict[str, Average]]]:
        """Runs the epoch, or what is left of it."""
        return self.run(state, teacher_variables, data, stop, int(state.step) if begin is None else begin)


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
    the example alone. Examples that do not fill a last batch are left out; others are in the next epoch.

    Args:
      problem: the training problem.
      batch_size: examples a step.
      augment: applied to every example with a key of its own.
      views: augmented views that repeat, in place of `augment`: those that `record_teacher` has recorded.
      mesh: devices to split each batch over; state and teacher must be on it as `shard` lays them out, and stay so, the data
        replicated.
      steps_per_dispatch: steps that run as one `lax.scan`. By default the whole epoch on accelerators and one step on CPUs,
        where XLA runs convolutions inside loops several times slower than outside.

    Returns:
      The function; data is a dictionary of arrays, `'inputs'` and perhaps `'labels'`, [examples, ...].

    Raises:
      ValueError: the batch does not divide over the devices, or, from the function, there are fewer examples than a batch has.
    """
    if batch_size < 1:
        raise ValueError(f'batch_size must be at least 1, got {batch_size}')
    check_augmentation(augment, views)
    if mesh is not None:
        check_divisible(mesh, batch_size)
        problem = distribute(mesh, problem)

    def step(state: TrainState, teacher_variables: Variables, data: Batch, order: jax.Array) -> Any:
        number, position = jnp.divmod(state.step, order.shape[0])
        indices = order[position]
        batch = {name: array[indices] for name, array in data.items()}
        if views is not None:
            batch = in_view(batch, views, number)
        key = stream(state.key, 'augment')
        batch['inputs'] = augmented(batch['inputs'], indices, number, augment=augment, key=key, views=views)
        return problem.step(state, teacher_variables, batch)

    @functools.partial(jax.jit, donate_argnums=0, static_argnums=4)
    def dispatch(state: TrainState, teacher_variables: Variables, data: Batch, order: jax.Array, steps: int) -> Any:
        if steps == 1:
            state, metrics = step(state, teacher_variables, data, order)
            return state, jax.tree.map(lambda x: x[None], metrics)
        return jax.lax.scan(lambda state, _: step(state, teacher_variables, data, order), state, length=steps)

    def run(
        state: TrainState, teacher_variables: Variables, data: Batch, stop: Callable[[], bool] | None, begin: int
    ) -> tuple[TrainState, list[dict[str, Average]]]:
        steps = steps_per_epoch(data, batch_size)
        at_once = steps_per_dispatch or (1 if jax.default_backend() == 'cpu' else steps)
        data = {name: jnp.asarray(array) for name, array in data.items()}
        order = _shuffle(state.key, state.step, data['inputs'].shape[0], batch_size)
        metrics = []
        for start in range(begin % steps, steps, at_once):
            state, some = dispatch(state, teacher_variables, data, order, min(at_once, steps - start))
            metrics.append(some)
            if stop is not None and stop():
                break
        return state, metrics

    return Epoch(run, batch_size)


def count_examples(data: Any) -> int:
    """Number of examples of a data set: a dictionary of arrays, or a sequence of examples.

    >>> import numpy as np
    >>> count_examples({'inputs': np.zeros((5, 2))}), count_examples([{'inputs': 1.0}] * 3)
    (5, 3)
    """
    return data['inputs'].shape[0] if isinstance(data, dict) else len(data)


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
