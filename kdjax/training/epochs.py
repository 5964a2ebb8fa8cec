"""One epoch over a data set that lives on the device."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kdjax.batches import Batch
from kdjax.metrics import Mean
from kdjax.networks import Variables
from kdjax.training.sharding import check_divisible
from kdjax.training.step import Distillation, TrainState

Epoch = Callable[[TrainState, Variables, Batch], tuple[TrainState, list[dict[str, Mean]]]]
"""`epoch(state, teacher_variables, data) -> (state, metrics)`: the metrics of its steps, in order, each leaf with a leading
axis of the steps that were dispatched together."""

Augment = Callable[[jax.Array, Any], Any]
"""`augment(key, input) -> input`, a pure function of a key and one example."""


def epoch(
    distillation: Distillation,
    *,
    batch_size: int,
    augment: Augment | None = None,
    mesh: Mesh | None = None,
    steps_per_dispatch: int | None = None,
) -> Epoch:
    """Makes a function that runs one epoch: shuffle, gather, augment and step, all on the device.

    The order of the examples and their augmentation are functions of the run's key, the number of the epoch and the index of
    the example alone. Examples that do not fill a last batch are left out; others are in the next epoch.

    Args:
      distillation: the training problem.
      batch_size: examples a step.
      augment: applied to every example with a key of its own.
      mesh: devices to split each batch over; state, teacher and data must be replicated on it.
      steps_per_dispatch: steps that run as one `lax.scan`. By default the whole epoch on accelerators and one step on CPUs,
        where XLA runs convolutions inside loops several times slower than outside.

    Returns:
      The function; data is a dictionary of arrays, `'inputs'` and perhaps `'labels'`, [examples, ...]. The state must stand
      at the start of an epoch.

    Raises:
      ValueError: the batch does not divide over the devices, or, from the function, there are fewer examples than a batch has,
        or the state stands within an epoch.
    """
    if batch_size < 1:
        raise ValueError(f'batch_size must be at least 1, got {batch_size}')
    if mesh is not None:
        check_divisible(mesh, batch_size)

    def step(state: TrainState, teacher_variables: Variables, data: Batch, order: jax.Array) -> Any:
        number, position = jnp.divmod(state.step, order.shape[0])
        indices = order[position]
        batch = {name: array[indices] for name, array in data.items()}
        if augment is not None:
            key = jax.random.fold_in(_stream(state.key, 'augment'), number)
            keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(indices)
            batch['inputs'] = jax.vmap(augment)(keys, batch['inputs'])
        if mesh is not None:
            batch = jax.lax.with_sharding_constraint(batch, NamedSharding(mesh, PartitionSpec('data')))
        return distillation.step(state, teacher_variables, batch)

    @functools.partial(jax.jit, donate_argnums=0, static_argnums=4)
    def dispatch(state: TrainState, teacher_variables: Variables, data: Batch, order: jax.Array, steps: int) -> Any:
        if steps == 1:
            state, metrics = step(state, teacher_variables, data, order)
            return state, jax.tree.map(lambda x: x[None], metrics)
        return jax.lax.scan(lambda state, _: step(state, teacher_variables, data, order), state, length=steps)

    def run(state: TrainState, teacher_variables: Variables, data: Batch) -> tuple[TrainState, list[dict[str, Mean]]]:
        steps = steps_per_epoch(data, batch_size)
        at_once = steps_per_dispatch or (1 if jax.default_backend() == 'cpu' else steps)
        # Asked only where the answer is there, as after a checkpoint was restored: waiting for it would hold the device up.
        if state.step.is_ready() and int(state.step) % steps:
            raise ValueError(
                f'the state stands at step {int(state.step)}, within an epoch of {steps} steps: '
                'it comes from a run with batches or data of another size'
            )
        data = {name: jnp.asarray(array) for name, array in data.items()}
        order = _shuffle(state.key, state.step, data['inputs'].shape[0], batch_size)
        metrics = []
        for start in range(0, steps, at_once):
            state, some = dispatch(state, teacher_variables, data, order, min(at_once, steps - start))
            metrics.append(some)
        return state, metrics

    return run


def steps_per_epoch(data: Batch, batch_size: int) -> int:
    """Number of whole batches in a data set.

    Raises:
      ValueError: there is none.
    """
    examples = data['inputs'].shape[0]
    if examples < batch_size:
        raise ValueError(f'the training split has {examples} examples, fewer than one batch of {batch_size}')
    return examples // batch_size


# Outside of `epoch`, so that all runs of a process share what it compiles to.
@functools.partial(jax.jit, static_argnums=(2, 3))
def _shuffle(key: jax.Array, step: jax.Array, examples: int, batch_size: int) -> jax.Array:
    steps = examples // batch_size
    key = jax.random.fold_in(_stream(key, 'shuffle'), step // steps)
    return jax.random.permutation(key, examples)[: steps * batch_size].reshape(steps, batch_size)


def _stream(key: jax.Array, use: str) -> jax.Array:
    # Steps fold their number into the run's key; these streams must not meet theirs, so they fold in numbers above any step's.
    return jax.random.fold_in(key, {'shuffle': 2**32 - 1, 'augment': 2**32 - 2}[use])
