"""Layers that go from one network's variables to another's."""

from typing import Any

from kdjax.networks._network import Variables
from kdjax.paths import Leaves, leaves_with_paths, map_with_paths, picks, select


def copy_layers(source: Variables, target: Variables, layers: Leaves) -> dict[str, Any]:
    """The target's variables, with some of its layers taken from the source.

    Args:
      source: variables to take from.
      target: variables to put into; they stay as they are.
      layers: which of the source's parameters, as patterns over their paths, such as `'stage1/*'`, or a predicate of path and
        array; what it picks of the state comes along, such as the statistics of batch norms in `'stage1'`.

    Returns:
      The variables.

    Raises:
      ValueError: a pattern matches none of the source's parameters, or the target has no array of that path and shape.

    >>> import jax.numpy as jnp
    >>> source = {'params': {'hidden': jnp.ones(2), 'head': jnp.ones(3)}}
    >>> target = {'params': {'hidden': jnp.zeros(2), 'head': jnp.zeros(4)}}
    >>> print(copy_layers(source, target, 'hidden')['params']['hidden'])
    [1. 1.]
    """
    select(layers, source['params'])
    copied = dict(target)
    for name, collection in source.items():
        chosen = {path: leaf for path, leaf in leaves_with_paths(collection).items() if picks(layers, path, leaf)}
        own = leaves_with_paths(target.get(name, {}))
        for path, leaf in chosen.items():
            if path not in own or own[path].shape != leaf.shape:
                found = f'has {own[path].shape} there' if path in own else 'has no such array'
                raise ValueError(f'copy_layers: {name}/{path} {leaf.shape} does not fit the target, which {found}')
        if chosen:
            copied[name] = map_with_paths(lambda path, leaf, chosen=chosen: chosen.get(path, leaf), target[name])
    return copied
