"""Where arrays live: data parallelism and fully sharded data parallelism (FSDP) over all devices of all hosts.

    mesh = data_parallel(fsdp=8)
    state, teacher_variables = shard(mesh, (state, teacher_variables))
    run = in_memory_epoch(problem, batch_size=256, mesh=mesh)

The mesh says it all: `fsdp` devices share one copy of every large array of student, teacher and optimizer, and every device
gets its own share of each batch. Steps outside `in_memory_epoch` are those of `distribute(mesh, problem)`:

    problem = distribute(mesh, problem)
    state, metrics = problem.step(state, teacher_variables, shard_batch(mesh, batch))

This replaces `jax.pmap`. There, every array had a leading axis of devices, the function saw one device's share, and means
over the batch had to be written as `psum`. Here arrays keep their shapes, the function sees the whole batch, and `jit`
splits the work: batch statistics and losses that relate examples to each other come out as on one device.

Any mesh with an axis `'data'` or `'fsdp'` will do. One with Explicit axes, as `jax.make_mesh` makes them, stands for the same
one with Auto axes: a step is to look the same on one device and on many, and the layout is XLA's to choose.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kdjax.batches import Batch
from kdjax.metrics import Average
from kdjax.networks import Variables
from kdjax.problems import Problem, TrainState

SMALLEST_SPLIT = 2**14
"""Elements from which on an array is split: below, gathering it would cost more time than its bytes are worth."""


def shardings(mesh: Mesh, tree: Any) -> Any:
    """How a state or variables are laid out on a mesh, from shapes alone.

    An array of at least `SMALLEST_SPLIT` elements is split over `'fsdp'` along the longest axis that divides evenly, the first
    such axis if several are equally long; others are replicated. Moments of the optimizer, masks and averages have the shapes
    of the parameters, and so their layout.

    Args:
      mesh: a mesh, see `data_parallel`.
      tree: arrays, or what `jax.eval_shape` gives.

    Returns:
      The tree with a `NamedSharding` for each array.

    >>> from kdjax.parallel import data_parallel
    >>> mesh = data_parallel(jax.devices()[:8], fsdp=8)
    >>> [tuple(sharding.spec) for sharding in shardings(mesh, [np.zeros((3, 256, 512)), np.zeros(512)])]
    [(None, None, 'fsdp'), ()]
    """
    mesh, parts = _automatic(mesh), mesh.shape.get('fsdp', 1)

    def layout(leaf: Any) -> NamedSharding:
        shape = np.shape(leaf)
        axes = [axis for axis, length in enumerate(shape) if length % parts == 0]
        if parts == 1 or not axes or math.prod(shape) < SMALLEST_SPLIT:
            return NamedSharding(mesh, PartitionSpec())
        longest = max(axes, key=lambda axis: shape[axis])
        return NamedSharding(mesh, PartitionSpec(*(None,) * longest, 'fsdp'))

    return jax.tree.map(layout, tree)


def shard(mesh: Mesh, tree: Any) -> Any:
    """Puts a state or a teacher's variables on the mesh, laid out as `shardings` says; every host must have the same values."""
    return jax.tree.map(_put, tree, shardings(mesh, tree))


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Copies a tree to every device of the mesh; every host must have the same values.

    What `shard` has split over several hosts is whole again on each, so that `jax.device_get` can fetch it.
    """
    return jax.tree.map(lambda leaf: _put(leaf, _replicated(mesh)), tree)


def shard_batch(mesh: Mesh, batch: Batch) -> Batch:
    """Splits a batch over the devices along its first axis; every host must have the whole batch.

    Raises:
      ValueError: the number of examples does not divide by that of devices.
    """
    check_divisible(mesh, next(iter(jax.tree.leaves(batch))).shape[0])
    return jax.tree.map(lambda leaf: _put(leaf, batch_sharding(mesh)), batch)


def batch_from_hosts(mesh: Mesh, share: Batch) -> Batch:
    """Makes the batch of all hosts, of which each has loaded an equal share of its own; on one host the same as `shard_batch`.

    Raises:
      ValueError: the examples of all hosts together do not divide by the number of devices.
    """
    check_divisible(mesh, next(iter(jax.tree.leaves(share))).shape[0] * jax.process_count())
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(batch_sharding(mesh), np.asarray(leaf)), share)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """How a batch is laid out: split over all devices along its first axis."""
    return NamedSharding(_automatic(mesh), PartitionSpec(_batch_axes(mesh)))


def check_divisible(mesh: Mesh, batch_size: int) -> None:
    """Raises if a batch cannot be split evenly over the devices of the mesh."""
    devices = math.prod(mesh.shape[axis] for axis in _batch_axes(mesh))
    if batch_size % devices:
        below = batch_size // devices * devices
        choice = f'{below} or {below + devices}' if below else str(devices)
        raise ValueError(f'a batch of {batch_size} does not divide over {devices} devices: use {choice}')


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh of several devices on which the arrays of a tree live, None if there is none."""
    found = (getattr(leaf, 'sharding', None) for leaf in jax.tree.leaves(tree))
    meshes = (each.mesh for each in found if isinstance(each, NamedSharding))
    return next((_automatic(mesh) for mesh in meshes if isinstance(mesh, Mesh) and mesh.size > 1), None)


