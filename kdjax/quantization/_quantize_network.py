"""The quantized network in integer arithmetic: int8 operands, int32 sums, and the weights stored as the integers they are."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kdjax import jaxprs, paths
from kdjax.jaxprs import Product
from kdjax.networks import Network
from kdjax.quantization._arrays import QuantizedArray, quantize
from kdjax.quantization._fake_quantize_network import (
    COLLECTION,
    activation_grid,
    fake_product,
    traced,
    transform,
    unpack,
    weight_grid,
)
from kdjax.quantization._ranges import Range
from kdjax.quantization._rules import Rule, Rules, choose
from kdjax.quantization._scales import symmetric_scale
from kdjax.quantization._weights import dequantize_weights, is_quantized


def quantize_network(network: Network, rules: Rules) -> Network:
    """The network that `fake_quantize_network(network, rules)` stands for, with products of integers.

    Operands are rounded to int8, multiplied and summed in int32, and scaled afterwards: the outputs are those of the
    fake-quantized network up to the rounding of floats. A product of which only one operand is quantized stays in floating
    point. Variables are those of the fake-quantized network, or what `quantize_variables` makes of them. It is for inference:
    it has no useful gradient. XLA does not promise that it is faster.

    Args:
      network: in floating point.
      rules: as in `fake_quantize_network`.

    Returns:
      The network.

    Raises:
      ValueError: as in `fake_quantize_network`; a convolution has batch groups.

    >>> import jax, jax.numpy as jnp
    >>> from kdjax import models, networks
    >>> network, rule = networks.from_linen(models.MLP((8,), classes=3)), Rule(ranges='dynamic')
    >>> quantized = quantize_network(network, rule)
    >>> variables = quantize_variables(network, rule, network.init(jax.random.key(0), jnp.ones((1, 4))), jnp.ones((1, 4)))
    >>> variables['params']['head']['kernel'].values.dtype
    dtype('int8')
    >>> quantized.apply(variables, jnp.ones((2, 4)))[0].logits.shape
    (2, 3)
    """
    return transform('quantize_network', network, rules, integer_product)


def quantize_variables(network: Network, rules: Rules, variables: Mapping[str, Any], inputs: Any) -> dict[str, Any]:
    """The variables of a quantized network with the weights as `QuantizedArray`s, on the grids that the rules give them.

    Weights stay in floating point where no rule quantizes them, where the network changes them before it multiplies or uses
    them for anything else, as embeddings are, and where it multiplies them in several ways that need different grids.

    Args:
      network: in floating point.
      rules: those that it is quantized with.
      variables: in floating point.
      inputs: a batch of inputs, any pytree; only its shapes count.

    Returns:
      The variables, for `quantize_network`, `fake_quantize_network` and `export`.

    Raises:
      ValueError: the rules do not fit the network.
    """
    found: dict[str, set[_Way]] = {}

    def unmark(value: Any) -> Any:
        # For what is no product.
        if isinstance(value, _Marked):
            found.setdefault(value.path, set()).add(_Way())
        return _unmark(value)

    def observe(params: Any, inputs: Any) -> Any:
        marked = paths.map_with_paths(lambda path, leaf: _Marked(leaf, path) if leaf.ndim >= 2 else leaf, params)
        program, _, _ = traced(network, {**variables, 'params': params}, inputs, train=False, rng=None)
        chosen = choose('quantize_variables', rules, jaxprs.products(program))
        arguments = {**{name: value for name, value in variables.items() if name != COLLECTION}, 'params': marked}

        def multiply(product: Product, lhs: Any, rhs: Any, state: Any) -> tuple[jax.Array, Any]:
            del state
            operands = [lhs, rhs]
            if product.weights is not None and isinstance(weights := operands[product.weights], _Marked):
                depth = sizes[weights.path] - weights.array.ndim
                rule = chosen.get(product.name, Rule(weights=None))
                channels = (*range(depth), *(axis + depth for axis in product.kept(product.weights)))
                channels = channels if rule.per_channel else tuple(range(depth))
                way = _Way(rule.weights, channels, product.operands[product.weights].dtype)
                found.setdefault(weights.path, set()).add(way)
            numbers = [_unmark(x).astype(like.dtype) for x, like in zip(operands, product.operands, strict=True)]
            return product(*numbers), None

        leaves = jax.tree.leaves((arguments, inputs), is_leaf=lambda leaf: isinstance(leaf, _Marked))
        return jaxprs.evaluate(program, leaves, multiply, {}, unmark)[0]

    params = dequantize_weights(variables['params'])
    sizes = {path: leaf.ndim for path, leaf in paths.leaves_with_paths(params).items()}
    jax.eval_shape(observe, params, inputs)

    def convert(path: str, leaf: jax.Array) -> Any:
        ways = found.get(path, set())
        way = next(iter(ways)) if len(ways) == 1 else _Way()
        if way.bits is None:
            return leaf
        scale = symmetric_scale(leaf.astype(way.dtype), channel_axis=way.channels, bits=way.bits)
        return QuantizedArray(quantize(leaf.astype(way.dtype), scale, bits=way.bits), scale, bits=way.bits)

    return {**variables, 'params': paths.map_with_paths(convert, params)}


def integer_product(rule: Rule, product: Product, operands: Sequence[Any], ranges: Sequence[Range | None]) -> jax.Array:
    """The product of operands as integers, scaled back to numbers."""
    quantized = []
    for i, (operand, range_) in enumerate(zip(operands, ranges, strict=True)):
        if i == product.weights and _fits(rule, product, operand):
            quantized.append(operand)
            continue
        operand = unpack(operand).astype(product.operands[i].dtype)
        grid = weight_grid(rule, product, operand) if i == product.weights else activation_grid(rule, range_)
        bits = rule.weights if i == product.weights else rule.activations
        if grid is None or bits is None:
            return fake_product(rule, product, operands, ranges)
        quantized.append(QuantizedArray(quantize(operand, *grid, bits=bits), *grid, bits=bits))
    sums = _integer_sums(product, *quantized)
    scales = [product.place(i, jnp.broadcast_to(x.scale, _one_per_channel(product, i, x))) for i, x in enumerate(quantized)]
    return (sums.astype(jnp.float32) * scales[0] * scales[1]).astype(product.output.dtype)


def _integer_sums(product: Product, lhs: QuantizedArray, rhs: QuantizedArray) -> jax.Array:
    """Σ (lhs - its zero point)(rhs - its zero point), in int32, from products of int8."""
    zeros = [None if x.zero_point is None else x.zero_point.reshape(()).astype(jnp.int32) for x in (lhs, rhs)]
    if product.primitive == 'conv_general_dilated':
        if product.options['batch_group_count'] != 1:
            raise ValueError(f'quantize_network: {product.name} is a convolution with batch groups; give it no rule')
        sums = _convolve(product, lhs, rhs)
    else:
        sums = product(lhs.values, rhs.values, preferred_element_type=jnp.int32, precision=None)
    if zeros[0] is not None:
        sums = sums - zeros[0] * product.place(1, _totals(product, 1, rhs))
    if zeros[1] is not None:
        if product.primitive == 'conv_general_dilated':
            raise ValueError(f'quantize_network: {product.name} convolves with activations; give it a symmetric rule')
        sums = sums - zeros[1] * product.place(0, _totals(product, 0, lhs))
        if zeros[0] is not None:
            count = jnp.int32(lhs.values.size // max(1, _totals(product, 0, lhs).size))
            sums = sums + count * zeros[0] * zeros[1]
    return sums


def _convolve(product: Product, lhs: QuantizedArray, rhs: QuantizedArray) -> jax.Array:
    """The convolution of the integers of both, in int32."""
    values, rest = _padded(product, lhs)

    def widened(dtype: Any) -> Callable[[jax.Array, jax.Array], jax.Array]:
        def convolve(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
            options = {**rest, 'preferred_element_type': dtype, 'precision': None}
            return product(lhs.astype(dtype), rhs.astype(dtype), **options).astype(jnp.int32)

        return convolve

    # Widened first: XLA turns this into a convolution of int8 where a device has one, and on CPUs (jax 0.10 to 0.12) it
    # miscompiles one of int8 with a sum in int32 whose operand was padded. One of int32 it runs there in plain loops, 30 times
    # slower than one of float32, which is exact too as long as no sum can reach 2^24.
    terms = math.prod(rhs.shape[axis] for axis in product.contracted(1))
    if terms * 128 * 128 >= 2**24:
        return widened(jnp.int32)(values, rhs.values)
    return jax.lax.platform_dependent(values, rhs.values, cpu=widened(jnp.float32), default=widened(jnp.int32))


def _padded(product: Product, lhs: QuantizedArray) -> tuple[jax.Array, dict[str, Any]]:
    """The left operand with the padding that a convolution wants, of what stands for zero, and the options that are left."""
    spatial = product.options['dimension_numbers'].lhs_spec[2:]
    dilation = product.options['lhs_dilation'] or (1,) * len(spatial)
    config = [(0, 0, 0)] * lhs.ndim
    for axis, (before, after), step in zip(spatial, product.options['padding'], dilation, strict=True):
        config[axis] = (before, after, step - 1)
    zero = jnp.int8(0) if lhs.zero_point is None else lhs.zero_point.reshape(()).astype(jnp.int8)
    ones = (1,) * len(spatial)
    return jax.lax.pad(lhs.values, zero, config), {'padding': [(0, 0)] * len(spatial), 'lhs_dilation': ones}


def _totals(product: Product, operand: int, x: QuantizedArray) -> jax.Array:
    return jnp.sum(x.values, axis=product.contracted(operand), keepdims=True, dtype=jnp.int32)


def _one_per_channel(product: Product, operand: int, x: QuantizedArray) -> tuple[int, ...]:
    return tuple(1 if axis in product.contracted(operand) else length for axis, length in enumerate(x.shape))


def _fits(rule: Rule, product: Product, weights: Any) -> bool:
    """Whether weights are integers on a grid that does not change along a sum."""
    if not is_quantized(weights) or rule.weights is None or product.weights is None or weights.zero_point is not None:
        return False
    shape = jnp.shape(weights.scale)
    return len(shape) == weights.ndim and all(
        length in (1, full) and (length == 1 or axis not in product.contracted(product.weights))
        for axis, (length, full) in enumerate(zip(shape, weights.shape, strict=True))
    )


class _Way(NamedTuple):
    """How weights are used: the bits, channels and type of a product that is quantized, or none of these."""

    bits: int | None = None
    channels: tuple[int, ...] = ()
    dtype: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Marked:
    """A parameter that knows its path, until something changes it."""

    array: Any
    path: str = dataclasses.field(metadata={'static': True})


def _unmark(value: Any) -> Any:
    return value.array if isinstance(value, _Marked) else value
