"""What quantization does to every product of a network: its grids, and how far its weights and its output move."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kdjax import jaxprs
from kdjax.jaxprs import Product
from kdjax.networks import Network
from kdjax.quantization._arrays import fake_quantize
from kdjax.quantization._fake_quantize_network import (
    activation_ranges,
    fake_product,
    stored_ranges,
    traced,
    unpack,
    unpack_operands,
    weight_grid,
)
from kdjax.quantization._ranges import Range, minmax_range
from kdjax.quantization._rules import Rule, Rules, choose


class Site(NamedTuple):
    """A product of a network, and what a rule does to it. Errors are relative: ‖rounded - exact‖ / ‖exact‖.

    Attributes:
      name: of the product.
      rule: that it has, or None if it stays in floating point.
      shape: of its weights, in a scan those of one layer; None if both operands depend on inputs.
      weight_error: of the rounded weights; None if there are none.
      ranges: (low, high) of every operand that is an activation: what its grid covers, or, in floating point, what it holds.
        Of a scanned layer, the widest.
      output_error: of the product when it alone is quantized, on the same inputs.
    """

    name: str
    rule: Rule | None
    shape: tuple[int, ...] | None
    weight_error: float | None
    ranges: tuple[tuple[float, float], ...]
    output_error: float


def report(network: Network, rules: Rules, variables: Mapping[str, Any], inputs: Any) -> list[Site]:
    """Measures every product of a network, each quantized alone, in the order in which the network computes them.

    Args:
      network: in floating point.
      rules: those that it is quantized with.
      variables: of the quantized network; ranges are those that inference would use.
      inputs: a batch of inputs, any pytree; padding counts as any other position.

    Returns:
      The sites; `table` prints them.

    Raises:
      ValueError: as in `fake_quantize_network`.

    >>> import jax, jax.numpy as jnp
    >>> from kdjax import models, networks
    >>> network, rules = networks.from_linen(models.MLP((8,), classes=3)), {'head/*': Rule(ranges='dynamic')}
    >>> variables = network.init(jax.random.key(0), jnp.ones((1, 4)))
    >>> sites = report(network, rules, variables, jnp.ones((2, 4)))
    >>> [(site.name, site.shape, site.rule is not None) for site in sites]
    [('hidden0/kernel', (4, 8), False), ('head/kernel', (8, 3), True)]
    >>> sites[0].ranges, sites[0].output_error, 0 < sites[1].output_error < 0.02
    (((0.0, 1.0),), 0.0, True)
    """
    found: dict[str, tuple[Product, Rule | None]] = {}

    @jax.jit
    def measure(variables: Mapping[str, Any], inputs: Any) -> dict[str, Any]:
        program, _, leaves = traced(network, variables, inputs, train=False, rng=None)
        chosen = choose('report', rules, jaxprs.products(program))
        found.update({product.name: (product, chosen.get(product.name)) for product in jaxprs.products(program)})

        def multiply(product: Product, lhs: Any, rhs: Any, state: Any) -> tuple[jax.Array, Any]:
            operands, rule = unpack_operands(product, (lhs, rhs)), chosen.get(product.name)
            output = product(*operands)
            ranges: list[Range | None] = [None, None]
            rounded, weights = output, None if product.weights is None else operands[product.weights]
            if rule is not None:
                ranges = activation_ranges('report', rule, product, operands, state or {}, jnp.int32(0), False)
                rounded = fake_product(rule, product, operands, ranges)
            seen = [minmax_range(x) if known is None else known for x, known in zip(operands, ranges, strict=True)]
            measured = {
                'ranges': tuple(tuple(end.reshape(()) for end in seen[i]) for i in (0, 1) if i != product.weights),
                'output': _squares(rounded, output),
            }
            if weights is not None:
                grid = None if rule is None else weight_grid(rule, product, weights)
                nearest = (
                    weights
                    if grid is None or rule is None or rule.weights is None
                    else fake_quantize(weights, *grid, bits=rule.weights)
                )
                measured['weights'] = _squares(nearest, weights)
            return output, measured

        return jaxprs.evaluate(program, leaves, multiply, stored_ranges(variables, chosen), unpack)[1]

    measured = jax.device_get(measure(variables, inputs))
    return [_site(product, rule, measured[name]) for name, (product, rule) in found.items()]


def table(sites: Sequence[Site]) -> str:
    """Sites as a table in Markdown; errors in percent.

    >>> print(table([Site('head/kernel', Rule(), (8, 3), 0.004, ((0.0, 1.5),), 0.0061)]))
    | product | weights | bits | activations | bits | range | error of weights | error of output |
    |---|---|---|---|---|---|---|---|
    | head/kernel | 8x3 | 8 | moving_average | 8 | [0, 1.5] | 0.40 % | 0.61 % |
    """
    header = ('product', 'weights', 'bits', 'activations', 'bits', 'range', 'error of weights', 'error of output')
    rows = [header, ('---',) * len(header), *map(_row, sites)]
    return '\n'.join('|---' * len(header) + '|' if row[0] == '---' else f'| {" | ".join(row)} |' for row in rows)


def _row(site: Site) -> tuple[str, ...]:
    rule = site.rule or Rule(weights=None, activations=None)
    return (
        site.name,
        '-' if site.shape is None else 'x'.join(map(str, site.shape)),
        '-' if rule.weights is None or site.shape is None else str(rule.weights),
        '-' if rule.activations is None else rule.ranges,
        '-' if rule.activations is None else str(rule.activations),
        ' x '.join(f'[{low:.4g}, {high:.4g}]' for low, high in site.ranges),
        '-' if site.weight_error is None else f'{100 * site.weight_error:.2f} %',
        f'{100 * site.output_error:.2f} %',
    )


def _squares(rounded: jax.Array, exact: jax.Array) -> tuple[jax.Array, jax.Array]:
    rounded, exact = rounded.astype(jnp.float32), exact.astype(jnp.float32)
    return jnp.sum((rounded - exact) ** 2), jnp.sum(exact**2)


def _site(product: Product, rule: Rule | None, measured: Mapping[str, Any]) -> Site:
    def error(name: str) -> float:
        # Sums over the layers of a scan too.
        difference, exact = (float(squares.sum()) for squares in measured[name])
        return (difference / exact) ** 0.5 if exact else 0.0 if not difference else float('inf')

    return Site(
        product.name,
        rule,
        None if product.weights is None else product.operands[product.weights].shape,
        error('weights') if 'weights' in measured else None,
        tuple((float(low.min()), float(high.max())) for low, high in measured['ranges']),
        error('output'),
    )
