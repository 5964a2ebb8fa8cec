"""Batch norms folded into the products before them, so that quantization sees the weights that inference multiplies by."""

import collections
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from kdjax import jaxprs, paths
from kdjax.jaxprs import Product, Program
from kdjax.networks import Network
from kdjax.quantization._fake_quantize_network import COLLECTION, traced
from kdjax.quantization._weights import is_quantized

_LAYOUT = ('reshape', 'broadcast_in_dim', 'convert_element_type', 'squeeze')


def fold_batch_norm(network: Network, variables: Mapping[str, Any], inputs: Any) -> dict[str, Any]:
    """Moves what batch norms multiply by into the weights before them; the module stays, and so do its outputs in inference.

    A batch norm in inference is (y - mean) · m + shift with m = scale / √(variance + ε). Where y = x · kernel + bias is the
    output of a dense layer or convolution, per output channel

        kernel' = kernel · m,   bias' = bias · m,   mean' = mean · m,   scale' = scale / m,

    so that the batch norm multiplies by one and only adds; where m is 0, the scale stays 0. A scale for the whole kernel
    (`Rule(per_channel=False)`) is then that of the weights that inference multiplies by. The variables are for inference, and
    for training with batch norms that stay as they are: in training, a batch norm divides by the deviation of the batch,
    whatever was folded.

    Left alone is a batch norm without a scale, one that follows no product, as before an activation, and one whose product or
    whose parameters are used anywhere else, tapped features among it, or within a scan.

    Args:
      network: a network of Linen's or NNX's batch norms, in floating point.
      variables: its parameters and `'batch_stats'`.
      inputs: a batch of inputs; only its shapes count.

    Returns:
      The variables with other numbers.

    Raises:
      ValueError: the network has no batch norm, or its weights are integers already.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> from kdjax import networks
    >>> module = nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=True, epsilon=0.0)])
    >>> network = networks.from_linen(module)
    >>> variables = network.init(jax.random.key(0), jnp.ones((1, 2)))
    >>> variables['params']['layers_1']['scale'] = jnp.array([2.0, 0.5, 1.0])
    >>> folded = fold_batch_norm(network, variables, jnp.ones((1, 2)))
    >>> print(folded['params']['layers_1']['scale'])
    [1. 1. 1.]
    >>> print(folded['params']['layers_0']['kernel'] / variables['params']['layers_0']['kernel'])
    [[2.  0.5 1. ]
     [2.  0.5 1. ]]

    Reference:
      Jacob et al. Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference. 2018.
      https://arxiv.org/abs/1712.05877
    """
    variables = dict(variables)
    if any(map(is_quantized, jax.tree.leaves(variables, is_leaf=is_quantized))):
        raise ValueError('fold_batch_norm: weights are integers; fold them before quantize_variables')
    named = paths.leaves_with_paths({name: value for name, value in variables.items() if name != COLLECTION})
    program, _, leaves = traced(network, variables, inputs, train=False, rng=None)
    record = _Record(collections.Counter(), [], set(), itertools.count())
    arguments: list[Any] = [_Known(leaf, path) for path, leaf in named.items()]
    arguments += [_Computed(next(record.numbers)) for _ in leaves[len(arguments) :]]
    for output in _follow(program, arguments, record):
        if isinstance(output, _Computed):
            record.uses[output.number] += 1
    if not record.means:
        raise ValueError('fold_batch_norm: nothing subtracts a mean from batch_stats; give a network with batch norms')
    factors: dict[str, jax.Array] = {}
    for layer, multiplier in record.folds:
        factors |= _factors(layer, multiplier, named, record.uses)
    return paths.map_with_paths(lambda path, leaf: _times(leaf, factors[path]) if path in factors else leaf, variables)


class _Known(NamedTuple):
    """A value that comes from variables alone; the variable that it is in another layout, or is a multiple of."""

    value: Any
    path: str | None = None
    multiple_of: str | None = None


class _Layer(NamedTuple):
    """A product whose output a batch norm may take, as far as its output has come."""

    kernel: str
    shape: tuple[int, ...]
    axes: Mapping[int, int]
    steps: tuple[int, ...]
    bias: str | None = None
    mean: str | None = None


class _Computed(NamedTuple):
    """A value that inputs have a part in."""

    number: int
    layer: _Layer | None = None


class _Record(NamedTuple):
    """What a walk finds: how often values are used, batch norms that may be folded, and the means of all."""

    uses: collections.Counter
    folds: list[tuple[_Layer, _Known]]
    means: set[str]
    numbers: Iterator[int]


