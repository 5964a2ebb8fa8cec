"""Functions as jaxprs: which products they hold, and the same function with other products.

Whatever in kdjax must know what is inside a network, quantization and the removal of channels, traces it and walks the jaxpr
here, and asks nothing of the framework that it was written in. Parameters of jaxpr equations are no stable interface of JAX, so
all that kdjax knows of them stands in this module.

A *product* is a `dot_general` or `conv_general_dilated` of which one operand, at least, depends on the inputs. It is named by
the path of the parameter that its other operand comes from, or `products/0`, `products/1`, ... where both depend on the inputs,
as in attention.
"""

# jax 0.12 has ClosedJaxpr as another name of Jaxpr, which is not among its types.
# pyright: reportPrivateImportUsage=false

import collections
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from kdjax.paths import path_of

_PRODUCTS = ('dot_general', 'conv_general_dilated')
# Equations that only call what they hold. Of a function with a derivative of its own that holds products, these are then
# differentiated as they stand.
_CALLS = ('jit', 'pjit', 'closed_call', 'core_call', 'custom_jvp_call', 'custom_vjp_call', 'remat', 'remat2', 'checkpoint')


class Origin(NamedTuple):
    """What a value is computed from.

    Attributes:
      path: of the largest parameter among that, or None.
      size: of that parameter.
      inputs: whether inputs are among it.
    """

    path: str | None = None
    size: int = 0
    inputs: bool = False


class Product(NamedTuple):
    """A product within a function.

    Attributes:
      name: of the parameter, or `products/i`; the second product with a parameter has `_2` at its end.
      path: of the parameter, or None.
      weights: which operand comes from parameters alone, 0 or 1; None if both depend on inputs.
      primitive: `'dot_general'` or `'conv_general_dilated'`.
      options: what it takes besides its operands.
      operands: abstract values of both.
      output: abstract value of the result.
      length: how often each scan around it, from the outermost on, runs it.
    """

    name: str
    path: str | None
    weights: int | None
    primitive: str
    options: Mapping[str, Any]
    operands: tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]
    output: jax.ShapeDtypeStruct
    length: tuple[int, ...]

    def __call__(self, lhs: jax.Array, rhs: jax.Array, **changed: Any) -> jax.Array:
        """The product of other operands, with the same options or changed ones."""
        return getattr(jax.lax, self.primitive)(lhs, rhs, **{**self.options, **changed})

    def contracted(self, operand: int) -> tuple[int, ...]:
        """Axes of an operand that are summed over."""
        kept = self.kept(operand)
        return tuple(axis for axis in range(len(self.operands[operand].shape)) if axis not in kept)

    def kept(self, operand: int) -> dict[int, int]:
        """Axes of an operand that the output has too, and where; of a convolution, only examples and channels."""
        numbers = self.options['dimension_numbers']
        if self.primitive == 'conv_general_dilated':
            return {numbers.lhs_spec[0]: numbers.out_spec[0]} if operand == 0 else {numbers.rhs_spec[0]: numbers.out_spec[1]}
        contracted, batch = numbers
        kept = dict(zip(batch[operand], range(len(batch[operand])), strict=True))
        free = [
            [axis for axis in range(len(self.operands[i].shape)) if axis not in contracted[i] and axis not in batch[i]]
            for i in (0, 1)
        ]
        before = len(batch[0]) + (len(free[0]) if operand == 1 else 0)
        return kept | {axis: before + i for i, axis in enumerate(free[operand])}

    def place(self, operand: int, values: jax.Array) -> jax.Array:
        """Values with length 1 on the contracted axes of an operand, as they broadcast to the output."""
        kept = self.kept(operand)
        shape = [1] * len(self.output.shape)
        for axis, to in kept.items():
            shape[to] = values.shape[axis]
        order = sorted(kept, key=kept.__getitem__)
        return jnp.transpose(values, (*self.contracted(operand), *order)).reshape(shape)


class Program(NamedTuple):
    """A jaxpr, and what its equations hold: a product, the program of an inner jaxpr, or nothing of interest."""

    jaxpr: Any
    constants: Sequence[Any]
    steps: tuple[Any, ...]


