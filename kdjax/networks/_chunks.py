"""Functions of logits computed a chunk of positions at a time, so that those of all positions are never in memory."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kdjax.batches import Batch, counts
from kdjax.meshes import varying_alike
from kdjax.networks._linear_logits import LinearLogits, chunk_logits
from kdjax.networks._network import Outputs


def sum_in_chunks(function: Callable[..., Any], outputs: Sequence[Outputs], batch: Batch) -> Any:
    """`function(*outputs, batch)`, a pytree of sums over positions, where logits may be `LinearLogits`.

    The function gets arrays for logits, of `chunk` positions [positions, classes], no features, and what the batch says of
    these positions: entries [batch, ..., more] as [positions, more], and those of fewer axes once for each position. What does
    not count has hidden states of 0. Each chunk is computed again for its gradient. Without `LinearLogits` among the outputs
    and the entries of the batch it is the plain call.

    Of arrays on a mesh whose axes are Auto, every device computes the chunks of its own positions: it has the whole kernel, of
    which the gradient is summed over the devices once, at the end.

    Args:
      function: returns sums: whose values for two halves of the positions add up, leaf by leaf, to that for all. Its values see
        nothing of an example but its position.
      outputs: what networks give for the batch.
      batch: the batch.

    Raises:
      ValueError: from the function, which is traced with the shapes of the whole batch first.

    >>> from kdjax.networks import LinearLogits
    >>> outputs = Outputs(LinearLogits(jnp.ones((2, 3, 4)), jnp.ones((4, 5)), chunk=2))
    >>> print(sum_in_chunks(lambda outputs, batch: outputs.logits.sum(), [outputs], {}))
    120.0
    """
    linear = [x for x in (*(own.logits for own in outputs), *batch.values()) if isinstance(x, LinearLogits)]
    if not linear:
        return function(*outputs, batch)
    positions = linear[0].shape[:-1]
    shapes = _shapes_of_sums(function, outputs, batch)
    where = counts(batch, positions)
    entries = {name: each for name, x in batch.items() if (each := _cut(x, positions, where)) is not None}
    # Padding, and the mask that says so, where the last chunk is not full.
    entries.setdefault('mask', jnp.ones(math.prod(positions), jnp.bool_))
    logits = [_cut(own.logits, positions, where) for own in outputs]

    def own_sums(tree: Any) -> Any:
        logits, entries = tree
        return function(*map(Outputs, logits), entries)

    return _run(own_sums, (logits, entries), min(x.chunk for x in linear), shapes=shapes, mesh=_mesh_of((outputs, batch)))


def map_in_chunks(function: Callable[[jax.Array], Any], logits: Any) -> Any:
    """`function(logits)`, a pytree of arrays with one value or more for each position, where logits may be `LinearLogits`.

    Args:
      function: from logits [positions, classes] to arrays [positions, ...]; of an array of logits it is called with all of it.
      logits: [batch, ..., classes].

    >>> from kdjax.networks import LinearLogits
    >>> logits = LinearLogits(jnp.ones((2, 3, 4)), jnp.ones((4, 5)), chunk=2)
    >>> map_in_chunks(lambda logits: logits.max(-1), logits).shape
    (2, 3)
    """
    if not isinstance(logits, LinearLogits):
        return function(logits)
    positions = logits.shape[:-1]
    values = _run(function, _cut(logits, positions, None), logits.chunk, shapes=None, mesh=_mesh_of(logits))
    return jax.tree.map(lambda x: x.reshape(*positions, *x.shape[1:]), values)


def _shapes_of_sums(function: Callable[..., Any], outputs: Sequence[Outputs], batch: Batch) -> Any:
    """The shapes of the sums. What does not fit, the function says here, in terms of the whole batch and not of a chunk."""
    whole = [None if own.logits is None else jax.ShapeDtypeStruct(own.logits.shape, own.logits.dtype) for own in outputs]
    entries = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, LinearLogits) else x for name, x in batch.items()}
    arrays = {name: x for name, x in entries.items() if _is_array(x)}
    return jax.eval_shape(lambda logits, arrays: function(*map(Outputs, logits), {**entries, **arrays}), whole, arrays)


def _is_array(x: Any) -> bool:
    dtype = getattr(x, 'dtype', None)
    return dtype is not None and (jnp.issubdtype(dtype, jnp.number) or dtype == jnp.bool_)


def _cut(x: Any, positions: tuple[int, ...], where: jax.Array | None) -> Any:
    """Logits or an entry of a batch as [all positions, ...]; None for what says nothing of positions."""
    if isinstance(x, LinearLogits):
        hidden = x.hidden
        if where is not None:
            # A product with what is not finite would make the gradient of the kernel NaN, though its factor is zero.
            hidden = jnp.where(where.reshape(*where.shape, *(1,) * (hidden.ndim - where.ndim)), hidden, jnp.zeros_like(hidden))
        return dataclasses.replace(x, hidden=hidden.reshape(-1, hidden.shape[-1]))
    if not _is_array(x):
        return None
    shape = np.shape(x)
    if shape[: len(positions)] == positions:
        return jnp.reshape(x, (math.prod(positions), *shape[len(positions) :]))
    if shape and shape == positions[: len(shape)]:
        spread = jnp.reshape(x, (*shape, *(1,) * (len(positions) - len(shape))))
        return jnp.broadcast_to(spread, positions).reshape(-1)
    return None


def _run(function: Callable[[Any], Any], tree: Any, chunk: int, *, shapes: Any, mesh: Any) -> Any:
    """A function of arrays [positions, ...] and `LinearLogits`, in chunks on each device; sums of these shapes, or joined."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=lambda x: isinstance(x, LinearLogits))
    rows = [x.hidden if isinstance(x, LinearLogits) else x for x in leaves]
    total = len(rows[0])
    # Whole in every chunk: kernels and biases. In float32, in which their gradients are then added up over the chunks.
    factors = [(x.kernel, x.bias) if isinstance(x, LinearLogits) else None for x in leaves]
    dtypes = [x.kernel.dtype if isinstance(x, LinearLogits) else None for x in leaves]
    factors = jax.tree.map(lambda x: x.astype(jnp.float32), factors)

    def of_chunk(factors: Any, rows: Any) -> Any:
        filled = [
            x if pair is None else chunk_logits(dataclasses.replace(leaf, hidden=x, kernel=pair[0], bias=pair[1]), dtype)
            for leaf, pair, x, dtype in zip(leaves, factors, rows, dtypes, strict=True)
        ]
        return function(jax.tree.unflatten(structure, filled))

    axes = _batch_axes(mesh)
    joined = shapes is None
    if mesh is None or not axes:
        return _loop(of_chunk, factors, rows, chunk, shapes)

    def local(factors: Any, rows: Any) -> Any:
        values = _loop(of_chunk, factors, rows, chunk, shapes)
        return values if joined else jax.lax.psum(values, axes)

    split = PartitionSpec(axes)
    rows = _padded(rows, -total % math.prod(mesh.shape[axis] for axis in axes))
    on_devices = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(PartitionSpec(), split),
        out_specs=split if joined else PartitionSpec(),
        axis_names=frozenset(axes),
    )
    values = jax.jit(on_devices)(factors, rows)
    return jax.tree.map(lambda x: x[:total], values) if joined else values


