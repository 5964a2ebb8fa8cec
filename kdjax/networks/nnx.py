"""Flax NNX modules as networks."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from kdjax.networks.network import Network, Outputs, as_outputs, as_paths, select_features

_PARAMS = 'params'


def from_nnx(module: nnx.Module | Callable[..., nnx.Module], *, features: str | tuple[str, ...] = ()) -> Network:
    """Makes a `Network` of an NNX module.

    Parameters become `variables['params']`, nested dictionaries of arrays with the names that Linen would give; other
    variables go to a collection of their kind, batch norm's to `'batch_stats'`. Random streams are not kept: each call
    draws them from `rng`. `train` calls the module's own `train()` or `eval()`.

    Args:
      module: a function that makes the module from `rngs=`, such as its class or a `functools.partial` of it; or a module that
        exists, whose variables `init` then returns as they are, whatever the key.
      features: paths of submodules whose outputs `apply` also returns, such as `'blocks/1'`; sown names are paths too.

    Returns:
      The network.

    Raises:
      ValueError: from `apply`, when traced: a path in `features` does not exist; the message lists those that do.

    >>> import functools, jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> network = from_nnx(functools.partial(nnx.Linear, 5, 3))
    >>> variables = network.init(jax.random.key(0), jnp.ones((2, 5)))
    >>> outputs, state = network.apply(variables, jnp.ones((2, 5)))
    >>> outputs.logits.shape, sorted(variables['params'])
    ((2, 3), ['bias', 'kernel'])
    """
    features = as_paths(features)
    existing = module if isinstance(module, nnx.Module) else None
    make = (lambda: module) if existing is not None else lambda: module(rngs=nnx.Rngs(0))
    graph, streams, abstract = nnx.split(nnx.eval_shape(make), nnx.RngState, ...)
    streams = nnx.to_flat_state(streams)
    # Every variable as it will be rebuilt: where in the module, and where in kdjax's dictionaries.
    layout = [(keys, variable, _collection(variable)) for keys, variable in nnx.to_flat_state(abstract)]
    owner = getattr(module, '__name__', type(existing).__name__) if existing is None else type(existing).__name__

    def to_variables(state: Any) -> dict[str, Any]:
        variables: dict[str, Any] = {_PARAMS: {}}
        for keys, variable in nnx.to_flat_state(state):
            node = variables.setdefault(_collection(variable), {})
            for key in keys[:-1]:
                node = node.setdefault(str(key), {})
            node[str(keys[-1])] = variable.get_value()
        return variables

    def to_module(variables: dict[str, Any], rng: jax.Array | None) -> nnx.Module:
        flat = []
        for keys, variable, collection in layout:
            value = variables[collection]
            for key in keys:
                value = value[str(key)]
            flat.append((keys, variable.replace(value)))
        rng = jax.random.key(0) if rng is None else rng
        fresh = []
        for i, (keys, variable) in enumerate(streams):
            is_key = jax.dtypes.issubdtype(variable.get_value().dtype, jax.dtypes.prng_key)
            shape = variable.get_value().shape
            value = jax.random.split(jax.random.fold_in(rng, i), shape) if is_key else jax.numpy.zeros(shape, 'uint32')
            fresh.append((keys, variable.replace(value)))
        return nnx.merge(graph, nnx.from_flat_state(flat), nnx.from_flat_state(fresh))

    def init(key: jax.Array, inputs: Any) -> dict[str, Any]:
        del inputs  # NNX modules know their shapes.
        instance = existing if existing is not None else module(rngs=nnx.Rngs(key))
        variables = to_variables(nnx.split(instance, nnx.RngState, ...)[2])
        # The training step donates what it is given, and the module must outlive that.
        return variables if existing is None else jax.tree.map(jax.numpy.copy, variables)

    def apply(
        variables: dict[str, Any], inputs: Any, *, train: bool = False, rng: jax.Array | None = None
    ) -> tuple[Outputs, dict[str, Any]]:
        if train and streams and rng is None:
            raise ValueError(f'{owner} draws random numbers in training: pass rng=')
        instance = to_module(variables, rng)
        (instance.train if train else instance.eval)()
        activations: dict[str, Any] = {}
        # Captured even if nothing is tapped: Flax deprecates to sow outside of a capture.
        taps = {'method_outputs': nnx.Intermediate} if features else {}
        result, intermediates = nnx.capture(instance, nnx.Intermediate, **taps)(inputs)
        for keys, variable in nnx.to_flat_state(intermediates):
            path = '/'.join(map(str, keys)).removesuffix('__call__').rstrip('/')
            if path:
                activations[path] = variable.get_value()[-1]
        outputs = as_outputs(result, select_features(features, activations, owner), owner)
        # nnx.capture leaves what it captured on the module; it is no state.
        after = to_variables(nnx.split(instance, nnx.RngState, nnx.Intermediate, ...)[3])
        return outputs, {name: value for name, value in after.items() if name != _PARAMS}

    return Network(init, apply)


def _collection(variable: nnx.Variable) -> str:
    if isinstance(variable, nnx.Param):
        return _PARAMS
    if isinstance(variable, nnx.BatchStat):
        return 'batch_stats'
    return nnx.variable_name_from_type(type(variable))
