"""Digests of what a result was made of: arrays, data, and the program that a function is."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from kdjax import jaxprs, paths


def of_arrays(tree: Any) -> str:
    """SHA-256 of the arrays of a tree, with their paths, shapes and dtypes.

    >>> of_arrays({'a': np.ones(2)}) == of_arrays({'a': np.ones(2)}), of_arrays(np.ones(2)) == of_arrays(np.zeros(2))
    (True, False)
    """
    leaves = sorted(paths.leaves_with_paths(jax.device_get(tree)).items())
    return _join(part for path, leaf in leaves for part in (path, _of_array(leaf)))


def of_examples(read: Callable[[np.ndarray], dict[str, Any]], examples: int) -> dict[str, str]:
    """SHA-256 of each entry, trees of arrays [examples, ...], that `read(indices)` gives, in the memory of a thousand examples.

    >>> entries = {'inputs': np.zeros(3), 'mask': np.zeros(3)}
    >>> found = of_examples(lambda indices: {name: x[indices] for name, x in entries.items()}, 3)
    >>> sorted(found), found['inputs'] == found['mask']
    (['inputs', 'mask'], True)
    """
    parts: dict[str, list[str]] = {}
    for start in range(0, examples, 1024):
        for name, tree in read(np.arange(start, min(start + 1024, examples))).items():
            parts.setdefault(name, []).append(of_arrays(tree))
    return {name: _join(own) for name, own in parts.items()}


def of_settings(settings: Any) -> str:
    """A short digest of what JSON can hold."""
    return _join([json.dumps(settings, sort_keys=True)])[:16]


def of_program(jaxpr: Any) -> str:
    """SHA-256 of what a jaxpr computes: operations, their options and constants. It is the same in every process.

    How it is written does not matter: names, how it is cut into functions, what it computes and does not return, derivatives.

    >>> double, same, other = (jax.make_jaxpr(f)(1.0) for f in (lambda x: x * 2, jax.jit(lambda y: y * 2), lambda x: x * 3))
    >>> of_program(double) == of_program(same), of_program(double) == of_program(other)
    (True, False)
    """
    operands = [_join(['operand', str(i), str(var.aval)]) for i, var in enumerate(jaxprs.open_jaxpr(jaxpr)[0].invars)]
    return _join(_of_outputs(jaxpr, operands))


def _of_outputs(jaxpr: Any, operands: Sequence[str]) -> list[str]:
    """The digests of a jaxpr's outputs: the digest of a value is that of its operation and of the operation's operands."""
    jaxpr, constants = jaxprs.open_jaxpr(jaxpr)
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*map(_of_array, constants), *operands], strict=True))

    def read(atom: Any) -> str:
        return _join([str(atom.aval), _of_array(atom.val)]) if isinstance(atom, core.Literal) else known[atom]

    for equation in jaxpr.eqns:
        given = [read(atom) for atom in equation.invars]
        inner = jaxprs.called(equation)
        if inner is not None:
            outputs = _of_outputs(inner, given)
        else:
            own = _join([equation.primitive.name, *_of_options(equation.params), *given])
            outputs = [_join([own, str(i), str(var.aval)]) for i, var in enumerate(equation.outvars)]
        known |= zip(equation.outvars, outputs, strict=True)
    return [read(atom) for atom in jaxpr.outvars]


def _of_options(options: Any) -> list[str]:
    """The digests of an operation's options, among which are the jaxprs of loops and branches."""
    leaves, structure = jax.tree.flatten(options, is_leaf=jaxprs.is_jaxpr)
    return [_of_option(option) for option in (structure, *leaves)]


def _of_option(option: Any) -> str:
    if jaxprs.is_jaxpr(option):
        return of_program(option)
    if isinstance(option, (np.ndarray, jax.Array)):
        return _of_array(option)
    # Sets have another order in every process, and objects that do not say what they are another address.
    text = str(sorted(map(str, option)) if isinstance(option, (set, frozenset)) else option)
    return re.sub(r' at 0x[0-9a-f]+', '', text)


def _of_array(array: Any) -> str:
    if isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    array = np.asarray(array)
    return _join([f'{array.shape} {array.dtype}', array.tobytes()])


def _join(parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        part = part.encode() if isinstance(part, str) else part
        # With its length, so that two parts cannot pass for two others.
        digest.update(len(part).to_bytes(8) + part)
    return digest.hexdigest()
