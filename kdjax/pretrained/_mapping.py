"""Others' names to paths of our parameters, and back, by rules that say all of it."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import DTypeLike

from kdjax.paths import leaves_with_paths, map_with_paths

StateDict = Mapping[str, Any]
"""Arrays by others' names: whatever has `shape` and `dtype` and becomes an array by `numpy.asarray`, then and not before."""

_NAMED = 20  # how many names of a kind an error lists


class Rule(NamedTuple):
    """Which of their arrays becomes which of ours.

    Attributes:
      theirs: their name, or several where ours is made of several; `{}` stands for a number, the same in all names of a rule.
      ours: the path of ours, such as `'params/block{}/gate/kernel'`; None for what is known and left out. An array that is
        split has a rule for each part.
      change: their arrays, in the order of the names, to ours, [...] -> [...]; None where they are the same.
      inverse: ours to theirs, for `to_state_dict`; None where they are the same.
    """

    theirs: str | tuple[str, ...]
    ours: str | None
    change: Callable[..., np.ndarray] | None = None
    inverse: Callable[[np.ndarray], np.ndarray] | None = None


def transposed(theirs: str, ours: str | None) -> Rule:
    """A rule for kernels that others keep [outputs, inputs], as PyTorch does, and Flax [inputs, outputs].

    >>> transposed('fc.weight', 'params/head/kernel').change(np.ones((10, 3))).shape
    (3, 10)
    """
    return Rule(theirs, ours, np.transpose, np.transpose)


def from_state_dict(state_dict: StateDict, rules: Sequence[Rule], shapes: Any, *, dtype: DTypeLike | None = None) -> Any:
    """Variables of a module, from arrays by others' names.

    Every array of theirs must be what a rule names, and every array of ours come from exactly one rule; nothing is guessed.
    Arrays are changed one at a time, after all shapes are known to fit. Transposed and cut ones stay views of what they are
    made of, so those of a file that is mapped into memory take none until they are cast or placed on a device.

    Args:
      state_dict: arrays by others' names.
      rules: see `Rule`.
      shapes: the tree that is to be filled, of arrays or their shapes: `jax.eval_shape(module.init, key, inputs)`.
      dtype: of all that are floating; None for what theirs have.

    Returns:
      A tree as `shapes`, of numpy arrays; `jax.device_put` or `kdjax.parallel.shard` places them.

    Raises:
      ValueError: some arrays are missing, not used, of another shape, or integers where ours are floating, all of which the
        message names; or two rules make the same array.

    >>> import flax.linen as nn, jax.numpy as jnp
    >>> shapes = jax.eval_shape(nn.Dense(2).init, jax.random.key(0), jnp.ones((1, 3)))
    >>> rules = [transposed('fc.weight', 'params/kernel'), Rule('fc.bias', 'params/bias')]
    >>> variables = from_state_dict({'fc.weight': np.ones((2, 3)), 'fc.bias': np.ones(2)}, rules, shapes)
    >>> variables['params']['kernel'].shape
    (3, 2)
    >>> from_state_dict({'fc.weight': np.ones((2, 3)), 'fc.b': np.ones(2)}, rules, shapes)
    Traceback (most recent call last):
    ValueError: from_state_dict: missing: fc.bias; not used: fc.b
    """
    expected = leaves_with_paths(shapes)
    used, plan = _planned(state_dict, rules, expected)
    wrong = []
    missing = [_theirs_of(rules, path) for path in expected if path not in plan]
    unused = [name for name in state_dict if name not in used]
    misshapen = [
        said for path, (rule, names) in plan.items() if (said := _misfit(rule, names, path, state_dict, expected[path].shape))
    ]
    mistyped = [
        f'{name} is {state_dict[name].dtype}, and {path} is {expected[path].dtype}'
        for path, (_, names) in plan.items()
        for name in names
        if _floats(state_dict[name]) != _floats(expected[path])
    ]
    titles = ('missing', 'not used', 'of another shape', 'of another kind')
    for title, items in zip(titles, (missing, unused, misshapen, mistyped), strict=True):
        if items:
            more = f' and {len(items) - _NAMED} more' if len(items) > _NAMED else ''
            wrong.append(f'{title}: {", ".join(items[:_NAMED])}{more}')
    if wrong:
        raise ValueError(f'from_state_dict: {"; ".join(wrong)}')

    def made(path: str, shape: Any) -> np.ndarray:
        rule, names = plan[path]
        array = _changed(rule, [np.asarray(state_dict[name]) for name in names])
        if array.shape != tuple(shape.shape):
            raise ValueError(f'from_state_dict: {", ".join(names)} makes {array.shape}, which {path} {shape.shape} is not')
        return array.astype(dtype) if dtype is not None and _floats(array) and array.dtype != dtype else array

    return map_with_paths(made, shapes)


