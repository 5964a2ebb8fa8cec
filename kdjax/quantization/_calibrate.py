"""The ranges of a network's activations, found on batches of inputs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from kdjax import jaxprs
from kdjax.jaxprs import Product
from kdjax.networks import Network
from kdjax.quantization._fake_quantize_network import COLLECTION, SIDES, remembers, traced, unpack, unpack_operands
from kdjax.quantization._ranges import Range, minmax_range, union_range
from kdjax.quantization._rules import Rules, choose


def calibrate(
    network: Network,
    rules: Rules,
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    *,
    estimate: Callable[[jax.Array], Range] = minmax_range,
    join: Callable[[Sequence[Range]], Range] = union_range,
) -> dict[str, Any]:
    """Finds the ranges of activations, static ones and where moving averages start, on batches of inputs.

    The network computes in floating point meanwhile. Every position of the inputs is observed: give sequences without padding,
    or with as much of it as the network will see, for its activations widen the ranges as any others do.

    Args:
      network: in floating point, not yet quantized.
      rules: those that it will be quantized with.
      variables: of the network.
      batches: batches of inputs, `batch['inputs']` of a data set's, any pytree: at least one, all of one shape.
      estimate: the range of one activation: `minmax_range`, `percentile_range`, `mse_range`.
      join: joins those of several batches: `union_range`, or `average_range` after the latter two.

    Returns:
      The variables of the quantized network: those given, and `'quantization'`.

    Raises:
      ValueError: there is no batch, the rules do not fit the network, or it fails on a whole batch, labels and all.

    >>> import jax, jax.numpy as jnp
    >>> from kdjax import models, networks
    >>> from kdjax.quantization import Rule
    >>> network, rule = networks.from_linen(models.MLP((8,), classes=3)), Rule(ranges='static')
    >>> variables = network.init(jax.random.key(0), jnp.ones((1, 4)))
    >>> variables = calibrate(network, rule, variables, [jnp.ones((2, 4)), jnp.zeros((2, 4))])
    >>> variables['quantization']['ranges']['hidden0']['kernel']['lhs']['high']
    Array([[1.]], dtype=float32)
    """

    @jax.jit
    def observe(variables: Mapping[str, Any], inputs: Any) -> dict[str, Any]:
        program, _, leaves = traced(network, variables, inputs, train=False, rng=None)
        chosen = choose('calibrate', rules, jaxprs.products(program))

        def multiply(product: Product, lhs: Any, rhs: Any, state: Any) -> tuple[jax.Array, Any]:
            del state
            operands = unpack_operands(product, (lhs, rhs))
            rule = chosen.get(product.name)
            if rule is None or not remembers(rule):
                return product(*operands), None
            ranges = {side: estimate(operands[i]) for i, side in enumerate(SIDES) if i != product.weights}
            return product(*operands), ranges

        return jaxprs.evaluate(program, leaves, multiply, {}, unpack)[1]

    found = [observe(variables, inputs) for inputs in batches]
    if not found:
        raise ValueError('calibrate: there are no batches; give at least one')
    ranges = {
        product: {side: join([batch[product][side] for batch in found])._asdict() for side in sides}
        for product, sides in found[0].items()
    }
    return {**variables, COLLECTION: {'steps': jnp.int32(0), 'ranges': unflatten_dict(ranges, sep='/')}}
