"""Layers that go from one network's variables to another's."""

import fnmatch
from typing import Any

import jax

from kdjax.networks.network import Variables
from kdjax.paths import Leaves, leaves_with_paths, map_with_paths, select


def copy_layers(source: Variables, target: Variables, layers: Leaves) -> dict[str, Any]:
    """The target's variables, with some of its layers taken from the source.

    Args:
      source: variables to take from.
      target: variables to put into; they stay as they are.
      layers: which of the source's parameters, as patterns over their paths or a predicate of path and array, `'stage1/*'` say;
        what it picks of the state comes along, such as the statistics of batch norms in `'stage1'`.

    Returns:
      The variables.

    Raises:
      ValueError: a pattern matches none of the source's parameters, or the target has no array of that path and shape.

    >>> source = {'params': {'hidden': jax.numpy.ones(2), 'head': jax.numpy.ones(3)}}
    >>> target = {'params': {'hidden': jax.numpy.zeros(2), 'head': jax.numpy.zeros(4)}}
    >>> print(copy_layers(source, target, 'hidden')['params']['hidden'])
    [1. 1.]
    """
    select(layers, source['params'])

    def picks(path: str, leaf: jax.Array) -> bool:
        if callable(layers):
            return layers(path, leaf)
        return any(fnmatch.fnmatchcase(path, pattern) for pattern in ([layers] if isinstance(layers, str) else layers))

    copied = dict(target)
    for name, collection in source.items():
        chosen = {path: leaf for path, leaf in leaves_with_paths(collection).items() if picks(path, leaf)}
        own = leaves_with_paths(target.get(name, {}))
        for path, leaf in chosen.items():
            if path not in own or own[path].shape != leaf.shape:
                found = f'has {own[path].shape} there' if path in own else 'has no such array'
                raise ValueError(f'copy_layers: {name}/{path} {leaf.shape} does not fit the target, which {found}')
        if chosen:
            copied[name] = map_with_paths(lambda path, leaf, chosen=chosen: chosen.get(path, leaf), target[name])
    return copied
