"""Quantization of whole networks, as transformations of their functions.

A network is traced to a jaxpr, and evaluated again with other operands in its products (`kdjax.jaxprs`): it may come from
Linen, NNX or no framework at all, and nothing in it is replaced. What such a network must remember, the ranges of its
activations, is state beside its batch statistics: `variables['quantization']`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from kdjax import jaxprs
from kdjax.jaxprs import Product
from kdjax.networks import Network, Outputs
from kdjax.quantization._arrays import QuantizedArray, fake_quantize
from kdjax.quantization._ranges import Range, minmax_range, moving_average_range
from kdjax.quantization._rules import Rule, Rules, choose
from kdjax.quantization._scales import affine_scale, symmetric_scale, symmetric_scale_of_range
from kdjax.quantization._weights import is_quantized

COLLECTION = 'quantization'
SIDES = ('lhs', 'rhs')


def fake_quantize_network(network: Network, rules: Rules) -> Network:
    """The network with the operands of its products rounded to integer grids, for quantization-aware training.

    The products are those of dense layers, convolutions and attention; everything else stays in floating point. Gradients pass
    through the rounding where an operand lies within its range, so that the student can learn with it. With `train=True` moving
    averages of ranges are renewed. The state `variables['quantization']` holds ranges and the number of training steps; ranges
    that nothing has filled are NaN, and so is the output then.

    Args:
      network: the network.
      rules: its `Rule`, or several.

    Returns:
      A `Network` with the same parameters, which goes through every transformation of JAX that the network does.

    Raises:
      ValueError: from `init` or `apply`, when traced: a pattern matches no product, a rule is invalid, static ranges were not
        calibrated, or a product stands within control flow other than calls and scans.

    >>> import jax, jax.numpy as jnp
    >>> from kdjax import models, networks
    >>> network = fake_quantize_network(networks.from_linen(models.MLP((8,), classes=3)), Rule(ranges='dynamic'))
    >>> variables = network.init(jax.random.key(0), jnp.ones((1, 4)))
    >>> network.apply(variables, jnp.ones((2, 4)))[0].logits.shape
    (2, 3)

    References:
      Jacob et al. Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference. 2018.
      https://arxiv.org/abs/1712.05877
      Krishnamoorthi. Quantizing deep convolutional networks for efficient inference: A whitepaper. 2018.
      https://arxiv.org/abs/1806.08342
    """
    return transform('fake_quantize_network', network, rules, fake_product)


def transform(name: str, network: Network, rules: Rules, multiply: Callable[..., jax.Array]) -> Network:
    """The network with `multiply(rule, product, operands, ranges) -> output` for every product that has a rule."""

    def init(key: jax.Array, inputs: Any) -> dict[str, Any]:
        variables = network.init(key, inputs)
        inputs = jax.tree.map(jnp.zeros_like, inputs)
        program, _, _ = traced(network, variables, inputs, train=False, rng=None)
        chosen = choose(name, rules, jaxprs.products(program))
        empty = {
            product.name: {side: _unknown(product, i) for i, side in enumerate(SIDES) if i != product.weights}
            for product in jaxprs.products(program)
            if product.name in chosen and remembers(chosen[product.name]) and chosen[product.name].ranges == 'moving_average'
        }
        return {**variables, COLLECTION: {'steps': jnp.int32(0), 'ranges': unflatten_dict(empty, sep='/')}}

    def apply(
        variables: Mapping[str, Any], inputs: Any, *, train: bool = False, rng: jax.Array | None = None
    ) -> tuple[Outputs, dict[str, Any]]:
        steps = variables[COLLECTION]['steps'] if COLLECTION in variables else jnp.int32(0)
        program, rebuild, leaves = traced(network, variables, inputs, train=train, rng=rng)
        chosen = choose(name, rules, jaxprs.products(program))
        states = stored_ranges(variables, chosen)

        def evaluate(product: Product, lhs: Any, rhs: Any, state: Any) -> tuple[jax.Array, Any]:
            rule = chosen.get(product.name)
            if rule is None:
                return product(*unpack_operands(product, (lhs, rhs))), None
            ranges = activation_ranges(name, rule, product, (lhs, rhs), state or {}, steps, train)
            if rule.ranges == 'moving_average':
                state = {side: range_._asdict() for side, range_ in zip(SIDES, ranges, strict=True) if range_ is not None}
            return multiply(rule, product, (lhs, rhs), ranges), state or None

        results, changed = jaxprs.evaluate(program, leaves, evaluate, states, unpack)
        outputs, state = rebuild(results)
        steps = steps + jnp.int32(1) if train else steps
        return outputs, {**state, COLLECTION: {'steps': steps, 'ranges': unflatten_dict({**states, **changed}, sep='/')}}

    return Network(init, apply)


def fake_product(rule: Rule, product: Product, operands: Sequence[Any], ranges: Sequence[Range | None]) -> jax.Array:
    """The product of operands on their grids, in floating point."""
    rounded = []
    for i, (operand, range_) in enumerate(zip(unpack_operands(product, operands), ranges, strict=True)):
        grid = weight_grid(rule, product, operand) if i == product.weights else activation_grid(rule, range_)
        bits = rule.weights if i == product.weights else rule.activations
        rounded.append(operand if grid is None or bits is None else fake_quantize(operand, *grid, bits=bits))
    return product(*rounded)


def weight_grid(rule: Rule, product: Product, weights: jax.Array) -> tuple[jax.Array, None] | None:
    """Scale of weights, for every output channel or for all."""
    if rule.weights is None or product.weights is None:
        return None
    channels = tuple(product.kept(product.weights)) if rule.per_channel else None
    return symmetric_scale(jax.lax.stop_gradient(weights), channel_axis=channels, bits=rule.weights), None


def activation_grid(rule: Rule, range_: Range | None) -> tuple[jax.Array, jax.Array | None] | None:
    """Scale and zero point of activations."""
    if range_ is None or rule.activations is None:
        return None
    if rule.symmetric:
        return symmetric_scale_of_range(*range_, bits=rule.activations), None
    return affine_scale(*range_, bits=rule.activations)


def activation_ranges(
    name: str,
    rule: Rule,
    product: Product,
    operands: Sequence[Any],
    state: Mapping[str, Mapping[str, jax.Array]],
    steps: jax.Array,
    train: bool,
) -> list[Range | None]:
    """The ranges that operands are quantized on, renewed if `train`; None for weights and what no rule quantizes."""

    def find(operand: jax.Array, known: Mapping[str, jax.Array] | None) -> Range:
        operand = jax.lax.stop_gradient(operand)
        if rule.ranges == 'dynamic':
            return minmax_range(operand)
        if known is None:
            raise ValueError(f'{name}: {product.name} has no range; use the variables that `calibrate` returns')
        average = Range(**known)
        if rule.ranges == 'static' or not train:
            return average
        first, frozen = jnp.isnan(average.low), rule.freeze is not None and steps >= rule.freeze
        ends = zip(average, minmax_range(operand), moving_average_range(average, operand, decay=rule.decay), strict=True)
        return Range(*(jnp.where(first, new, jnp.where(frozen, old, renewed)) for old, new, renewed in ends))

    return [
        None if rule.activations is None or i == product.weights else find(operand, state.get(SIDES[i]))
        for i, operand in enumerate(operands)
    ]


def remembers(rule: Rule) -> bool:
    """Whether a rule has ranges that are kept."""
    return rule.activations is not None and rule.ranges != 'dynamic'


def traced(network: Network, variables: Mapping[str, Any], inputs: Any, *, train: bool, rng: Any) -> tuple[Any, Any, list[Any]]:
    """The program of a network's `apply`, what makes its results of their leaves, and the leaves of its arguments."""
    variables = {name: value for name, value in variables.items() if name != COLLECTION}
    return jaxprs.trace_network(network, variables, inputs, train=train, rng=rng, packed=QuantizedArray)


def unpack(value: Any) -> Any:
    """The numbers of a quantized array; anything else as it is."""
    return value.dequantize() if is_quantized(value) else value


def unpack_operands(product: Product, operands: Sequence[Any]) -> list[jax.Array]:
    """Operands as numbers of the types that the product takes; those of integers, a cast of which was skipped, are float32."""
    return [unpack(x).astype(like.dtype) for x, like in zip(operands, product.operands, strict=True)]


def stored_ranges(variables: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The ranges in a quantized network's variables, by product, of those that have any."""
    ranges = variables.get(COLLECTION, {'ranges': {}})['ranges']
    return {name: found for name in names if (found := _get(ranges, name)) is not None}


def _get(tree: Any, name: str) -> Any:
    for key in name.split('/'):
        if key not in tree:
            return None
        tree = tree[key]
    return tree


def _unknown(product: Product, operand: int) -> dict[str, jax.Array]:
    shape = (*product.length, *(1,) * len(product.operands[operand].shape))
    return {end: jnp.full(shape, jnp.nan) for end in Range._fields}
