"""Rules: which products of a network are quantized, and how."""

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple, get_args

from kdjax.jaxprs import Product
from kdjax.paths import matching
from kdjax.quantization._arrays import integer_range

Ranges = Literal['moving_average', 'static', 'dynamic']
RANGES = get_args(Ranges)


class Rule(NamedTuple):
    """How the operands of a product are quantized.

    Weights, operands that come from parameters alone, have symmetric grids on the narrow range, and scales that follow them.
    Activations have one range for all, from one of:

    - `'moving_average'`: of what training sees, and fixed in evaluation;
    - `'static'`: what `calibrate` found;
    - `'dynamic'`: each batch's own.

    Attributes:
      weights: bits of weights, 2 to 8; None to leave them in floating point.
      activations: bits of activations; None to leave them.
      ranges: where the ranges of activations come from.
      symmetric: whether grids of activations are symmetric too; asymmetric ones have a zero point, and waste nothing after a
        ReLU.
      per_channel: whether weights have a scale for each output channel, or one for all.
      decay: of the moving average.
      freeze: the training step from which on moving averages stay as they are; None for never.
    """

    weights: int | None = 8
    activations: int | None = 8
    ranges: Ranges = 'moving_average'
    symmetric: bool = False
    per_channel: bool = True
    decay: float = 0.99
    freeze: int | None = None


Rules = Rule | Mapping[str, Rule | None]
"""One rule for every product, or rules by patterns over their names, of which the first that matches counts; None, or no
pattern that matches, leaves a product as it is. A product is named by its parameter, `'stage0/conv/kernel'`, or `'products/0'`
if it has none."""


def choose(name: str, rules: Rules, products: Iterable[Product]) -> dict[str, Rule]:
    """The rules of those products that have one, by product.

    Raises:
      ValueError: there is nothing to quantize, a pattern matches no product, or a rule is invalid.
    """
    names = [product.name for product in products]
    if isinstance(rules, Rule):
        rules = {'*': rules}
    if not names or not rules:
        raise ValueError(f'{name}: the network has no product of inputs with parameters, or there are no rules')
    for pattern, rule in rules.items():
        matching([pattern], names)
        if rule is not None:
            _check(name, rule)
    chosen = {}
    for product in names:
        rule = next((rule for pattern, rule in rules.items() if fnmatch.fnmatchcase(product, pattern)), None)
        if rule is not None:
            chosen[product] = rule
    return chosen


def _check(name: str, rule: Rule) -> None:
    for bits in (rule.weights, rule.activations):
        if bits is not None:
            integer_range(bits, narrow=True)
    if rule.ranges not in RANGES:
        raise ValueError(f'{name}: ranges must be one of {", ".join(RANGES)}, got {rule.ranges!r}')
    if not 0 <= rule.decay <= 1:
        raise ValueError(f'{name}: decay must be between 0 and 1, got {rule.decay}')
