"""Functions on meshes with Explicit axes, `jax.make_mesh`'s default, where the type of an array says how it is sharded.

There JAX asks how to shard a result wherever more than one layout would do: a product of two arrays that are split over one
mesh axis, a gather, a reshape, `lax.map`. Losses, objectives and metrics have no opinion, and leave it to XLA, as on meshes
with Auto axes.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
from jax.sharding import NamedSharding, PartitionSpec

Function = TypeVar('Function', bound=Callable[..., Any])


def on_any_mesh(function: Function) -> Function:
    """The same function, but that Explicit axes of its arguments' mesh are Auto while it runs.

    Values and gradients are those without a mesh, up to rounding. A result is split along its first axis as is the first
    argument with a first axis of that length, and along no other. Without Explicit axes, and inside `shard_map`, where all axes
    are Manual, nothing is done.
    """

    @functools.wraps(function)
    def on_mesh(*args: Any, **kwargs: Any) -> Any:
        leaves, structure = jax.tree.flatten((args, kwargs))
        split = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array) and _mesh(leaf).explicit_axes}
        if not split:
            return function(*args, **kwargs)
        mesh = _mesh(next(iter(split.values())))

        def call(split: dict[int, jax.Array]) -> Any:
            args, kwargs = jax.tree.unflatten(structure, [split.get(i, leaf) for i, leaf in enumerate(leaves)])
            return function(*args, **kwargs)

        def layout(result: jax.ShapeDtypeStruct) -> NamedSharding:
            alike = (jax.typeof(x).sharding.spec[:1] for x in split.values() if x.shape[:1] == result.shape[:1] != ())
            return NamedSharding(mesh, PartitionSpec(*next(alike, ())))

        results = jax.eval_shape(call, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), split))
        return jax.sharding.auto_axes(call, axes=mesh.explicit_axes, out_sharding=jax.tree.map(layout, results))(split)

    return cast(Function, on_mesh)


def varying_alike(arrays: Any) -> Any:
    """The same tree of arrays, all varying over the axes of `shard_map` over which any of them does.

    `jax.custom_vjp` and loops want types that agree, and this makes them: gradients of what was the same on all devices are
    summed over them, as those of JAX's own functions are.
    """
    varying = [jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(arrays)]
    union = frozenset().union(*varying)
    leaves, structure = jax.tree.flatten(arrays)
    cast = [jax.lax.pcast(x, tuple(sorted(union - own)), to='varying') for x, own in zip(leaves, varying, strict=True)]
    return jax.tree.unflatten(structure, cast)


def _mesh(x: jax.Array) -> jax.sharding.AbstractMesh:
    return jax.typeof(x).sharding.mesh
