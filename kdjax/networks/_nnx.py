"""Flax NNX modules as networks."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import unflatten_dict

from kdjax.networks import _class_gradients
from kdjax.networks._arguments import TrainArgument, call_arguments
from kdjax.networks._network import Network, Outputs, as_outputs, as_paths, select_features

_PARAMS = 'params'


def from_nnx(
    module: nnx.Pytree | Callable[..., nnx.Pytree],
    *,
    features: str | tuple[str, ...] = (),
    class_gradients: str | tuple[str, ...] = (),
    train_argument: TrainArgument = None,
) -> Network:
    """Makes a `Network` of an NNX module.

    Parameters become `variables['params']`, nested dictionaries of arrays with the names that Linen would give; other
    variables go to a collection of their kind: batch norm's to `'batch_stats'`, those of a class of one's own to one with the
    name of the class, arrays that are attributes to `'arrays'`. Random streams are not kept: each call draws them from `rng`.
    `train` calls the module's own `train()` or `eval()`, or those of the modules in it, and sets an argument of `__call__` as
    in `from_linen`; inputs are spread over its arguments as there.

    Args:
      module: a function that makes the module from `rngs=`, such as its class or a `functools.partial` of it; or a module that
        exists, whose variables `init` then returns as they are, whatever the key.
      features: paths of submodules whose outputs `apply` also returns, such as `'blocks/1'`; sown names are paths too.
      class_gradients: paths among `features` for which `apply` also returns `'path/class_gradients'`; see `from_linen`.
      train_argument: a switch of `__call__` between training and evaluation of another name; see `from_linen`.

    Returns:
      The network.

    Raises:
      ValueError: a path in `class_gradients` is not in `features`, or an argument of `__call__` may be its switch and is not
        known; from `apply`: inputs do not fit the arguments, a path in `features` does not exist, where the message lists those
        that do, or `class_gradients` name no submodule that is called once.

    >>> import functools, jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> network = from_nnx(functools.partial(nnx.Linear, 5, 3))
    >>> variables = network.init(jax.random.key(0), jnp.ones((2, 5)))
    >>> outputs, state = network.apply(variables, jnp.ones((2, 5)))
    >>> outputs.logits.shape, sorted(variables['params'])
    ((2, 3), ['bias', 'kernel'])
    """
    features, class_gradients = as_paths(features), as_paths(class_gradients)
    _class_gradients.check_tapped('from_nnx', class_gradients, features)
    existing = module if isinstance(module, nnx.Pytree) else None

    def make(key: jax.Array) -> nnx.Pytree:
        instance = module(rngs=nnx.Rngs(key)) if existing is None else nnx.clone(existing)
        nnx.pop(instance, nnx.Intermediate)  # what a module has sown before is no state of it
        _mark_arrays(instance)
        return instance

    def describe() -> tuple[Any, ...]:
        instance = make(jax.random.key(0))
        made.append(instance)
        return nnx.split(instance, nnx.RngState, ...)

    made: list[nnx.Pytree] = []
    graph, streams, abstract = jax.eval_shape(describe)
    template = made.pop()  # of which only types matter: its arrays are no longer there
    owner = type(template).__name__
    arguments = call_arguments(template, train_argument, maker='from_nnx', optional=True)
    takes_rngs = 'rngs' in inspect.signature(template).parameters
    streams = nnx.to_flat_state(streams)
    # Every array as it will be put back: where in the module, the variable around it, and where in kdjax's dictionaries.
    layout = [(keys, leaf, _collection(leaf)) for keys, leaf in nnx.to_flat_state(abstract)]

    def to_variables(state: Any) -> dict[str, Any]:
        leaves = {
            (_collection(leaf), *map(str, keys)): leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
            for keys, leaf in nnx.to_flat_state(state)
        }
        return {_PARAMS: {}, **unflatten_dict(leaves)}

    def to_module(variables: dict[str, Any], rng: jax.Array | None) -> nnx.Module:
        flat = []
        for keys, leaf, collection in layout:
            value = variables[collection]
            for key in keys:
                value = value[str(key)]
            flat.append((keys, leaf.replace(value) if isinstance(leaf, nnx.Variable) else value))
        rng = jax.random.key(0) if rng is None else rng
        fresh = []
        for i, (keys, variable) in enumerate(streams):
            is_key = jnp.issubdtype(variable.get_value().dtype, jax.dtypes.prng_key)
            shape = variable.get_value().shape
            value = jax.random.split(jax.random.fold_in(rng, i), shape) if is_key else jnp.zeros(shape, 'uint32')
            fresh.append((keys, variable.replace(value)))
        return nnx.merge(graph, nnx.from_flat_state(flat), nnx.from_flat_state(fresh))

    def init(key: jax.Array, inputs: Any) -> dict[str, Any]:
        del inputs  # NNX modules know their shapes.
        variables = to_variables(nnx.split(make(key), nnx.RngState, ...)[2])
        # The training step donates what it is given, and the module must outlive that.
        return jax.tree.map(lambda leaf: jnp.array(leaf, copy=existing is not None), variables)

    def apply(
        variables: dict[str, Any], inputs: Any, *, train: bool = False, rng: jax.Array | None = None
    ) -> tuple[Outputs, dict[str, Any]]:
        if train and streams and rng is None:
            raise ValueError(f'{owner} draws random numbers in training: pass rng=')
        args, named = arguments(inputs, train)

        def module() -> nnx.Module:
            instance = to_module(variables, rng)
            _switch(instance, 'train' if train else 'eval')
            return instance

        def forward(instance: nnx.Module, **taps: Any) -> tuple[Any, Any]:
            noise = {'rngs': nnx.Rngs(rng)} if takes_rngs and rng is not None else {}
            # Captured even if nothing is tapped: Flax deprecates to sow outside of a capture.
            return nnx.capture(lambda instance: instance(*args, **named, **noise), nnx.Intermediate, **taps)(instance)

        instance = module()
        result, intermediates = forward(instance, **({'method_outputs': nnx.Intermediate} if features else {}))
        activations: dict[str, Any] = {}
        for keys, variable in nnx.to_flat_state(intermediates):
            path = '/'.join(map(str, keys)).removesuffix('__call__').rstrip('/')
            if path:
                activations[path] = variable.get_value()[-1]
        tapped = select_features(features, activations, owner)
        for path in class_gradients:
            tapped[f'{path}/class_gradients'] = _class_gradients.class_gradients(
                'from_nnx',
                path,
                tapped[path],
                lambda perturb, path=path: forward(_perturb_at(module(), path, perturb))[0],
            )
        outputs = as_outputs(result, tapped, owner)
        # nnx.capture leaves what it captured on the module; it is no state. What the module has set anew is.
        _mark_arrays(instance)
        after = to_variables(nnx.split(instance, nnx.RngState, nnx.Intermediate, ...)[3])
        return outputs, {name: value for name, value in after.items() if name != _PARAMS}

    return Network(init, apply)


class _Perturbed(nnx.Module):
    """Stands in for a submodule, in one forward pass, and does something to what it returns."""

    def __init__(self, inner: nnx.Pytree, function: Callable[[jax.Array], jax.Array]) -> None:
        self.inner, self.function = inner, function  # `perturb` is a method of modules

    def __call__(self, *args: Any, **named: Any) -> jax.Array:
        return self.function(self.inner(*args, **named))

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)['inner'], name)


def _perturb_at(instance: nnx.Module, path: str, perturb: Callable[[jax.Array], jax.Array]) -> nnx.Module:
    """The module with the submodule at a path replaced; as it was where there is none, since sown names are paths too."""
    *above, last = path.split('/')
    try:
        parent = functools.reduce(_child, above, instance)
        node = _child(parent, last)
    except (AttributeError, IndexError, KeyError):
        return instance
    if isinstance(node, nnx.Module):
        perturbed = _Perturbed(node, perturb)
        if isinstance(parent, nnx.List):
            parent[int(last)] = perturbed
        elif isinstance(parent, nnx.Dict):
            parent[last] = perturbed
        else:
            setattr(parent, last, perturbed)
    return instance


def _child(node: Any, key: str) -> Any:
    if isinstance(node, nnx.List):
        return node[int(key)]
    return node[key] if isinstance(node, nnx.Dict) else getattr(node, key)


def _mark_arrays(instance: nnx.Pytree) -> None:
    """Makes attributes that are arrays count as data, as they do eagerly; traced ones Flax takes for constants."""
    for _, node in list(nnx.iter_graph(instance)):
        if isinstance(node, nnx.Pytree):
            for name, value in list(vars(node).items()):
                if isinstance(value, jax.Array):
                    setattr(node, name, nnx.data(value))


def _switch(instance: nnx.Module, method: str) -> None:
    """Sets a module to training or evaluation, or those within, where it does not know how."""
    modules = [instance] if hasattr(instance, method) else [module for _, module in nnx.iter_modules(instance)]
    for module in modules:
        getattr(module, method)()


def _collection(leaf: Any) -> str:
    if not isinstance(leaf, nnx.Variable):
        return 'arrays'
    if isinstance(leaf, nnx.Param):
        return _PARAMS
    if isinstance(leaf, nnx.BatchStat):
        return 'batch_stats'
    try:
        return nnx.variable_name_from_type(type(leaf))
    except ValueError:  # a class of one's own, that Flax has no name for
        return type(leaf).__name__