def to_state_dict(variables: Any, rules: Sequence[Rule]) -> dict[str, np.ndarray]:
    """Arrays by others' names, from variables: what `from_state_dict` undoes.

    Args:
      variables: a tree of arrays.
      rules: those of `from_state_dict`; ones that join, split or leave out are not gone back through.

    Raises:
      ValueError: an array has no rule, or one that has no inverse.

    >>> variables = {'params': {'kernel': np.ones((3, 2))}}
    >>> to_state_dict(variables, [transposed('fc.weight', 'params/kernel')])['fc.weight'].shape
    (2, 3)
    """
    found = {}
    for path, leaf in leaves_with_paths(variables).items():
        for rule in rules:
            number = None if rule.ours is None else _number(rule.ours, path)
            if number is not None:
                break
        else:
            raise ValueError(f'to_state_dict: no rule makes {path}; add one')
        if not isinstance(rule.theirs, str) or (rule.change is not None and rule.inverse is None):
            raise ValueError(f'to_state_dict: the rule of {path} has no inverse')
        name = rule.theirs.replace('{}', number)
        if name in found:
            raise ValueError(f'to_state_dict: two arrays would be {name}; the rules split it')
        found[name] = np.asarray(leaf) if rule.inverse is None else rule.inverse(np.asarray(leaf))
    return found


def _floats(array: Any) -> bool:
    return jax.numpy.issubdtype(array.dtype, np.floating)


def _number(pattern: str, name: str) -> str | None:
    """The number for which a pattern is a name, '' where it has none; None if it is not that name."""
    first, *rest = map(re.escape, pattern.split('{}'))
    expression = first + (r'(\d+)' + rest[0] + ''.join(rf'\1{each}' for each in rest[1:]) if rest else '')
    match = re.fullmatch(expression, name)
    return None if match is None else ''.join(match.groups())


def _planned(
    state_dict: StateDict, rules: Sequence[Rule], expected: Mapping[str, Any]
) -> tuple[set[str], dict[str, tuple[Rule, list[str]]]]:
    """Which names are used, and how each path of ours is made."""
    used: set[str] = set()
    plan: dict[str, tuple[Rule, list[str]]] = {}
    for rule in rules:
        patterns = (rule.theirs,) if isinstance(rule.theirs, str) else rule.theirs
        for number in [number for name in state_dict if (number := _number(patterns[0], name)) is not None]:
            names = [pattern.replace('{}', number) for pattern in patterns]
            if rule.ours is None:
                used |= set(names)
                continue
            path = rule.ours.replace('{}', number)
            if path not in expected or not all(name in state_dict for name in names):
                continue
            if path in plan:
                raise ValueError(f'from_state_dict: {path} comes from both {", ".join(plan[path][1])} and {", ".join(names)}')
            plan[path] = rule, names
            used |= set(names)
    return used, plan


def _theirs_of(rules: Sequence[Rule], path: str) -> str:
    """What they would have to call an array; our path if no rule makes it."""
    for rule in rules:
        number = None if rule.ours is None else _number(rule.ours, path)
        if number is not None:
            patterns = (rule.theirs,) if isinstance(rule.theirs, str) else rule.theirs
            return ' with '.join(pattern.replace('{}', number) for pattern in patterns)
    return f'{path} (which no rule makes)'


def _changed(rule: Rule, arrays: Sequence[np.ndarray]) -> np.ndarray:
    if rule.change is None and len(arrays) > 1:
        raise ValueError(f'from_state_dict: the rule of {rule.ours} joins several arrays and does not say how')
    return arrays[0] if rule.change is None else rule.change(*arrays)


def _misfit(rule: Rule, names: Sequence[str], path: str, state_dict: StateDict, shape: tuple[int, ...]) -> str | None:
    """What is wrong with the shapes that a rule is given, tried with arrays that take no memory; None if nothing is."""
    shapes = [tuple(state_dict[name].shape) for name in names]
    given = ', '.join(f'{name} is {each}' for name, each in zip(names, shapes, strict=True))
    if rule.change is None and len(names) == 1:
        return None if shapes[0] == tuple(shape) else f'{given}, and {path} is {tuple(shape)}'
    try:
        zeros = [np.broadcast_to(np.zeros((), state_dict[name].dtype), each) for name, each in zip(names, shapes, strict=True)]
        made = _changed(rule, zeros).shape
    except (ValueError, IndexError) as error:
        return f'{given}, of which no {path} {tuple(shape)} can be made: {str(error).splitlines()[0]}'
    return None if made == tuple(shape) else f'{given}, which makes {made}, and {path} is {tuple(shape)}'