def _mesh_of(tree: Any) -> Any:
    """The mesh that the arrays of a tree are on, as their values or, where they are traced, their types say; None without."""
    for x in jax.tree.leaves(tree):
        if isinstance(x, jax.Array):
            # An array that a program holds as a constant has devices, and the program none before it is compiled.
            sharding = jax.typeof(x).sharding if isinstance(x, jax.core.Tracer) else x.sharding
            if isinstance(sharding, NamedSharding) and sharding.mesh.axis_names:
                return sharding.mesh
    return None


def _batch_axes(mesh: Any) -> tuple[str, ...]:
    """The axes of a mesh over which XLA may split positions as it likes: those of `kdjax.parallel`, else all."""
    if mesh is None:
        return ()
    free = tuple(name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto)
    ours = tuple(name for name in ('data', 'fsdp') if name in free)
    return tuple(name for name in ours or free if mesh.shape[name] > 1)


def _padded(rows: Any, number: int) -> Any:
    """Arrays with so many rows of zeros more, which are no position to a mask."""
    return jax.tree.map(lambda x: jnp.pad(x, ((0, number), *((0, 0),) * (x.ndim - 1))), rows) if number else rows


def _loop(function: Callable[..., Any], factors: Any, rows: Any, chunk: int, shapes: Any) -> Any:
    """`function(factors, rows)` for so many rows at a time; the gradient computes every chunk again."""
    # Alike before the loop: what all devices have gets a gradient that is summed over them after it, not in every turn.
    factors, rows = varying_alike((factors, rows))
    total = len(rows[0])
    blocks = max(1, -(-total // chunk))
    size = -(-total // blocks)
    # Every blocks-th row: a chunk of neighbours would lie on a few devices, where the rows are split and no one has said so.
    cut = [x.reshape(size, blocks, *x.shape[1:]).swapaxes(0, 1) for x in _padded(rows, blocks * size - total)]

    def rejoined(x: jax.Array) -> jax.Array:
        return x.reshape(blocks * size, *x.shape[2:])[:total]

    if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((factors, cut))):
        # Outside of `jit`, where the function can see the values, say which of them are wrong, and nothing need be compiled.
        values = [function(factors, [x[i] for x in cut]) for i in range(blocks)]
        return jax.tree.map(
            lambda *x: rejoined(jnp.stack(x, axis=1)) if shapes is None else functools.reduce(jnp.add, x), *values
        )
    once = functools.partial(jax.checkpoint, prevent_cse=False)(function)  # in a loop there is nothing to prevent
    if shapes is None:
        values = jax.lax.map(lambda part: once(factors, part), cut)
        return jax.tree.map(lambda x: rejoined(x.swapaxes(0, 1)), values)
    zeros, _ = varying_alike((jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), rows))

    def add(sums: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, once(factors, part)), None

    return jax.lax.scan(add, zeros, cut)[0]