def trace(
    function: Callable[..., Any], variables: Any, *inputs: Any, packed: type | tuple[type, ...] = ()
) -> tuple[Program, Any]:
    """Traces `function(variables, *inputs)` and finds its products.

    Args:
      function: the function.
      variables: `{'params': ..., **state}`; what comes from `params` has their path.
      *inputs: further arguments, pytrees of arrays.
      packed: types of leaves that stand for float32 arrays of the same `shape`.

    Returns:
      The program, and a pytree of the shapes of what the function returns.

    Raises:
      ValueError: a product stands within control flow other than calls and scans, or the function fails on a whole batch.
    """
    is_packed = lambda leaf: isinstance(leaf, packed)  # noqa: E731
    abstract = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32) if is_packed(leaf) else leaf  # noqa: E731
    arguments = jax.tree.map(abstract, (variables, *inputs), is_leaf=is_packed)
    try:
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    except Exception as error:
        refuse_batch(inputs[0] if inputs else None, error)
        raise
    origins = []
    for keys, leaf in jax.tree_util.tree_leaves_with_path(arguments[0]):
        path = path_of(keys)
        is_parameter = path.startswith('params/')
        origins.append(Origin(path.removeprefix('params/'), leaf.size) if is_parameter else Origin())
    origins += [Origin(inputs=True)] * len(jax.tree.leaves(arguments[1:]))
    program, _ = _analyse(closed, origins, collections.Counter(), ())
    return program, shapes


def trace_network(
    network: Any, variables: Any, inputs: Any, *, train: bool = False, rng: Any = None, packed: type | tuple[type, ...] = ()
) -> tuple[Program, Callable[[Sequence[Any]], Any], list[Any]]:
    """`trace` of a network's `apply`: the program, what makes its results of their leaves, and the leaves of its arguments."""

    def apply(variables: Any, inputs: Any, rng: Any) -> Any:
        return network.apply(variables, inputs, train=train, rng=rng)

    program, shapes = trace(apply, variables, inputs, rng, packed=packed)
    leaves = jax.tree.leaves((variables, inputs, rng), is_leaf=lambda leaf: isinstance(leaf, packed))
    return program, lambda results: jax.tree.unflatten(jax.tree.structure(shapes), results), leaves


def refuse_batch(inputs: Any, error: Exception) -> None:
    """Says, where a network failed on inputs that look like a whole batch, that its inputs alone were wanted.

    Only after it failed: a network may well take a dictionary in which something is called inputs.
    """
    if isinstance(inputs, Mapping) and 'inputs' in inputs:
        reason = next(iter(str(error).splitlines()), '')
        raise ValueError(
            f'the network does not take these inputs ({type(error).__name__}: {reason}); they look like a batch: '
            "give batch['inputs']"
        ) from error


def products(program: Program) -> Iterator[Product]:
    """All products of a program, in order."""
    for step in program.steps:
        if isinstance(step, Product):
            yield step
        elif isinstance(step, Program):
            yield from products(step)


Multiply = Callable[[Product, Any, Any, Any], tuple[Any, Any]]
"""`(product, lhs, rhs, state) -> (output, state)`; the state is the product's own, `states[product.name]`, or None."""


def evaluate(
    program: Program,
    arguments: Sequence[Any],
    multiply: Multiply,
    states: Mapping[str, Any],
    unpack: Callable[[Any], Any] = lambda value: value,
) -> tuple[list[Any], dict[str, Any]]:
    """Evaluates a program with `multiply` in the place of its products.

    It can be differentiated, mapped and compiled as what it was traced from could.

    Args:
      program: from `trace`.
      arguments: leaves of the function's arguments; some may be packed, pytrees that only `multiply` and `unpack` look into.
      multiply: computes the products.
      states: a pytree for each product's name, with `product.length` as leading axes.
      unpack: makes an array of a packed value.

    Returns:
      The leaves of what the function returns, and the new state of every product that returned one.
    """
    jaxpr = program.jaxpr
    values: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*program.constants, *arguments], strict=True))
    changed: dict[str, Any] = {}

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for equation, step in zip(jaxpr.eqns, program.steps, strict=True):
        operands = [read(atom) for atom in equation.invars]
        if isinstance(step, Product):
            lhs, rhs = operands
            output, state = multiply(step, lhs, rhs, states.get(step.name))
            outputs = [output]
            if state is not None:
                changed[step.name] = state
        elif isinstance(step, Program):
            call = _scan if equation.primitive.name == 'scan' else _call
            outputs, new = call(equation, step, operands, multiply, states, unpack)
            changed |= new
        elif equation.primitive.name == 'convert_element_type' and not jax.tree_util.all_leaves(operands):
            outputs = operands  # what is packed stays so; products give their result the right type
        else:
            outputs = bind(jaxpr, equation, [unpack(operand) for operand in operands])
        values.update(zip(equation.outvars, outputs, strict=True))
    return [unpack(read(atom)) for atom in jaxpr.outvars], changed