def _follow(program: Program, arguments: Sequence[Any], record: _Record) -> list[Any]:
    """Walks a program with calls in their place, and returns what is known of its results."""
    jaxpr = program.jaxpr
    given = [*map(_Known, program.constants), *arguments]
    values: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], given, strict=True))

    def read(atom: Any) -> Any:
        return _Known(atom.val) if isinstance(atom, core.Literal) else values[atom]

    for equation, step in zip(jaxpr.eqns, program.steps, strict=True):
        operands = [read(atom) for atom in equation.invars]
        if (inner := jaxprs.called(equation)) is not None:
            outputs = _follow(step if step is not None else jaxprs.without_products(inner), operands, record)
        elif all(isinstance(operand, _Known) for operand in operands):
            outputs = _compute(jaxpr, equation, operands, record)
        else:
            for operand in operands:
                _use(operand, record)
            outputs = [_Computed(next(record.numbers)) for _ in equation.outvars]
            if outputs:
                outputs[0] = outputs[0]._replace(layer=_advance(equation, step, operands, outputs[0].number, record))
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _compute(jaxpr: Any, equation: Any, operands: list[_Known], record: _Record) -> list[_Known]:
    results = jaxprs.bind(jaxpr, equation, [operand.value for operand in operands])
    name = equation.primitive.name
    if name in _LAYOUT:
        return [operands[0]._replace(value=result) for result in results]
    scales = [x.path for x in operands if (x.path or '').startswith('params/')]
    if name == 'mul' and len(scales) == 1:
        return [_Known(result, multiple_of=scales[0]) for result in results]
    for operand in operands:
        _use(operand, record)
    return [_Known(result) for result in results]


def _advance(equation: Any, step: Any, operands: list[Any], number: int, record: _Record) -> _Layer | None:
    """The layer whose output the result of an equation is."""
    if isinstance(step, Product):
        weights = None if step.weights is None else operands[step.weights]
        if step.weights is None or not isinstance(weights, _Known) or weights.path is None:
            return None
        return _Layer(weights.path, jnp.shape(weights.value), step.kept(step.weights), (number,))
    name = equation.primitive.name
    subtracted = operands[1].path if name == 'sub' and isinstance(operands[1], _Known) else None
    if subtracted is not None and subtracted.startswith('batch_stats/'):
        record.means.add(subtracted)
    layer = next((x.layer for x in operands if isinstance(x, _Computed) and x.layer is not None), None)
    if layer is None:
        return None
    layer = layer._replace(steps=(*layer.steps, number))
    if name == 'convert_element_type':
        return layer
    known = next((x for x in operands if isinstance(x, _Known)), None)
    if known is None:
        return None
    if name == 'add' and layer.bias is None and layer.mean is None and (known.path or '').startswith('params/'):
        return layer._replace(bias=known.path)
    if name == 'sub' and layer.mean is None and operands[1] is known and known.path in record.means:
        return layer._replace(mean=known.path)
    if name == 'mul' and layer.mean is not None and known.multiple_of is not None:
        record.folds.append((layer._replace(steps=layer.steps[:-1]), known))
    return None


def _use(operand: Any, record: _Record) -> None:
    key = operand.number if isinstance(operand, _Computed) else operand.path or operand.multiple_of
    if key is not None:
        record.uses[key] += 1


def _factors(layer: _Layer, multiplier: _Known, named: Mapping[str, Any], uses: Mapping[Any, int]) -> dict[str, jax.Array]:
    """What to multiply variables by, or nothing where that would change more than the one layer."""
    m = jnp.asarray(multiplier.value)
    vectors = [path for path in (layer.bias, layer.mean) if path is not None]
    scale = multiplier.multiple_of
    alone = all(uses[value] == 1 for value in (*layer.steps, layer.kernel, scale, *vectors))
    axes = sorted(layer.axes)
    channels = math.prod(m.shape[layer.axes[axis]] for axis in axes)
    fits = named[layer.kernel].shape == layer.shape and channels == m.size
    if scale is None or not (alone and fits and all(named[path].size == m.size for path in (scale, *vectors))):
        return {}
    out = [layer.axes[axis] for axis in axes]
    shape = [m.shape[layer.axes[axis]] if axis in layer.axes else 1 for axis in range(len(layer.shape))]
    kernel = jnp.transpose(m, (*out, *(axis for axis in range(m.ndim) if axis not in out))).reshape(shape)
    inverse = jnp.where(m == 0, jnp.ones_like(m), 1 / jnp.where(m == 0, jnp.ones_like(m), m))
    return {layer.kernel: kernel, scale: inverse.reshape(named[scale].shape)} | {
        path: m.reshape(named[path].shape) for path in vectors
    }


def _times(leaf: jax.Array, factor: jax.Array) -> jax.Array:
    return (leaf.astype(factor.dtype) * factor).astype(leaf.dtype)