def distribute(mesh: Mesh, problem: Problem) -> Problem:
    """The same training problem with its state on a mesh.

    A jitted step cannot see how its arguments are laid out, and XLA may lay out the new state as it likes: the next call would
    compile again. Here every step splits its batch and hands the state back as `shardings` has it, so one program serves all.
    `init` makes the state on one device and places it.

    >>> from kdjax.parallel import data_parallel
    >>> import flax.linen as nn, jax.numpy as jnp, optax
    >>> from kdjax import networks, objectives, training
    >>> mesh = data_parallel(jax.devices()[:8], fsdp=8)
    >>> network = networks.from_linen(nn.Dense(256))
    >>> problem = distribute(mesh, training.distillation(network, network, objectives.soft_targets(), optax.adam(0.1)))
    >>> batch = shard_batch(mesh, {'inputs': jnp.ones((8, 64))})
    >>> state = problem.init(jax.random.key(0), batch)
    >>> teacher_variables = shard(mesh, network.init(jax.random.key(1), batch['inputs']))
    >>> state, _ = problem.step(state, teacher_variables, batch)
    >>> state.params['kernel'].shape, state.params['kernel'].addressable_shards[0].data.shape
    ((64, 256), (64, 32))
    """

    def init(key: jax.Array, batch: Batch, *, student_variables: Variables | None = None) -> TrainState:
        return shard(mesh, problem.init(key, batch, student_variables=student_variables))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, teacher_variables: Variables, batch: Batch) -> tuple[TrainState, dict[str, Average]]:
        batch = jax.lax.with_sharding_constraint(batch, batch_sharding(mesh))
        state, metrics = problem.step(state, teacher_variables, batch)
        # Metrics that every device has can be read on every host.
        metrics = jax.lax.with_sharding_constraint(metrics, _replicated(mesh))
        return jax.lax.with_sharding_constraint(state, shardings(mesh, state)), metrics

    return problem._replace(init=init, step=step)


def _automatic(mesh: Mesh) -> Mesh:
    """The same mesh with Auto axes, on which arrays have types without shardings, as a step written for one device expects."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def _replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(_automatic(mesh), PartitionSpec())


def _batch_axes(mesh: Mesh) -> tuple[str, ...]:
    return tuple(axis for axis in ('data', 'fsdp') if axis in mesh.axis_names)


def _put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """`jax.device_put`, for meshes of several hosts too, where each fills its own devices."""
    if hasattr(leaf, '__array__') and not isinstance(leaf, (np.ndarray, np.generic, jax.Array)):
        leaf = np.asarray(leaf)  # such as what is read where it is indexed
    if sharding.is_fully_addressable or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
        return jax.device_put(leaf, sharding)
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_put(jax.random.key_data(leaf), sharding), impl=jax.random.key_impl(leaf))
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
