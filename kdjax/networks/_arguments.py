"""What the arguments of a module's `__call__` are: inputs, or the switch between training and evaluation."""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
from flax import nnx

TrainArgument = str | Sequence[str] | Mapping[str, bool] | None

# What modules in use call the switch, and its value for training.
_SWITCHES = {'train': True, 'training': True, 'is_training': True, 'deterministic': False}
_WORDS = {'train', 'training', 'eval', 'evaluate', 'evaluation', 'test', 'testing', 'inference', 'deterministic', 'running'}
_SEQUENTIAL = (nn.Sequential, nnx.Sequential)
_MODULES = (nn.Module, nnx.Pytree)
_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_ANY = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_NONE = inspect.Parameter.empty

Arguments = Callable[[Any, bool], tuple[tuple[Any, ...], dict[str, Any]]]
"""From inputs, and whether to train, to the positional and named arguments of the call."""


def call_arguments(module: Any, train_argument: TrainArgument, *, maker: str, optional: bool) -> Arguments:
    """Reads how a module is called from the signature of its `__call__`.

    Args:
      module: the module; a `Sequential` is called as its first layer is.
      train_argument: as of `from_linen`.
      maker: who asks, for messages.
      optional: whether a switch may be left at None, since the module has another that is set anyhow.

    Raises:
      ValueError: an argument that may be the switch and is not known, or one that does not exist; from the function that is
        returned: inputs that do not fit the signature.
    """
    owner = type(module).__name__
    parameters = _parameters(module)
    switches = _switches(parameters, train_argument, maker, owner, optional)
    if train_argument is None:
        _check_layers(module, maker)
    if train_argument is None and not switches:
        _check_attributes(module, maker)

    def arguments(inputs: Any, train: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, named = _bind(inputs, parameters, set(switches), owner)
        return args, named | {name: value if train else not value for name, value in switches.items()}

    return arguments


def _parameters(module: Any) -> list[inspect.Parameter]:
    while isinstance(module, _SEQUENTIAL) and len(module.layers):
        module = module.layers[0]
    try:
        parameters = inspect.signature(module).parameters.values()
    except (TypeError, ValueError):  # a builtin, that only a Sequential can start with
        return []
    # What a plain function can do without is an option of it, such as `approximate` of gelu.
    return [p for p in parameters if p.name != 'rngs' and (isinstance(module, _MODULES) or p.default is _NONE)]


def _switches(
    parameters: list[inspect.Parameter], train_argument: TrainArgument, maker: str, owner: str, optional: bool
) -> dict[str, bool]:
    names = [p.name for p in parameters]
    known = {name: value for name, value in _SWITCHES.items() if name in names}
    if train_argument is None:
        for p in parameters:
            if p.name not in known and _may_switch(p, optional, by_name=bool(known)):
                raise ValueError(
                    f'{maker}: argument {p.name!r} of {owner} may be the switch to training: say train_argument={p.name!r} if '
                    f'it is True in training, {{{p.name!r}: False}} if it is False, or () if it has nothing to do with it'
                )
        return known
    if isinstance(train_argument, Mapping):
        given = dict(train_argument)
    else:
        given = dict.fromkeys([train_argument] if isinstance(train_argument, str) else train_argument, True)
    for name, value in given.items():
        if name not in names and not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
            raise ValueError(f'{maker}: {owner} has no argument {name!r}; there are: {", ".join(names)}')
        if not isinstance(value, bool):
            raise ValueError(f'{maker}: train_argument gives the value in training, True or False, got {value!r} for {name!r}')
    return {**known, **given} if given else {}


def _may_switch(p: inspect.Parameter, optional: bool, by_name: bool) -> bool:
    """Whether an argument may be the switch: by its name, or, unless only names are asked for, because it is a boolean."""
    if p.kind in _ANY:
        return False
    boolean = isinstance(p.default, bool) or (p.default is _NONE and p.annotation in (bool, 'bool'))
    possible = boolean or (p.default is None and not optional) or (p.default is _NONE and p.annotation is _NONE)
    return (possible and _is_like_a_switch(p.name)) or (boolean and not by_name)


def _is_like_a_switch(name: str) -> bool:
    return bool(_WORDS & set(re.sub('([A-Z])', r'_\1', name).lower().split('_')))


def _check_layers(module: Any, maker: str) -> None:
    """Raises if a `Sequential` holds layers, after its first, with a switch: it hands them nothing but activations."""
    if not isinstance(module, _SEQUENTIAL):
        return
    for i, layer in enumerate(module.layers):
        _check_layers(layer, maker)
        for p in _parameters(layer) if i and isinstance(layer, _MODULES) else ():
            if isinstance(p.default, bool) and _is_like_a_switch(p.name):
                raise ValueError(
                    f'{maker}: Sequential never sets {p.name} of {type(layer).__name__}, its layer {i}, in training: write a '
                    f'module that does, or say train_argument=() if it need not be set'
                )


def _check_attributes(module: Any, maker: str) -> None:
    """Raises if a module is switched by an attribute, which nobody sets: NNX's `train()` sets but two."""
    if isinstance(module, nn.Module):
        own = [module]
    else:
        own = [each for _, each in nnx.iter_modules(module) if type(each).train is nnx.Module.train]
    for each in own:
        for name, value in vars(each).items():
            handled = isinstance(each, nnx.Module) and name in ('deterministic', 'use_running_average')
            if isinstance(value, bool) and _is_like_a_switch(name) and not handled:
                raise ValueError(
                    f'{maker}: attribute {name!r} of {type(each).__name__} may be the switch to training, and stays as it is: '
                    f'make it an argument of __call__, or say train_argument=() if it has nothing to do with it'
                )


def _bind(inputs: Any, parameters: list[inspect.Parameter], switches: set[str], owner: str) -> tuple[tuple, dict[str, Any]]:
    """Spreads inputs over the arguments that are no switch: all as one, by position, or by name."""
    ordered = [p.name for p in parameters if p.kind in _BY_POSITION]
    positional = [name for name in ordered if name not in switches]
    taken = [p.name for p in parameters if p.kind not in _ANY and p.name not in switches]
    needed = [p.name for p in parameters if p.name in taken and p.default is _NONE]
    kinds = {p.kind for p in parameters}
    any_number, any_name = (kind in kinds for kind in _ANY)

    def refuse(got: str) -> ValueError:
        listed = ', '.join(name if name in needed else f'{name} (optional)' for name in taken)
        return ValueError(f'{owner} takes the inputs {listed}, as a tuple or as a dictionary with these names; got {got}')

    if isinstance(inputs, dict) and (len(taken) > 1 or (any_name and not any_number and not positional)):
        unknown = [name for name in inputs if name not in taken and not any_name]
        if not unknown and all(name in inputs for name in needed):
            return (), dict(inputs)
        if len(unknown) < len(inputs) or len(needed) > 1:
            raise refuse(', '.join(map(str, inputs)))
    elif isinstance(inputs, list | tuple) and (len(positional) > 1 or any_number):
        given = positional[: len(inputs)]
        if not set(needed) <= set(given) or (len(inputs) > len(positional) and not any_number):
            raise refuse(f'{len(inputs)} of them')
        if any_number or ordered[: len(inputs)] == given:
            return tuple(inputs), {}
        return (), dict(zip(given, inputs, strict=True))
    elif len(needed) > 1:
        raise refuse('one')
    return (inputs,), {}