def _call(
    equation: Any, program: Program, operands: list[Any], multiply: Multiply, states: Mapping[str, Any], unpack: Any
) -> tuple[list[Any], dict[str, Any]]:
    def inner(operands: list[Any], states: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        return evaluate(program, operands, multiply, states, unpack)

    if 'policy' in equation.params:
        inner = jax.checkpoint(inner, policy=equation.params['policy'], prevent_cse=equation.params['prevent_cse'])
    own = {product.name: states[product.name] for product in products(program) if product.name in states}
    return inner(operands, own)


def _scan(
    equation: Any, program: Program, operands: list[Any], multiply: Multiply, states: Mapping[str, Any], unpack: Any
) -> tuple[list[Any], dict[str, Any]]:
    constants, carries = scan_counts(equation)
    length = equation.params['length']
    own = {product.name: states[product.name] for product in products(program) if product.name in states}
    # A packed value whose parts do not all run along the scan cannot be sliced.
    sliced = operands[constants + carries :]
    sliced = [x if all(leaf.shape[:1] == (length,) for leaf in jax.tree.leaves(x)) else unpack(x) for x in sliced]

    def body(carry: list[Any], slices: tuple[list[Any], dict[str, Any]]) -> tuple[list[Any], tuple[list[Any], dict[str, Any]]]:
        xs, state = slices
        outputs, changed = evaluate(program, [*operands[:constants], *carry, *xs], multiply, state, unpack)
        return outputs[:carries], (outputs[carries:], changed)

    initial = [unpack(x) for x in operands[constants : constants + carries]]
    carry, (outputs, changed) = jax.lax.scan(
        body,
        initial,
        (sliced, own),
        length=length,
        reverse=equation.params['reverse'],
        unroll=equation.params['unroll'],
    )
    return [*carry, *outputs], changed


def bind(jaxpr: Any, equation: Any, operands: Sequence[Any]) -> list[Any]:
    """Evaluates one equation of a jaxpr as it stands, with the derivatives and the batching that it has."""
    given = {atom: x for atom, x in zip(equation.invars, operands, strict=True) if not isinstance(atom, core.Literal)}
    kept = [atom for atom in equation.outvars if not isinstance(atom, core.DropVar)]
    alone = jaxpr.replace(constvars=[], invars=list(given), outvars=kept, eqns=[equation], effects=equation.effects)
    outputs = dict(zip(kept, core.jaxpr_as_fun(core.ClosedJaxpr(alone, []))(*given.values()), strict=True))
    return [outputs.get(atom) for atom in equation.outvars]


def inner_jaxprs(equation: Any) -> list[Any]:
    """The jaxprs that an equation holds."""
    leaves = jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr)
    return [leaf for leaf in leaves if is_jaxpr(leaf)]


def without_products(jaxpr: Any) -> Program:
    """A jaxpr as a program, to be walked only: whatever products it holds count as any other equation."""
    jaxpr, constants = open_jaxpr(jaxpr)
    return Program(jaxpr, constants, (None,) * len(jaxpr.eqns))


def called(equation: Any) -> Any | None:
    """The jaxpr that an equation calls on its own operands and once, or None."""
    return inner_jaxprs(equation)[0] if equation.primitive.name in _CALLS else None


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """A jaxpr and its constants, whether it is one that is closed over them or not."""
    return (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, core.ClosedJaxpr) else (jaxpr, ())


