"""Modules for parameters whose channels were removed.

Every module of `kdjax.models` but the ShuffleNets has a field `narrowed`: the output channels of its layers that are not the
standard ones, by the layer's path. A module hands each submodule its part, with paths relative to it, so a model may itself
be part of another.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.core import FrozenDict

from kdjax.paths import leaves_with_paths


def within(narrowed: Mapping[str, int], name: str) -> FrozenDict[str, int]:
    """The entries below a submodule, by their paths in it.

    >>> within({'stage1/conv1': 12, 'stage2/conv1': 30}, 'stage1')
    FrozenDict({
        conv1: 12,
    })
    """
    prefix = f'{name}/'
    return FrozenDict({path.removeprefix(prefix): width for path, width in narrowed.items() if path.startswith(prefix)})


def narrow(module: nn.Module, variables: Mapping[str, Any], inputs: Any) -> nn.Module:
    """Makes the module that fits variables with fewer channels: the same one, with `narrowed` read off the kernels.

    Args:
      module: a module of `kdjax.models`, or another that has a field `narrowed`; how narrow it already is does not matter.
      variables: parameters and batch statistics, arrays or shapes, with channels removed from some layers.
      inputs: a batch as the module takes it, of which only shape and dtype count.

    Returns:
      A module for which `module.apply(variables, inputs)` works, and whose `init` gives exactly the shapes of `variables`.

    Raises:
      ValueError: the module has no field `narrowed`; or the variables differ from the module's in more than the channels that
        may be narrowed: their names, the sizes of windows, channels that the next layer or an addition does not share.

    >>> import jax, jax.numpy as jnp
    >>> from kdjax.models import MLP
    >>> images = jnp.ones((2, 8, 8, 1))
    >>> variables = MLP((30,)).init(jax.random.key(0), images)
    >>> hidden, head = variables['params']['hidden0'], variables['params']['head']
    >>> hidden = {'kernel': hidden['kernel'][:, :12], 'bias': hidden['bias'][:12]}
    >>> smaller = {'params': {'hidden0': hidden, 'head': {**head, 'kernel': head['kernel'][:12]}}}
    >>> module = narrow(MLP((30,)), smaller, images)
    >>> dict(module.narrowed)
    {'hidden0': 12}
    >>> module.apply(smaller, images).shape
    (2, 10)
    """
    owner = type(module).__name__
    if not hasattr(module, 'narrowed'):
        raise ValueError(f'narrow: {owner} has no field `narrowed`; give it one, as the modules of kdjax.models have')
    given = {path: tuple(leaf.shape) for path, leaf in leaves_with_paths(variables).items()}
    standard = _shapes(module.clone(narrowed=FrozenDict()), inputs)
    _check_names(owner, given, standard)
    narrowed = {}
    for path, shape in given.items():
        layer = path.removeprefix('params/').removesuffix('/kernel')
        if not path.endswith('/kernel') or shape[-1:] == standard[path][-1:]:
            continue
        narrowed[layer] = shape[-1] if shape else 0
        if not 1 <= narrowed[layer] <= standard[path][-1]:
            raise ValueError(f'narrow: {layer} of {owner} must have 1 to {standard[path][-1]} channels, got {narrowed[layer]}')
    fitting = module.clone(narrowed=FrozenDict(narrowed))
    try:
        needed = _shapes(fitting, inputs)
    except (TypeError, ValueError) as error:
        raise ValueError(f'narrow: {owner} cannot have the channels {narrowed}; additions need equal ones: {error}') from error
    _check_names(owner, given, needed)
    for path, shape in needed.items():
        if given[path] != shape:
            raise ValueError(
                f'narrow: {path} of {owner} must have the shape {shape} beside its other layers, got {given[path]}'
            )
    return fitting


def _shapes(module: nn.Module, inputs: Any) -> dict[str, tuple[int, ...]]:
    variables = jax.eval_shape(module.init, jax.random.key(0), inputs)
    leaves = leaves_with_paths({name: tree for name, tree in variables.items() if name != 'intermediates'})
    return {path: leaf.shape for path, leaf in leaves.items()}


def _check_names(owner: str, given: Mapping[str, Any], needed: Mapping[str, Any]) -> None:
    unknown, missing = sorted(given.keys() - needed.keys()), sorted(needed.keys() - given.keys())
    if unknown or missing:
        raise ValueError(f'narrow: the variables must be those of {owner}; unknown: {unknown}, missing: {missing}')
