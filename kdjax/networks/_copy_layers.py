"""Layers that go from one network's variables to another's."""

from collections.abc import Iterable, Mapping
from typing import Any

from kdjax.networks._network import Variables
from kdjax.paths import Leaves, leaves_with_paths, map_with_paths, picks, select


def copy_layers(source: Variables, target: Variables, layers: Leaves | Mapping[str, str]) -> dict[str, Any]:
    """The target's variables, with some of its layers taken from the source: of one path, or of others.

    A student of fewer blocks begins as some of its teacher's: with layers `{'block0': 'block0', 'block1': 'block3'}`, or with
    `objectives.uniform_layers` of their names, which maps the same way.

    Args:
      source: variables to take from.
      target: variables to put into; they stay as they are.
      layers: which of the source's parameters, as patterns over their paths, such as `'stage1/*'`, or a predicate of path and
        array; what it picks of the state comes along, such as the statistics of batch norms in `'stage1'`. Or a mapping of the
        target's paths to the source's, `{student path: teacher path}`, of layers or of single parameters, without patterns: a
        layer is all below its path, in every collection that the target has.

    Returns:
      The variables.

    Raises:
      ValueError: a pattern matches none of the source's parameters; a path of a mapping is of no parameter, or lies in another;
        or the target has no array of that path and shape, or an array in a layer that the source's layer lacks.

    >>> import jax.numpy as jnp
    >>> source = {'params': {'hidden': jnp.ones(2), 'head': jnp.ones(3)}}
    >>> target = {'params': {'hidden': jnp.zeros(2), 'head': jnp.zeros(4)}}
    >>> print(copy_layers(source, target, 'hidden')['params']['hidden'])
    [1. 1.]
    >>> print(copy_layers(source, {'params': {'first': jnp.zeros(2)}}, {'first': 'hidden'})['params']['first'])
    [1. 1.]
    """
    if isinstance(layers, Mapping):
        _check_mapping(source, target, layers)
    else:
        select(layers, source['params'])
    copied = dict(target)
    for name in source:
        offered, own = (leaves_with_paths(variables.get(name, {})) for variables in (source, target))
        if isinstance(layers, Mapping):
            if name not in target:
                continue
            chosen = _renamed(name, offered, own, layers)
        else:
            chosen = {path: leaf for path, leaf in offered.items() if picks(layers, path, leaf)}
        for path, leaf in chosen.items():
            if path not in own or own[path].shape != leaf.shape:
                found = f'has {own[path].shape} there' if path in own else 'has no such array'
                raise ValueError(f'copy_layers: {name}/{path} {leaf.shape} does not fit the target, which {found}')
        if chosen:
            copied[name] = map_with_paths(lambda path, leaf, chosen=chosen: chosen.get(path, leaf), target[name])
    return copied


def _renamed(name: str, offered: dict[str, Any], own: dict[str, Any], layers: Mapping[str, str]) -> dict[str, Any]:
    """What a collection of the source has in the layers, by the target's paths."""
    chosen: dict[str, Any] = {}
    for to, layer in layers.items():
        chosen |= {to + path.removeprefix(layer): leaf for path, leaf in offered.items() if _within(path, layer)}
        missing = [path for path in own if _within(path, to) and path not in chosen]
        if missing:
            raise ValueError(
                f"copy_layers: the target's {name}/{missing[0]} has no counterpart in the source's {layer!r}, which has "
                f'{", ".join(path for path in offered if _within(path, layer)) or "nothing there"}'
            )
    return chosen


def _check_mapping(source: Variables, target: Variables, layers: Mapping[str, str]) -> None:
    for side, variables, names in (('target', target, list(layers)), ('source', source, list(layers.values()))):
        known = leaves_with_paths(variables['params'])
        for name in names:
            if not any(_within(path, name) for path in known):
                raise ValueError(f'copy_layers: the {side} has no layer {name!r}; it has {", ".join(_layers(known))}')
    for name in layers:
        outer = next((other for other in layers if other != name and _within(name, other)), None)
        if outer is not None:
            raise ValueError(f'copy_layers: {name!r} lies in {outer!r}; name it once')


def _layers(paths: Iterable[str]) -> list[str]:
    """The first names of paths, each once."""
    return list(dict.fromkeys(path.partition('/')[0] for path in paths))


def _within(path: str, layer: str) -> bool:
    return path == layer or path.startswith(f'{layer}/')