def is_jaxpr(value: Any) -> bool:
    """Whether a value, such as an option of an equation, is a jaxpr of either kind."""
    return isinstance(value, (core.Jaxpr, core.ClosedJaxpr))


def scan_counts(equation: Any) -> tuple[int, int]:
    """How many operands of a scan are constants, and how many are carried: those without an axis more than in its body."""
    body, _ = open_jaxpr(equation.params['jaxpr'])
    same = lambda outer, inner: [a.aval.ndim == b.aval.ndim for a, b in zip(outer, inner, strict=True)].count(True)  # noqa: E731
    carries = same(equation.outvars, body.outvars)
    return same(equation.invars, body.invars) - carries, carries


def _holds_product(jaxpr: Any) -> bool:
    return any(
        equation.primitive.name in _PRODUCTS or any(_holds_product(inner) for inner in inner_jaxprs(equation))
        for equation in open_jaxpr(jaxpr)[0].eqns
    )


def _analyse(
    jaxpr: Any, origins: Sequence[Origin], names: collections.Counter, length: tuple[int, ...]
) -> tuple[Program, list[Origin]]:
    jaxpr, constants = open_jaxpr(jaxpr)
    known: dict[Any, Origin] = dict(zip(jaxpr.invars, origins, strict=True))
    steps = []

    def read(atom: Any) -> Origin:
        return Origin() if isinstance(atom, core.Literal) else known.get(atom, Origin())

    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        step, results = None, [functools.reduce(_join, operands, Origin())] * len(equation.outvars)
        if equation.primitive.name in _PRODUCTS:
            step = _product(equation, operands, names, length)
        elif (inner := called(equation)) is not None and _holds_product(inner):
            step, results = _analyse(inner, operands, names, length)
        elif equation.primitive.name == 'scan' and _holds_product(equation.params['jaxpr']):
            step, results = _analyse_scan(equation, operands, names, length)
        elif any(_holds_product(inner) for inner in inner_jaxprs(equation)):
            raise ValueError(f'products within {equation.primitive.name!r} are not supported: only within calls and scans')
        steps.append(step)
        known.update(zip(equation.outvars, results, strict=True))
    return Program(jaxpr, constants, tuple(steps)), [read(atom) for atom in jaxpr.outvars]


def _analyse_scan(
    equation: Any, operands: list[Origin], names: collections.Counter, length: tuple[int, ...]
) -> tuple[Program, list[Origin]]:
    constants, carries = scan_counts(equation)
    body, length = equation.params['jaxpr'], (*length, equation.params['length'])
    # What is carried comes from what it was before; three values of `inputs` and `path` settle in as many rounds at most.
    while True:
        _, results = _analyse(body, operands, names.copy(), length)
        carried = [_join(a, b) for a, b in zip(operands[constants : constants + carries], results, strict=False)]
        if carried == operands[constants : constants + carries]:
            return _analyse(body, operands, names, length)
        operands = [*operands[:constants], *carried, *operands[constants + carries :]]


def _product(equation: Any, operands: list[Origin], names: collections.Counter, length: tuple[int, ...]) -> Product | None:
    if not any(operand.inputs for operand in operands):
        return None
    weights = next((i for i, operand in enumerate(operands) if operand.path and not operand.inputs), None)
    path = None if weights is None else operands[weights].path
    if path is None:
        name = f'products/{names["products"]}'
        names['products'] += 1
    else:
        name = f'{path}_{names[path] + 1}' if names[path] else path
        names[path] += 1
    options = dict(equation.params)
    lhs, rhs, output = (
        jax.ShapeDtypeStruct(atom.aval.shape, atom.aval.dtype) for atom in (*equation.invars, *equation.outvars)
    )
    return Product(name, path, weights, equation.primitive.name, options, (lhs, rhs), output, length)


def _join(one: Origin, other: Origin) -> Origin:
    larger = max(one, other, key=lambda origin: origin.size)
    return larger._replace(inputs=one.inputs or other.inputs)
