"""Low-rank factorisation: one large product becomes two small ones."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import jaxprs, paths
from kdjax.jaxprs import Product
from kdjax.networks import Network, Outputs
from kdjax.paths import Leaves, kernels, select


def factorize(
    network: Network, variables: Mapping[str, Any], inputs: Any, *, energy: float, leaves: Leaves = kernels
) -> tuple[Network, dict[str, Any]]:
    """Replaces kernels W by the product of two thinner ones, from their singular value decomposition.

    Of the singular values σ, the r largest are kept, with the smallest r for which Σ_{i ≤ r} σᵢ² ≥ energy · Σ σᵢ². A dense
    kernel [inputs, outputs] becomes [inputs, r] and [r, outputs]; a convolution's [height, width, inputs, outputs] a
    convolution to r channels and one of 1x1. A kernel stays whole where that would not be smaller, and where the network does
    not use it in exactly one product as it is: within scans, where it is tied, in grouped convolutions.

    Args:
      network: any.
      variables: its variables.
      inputs: a batch of inputs, any pytree; only its shapes count.
      energy: the share of the squared singular values to keep, in (0, 1].
      leaves: which parameters.

    Returns:
      The network that computes the two products, and its variables, in which `{'left': ..., 'right': ...}` stands for each
      kernel that was factorised. Both are trained, pruned, quantized and stored as any others.

    Raises:
      ValueError: energy lies outside (0, 1], or `leaves` picks nothing.

    >>> import jax, jax.numpy as jnp
    >>> from kdjax import models, networks
    >>> network = networks.from_linen(models.MLP((64,)))
    >>> variables = network.init(jax.random.key(0), jnp.ones((1, 64)))
    >>> thinner, factors = factorize(network, variables, jnp.ones((1, 64)), energy=0.5, leaves='hidden0/kernel')
    >>> [factor.shape[0] for factor in factors['params']['hidden0']['kernel'].values()][0]
    64
    >>> thinner.apply(factors, jnp.ones((2, 64)))[0].logits.shape
    (2, 10)

    Reference:
      Denton, Zaremba, Bruna, LeCun, Fergus. Exploiting Linear Structure Within Convolutional Networks for Efficient
      Evaluation. 2014. https://arxiv.org/abs/1404.0736
    """
    if not 0 < energy <= 1:
        raise ValueError(f'factorize: energy must be above 0 and at most 1, got {energy}')
    chosen = select(leaves, variables['params'])
    program, _, _ = jaxprs.trace_network(network, variables, inputs)
    found = [product for product in jaxprs.products(program) if product.weights is not None]
    factors = {
        product.name: pair
        for product in found
        if product.name in chosen
        and _is_alone(product, chosen[product.name], [other.name for other in found])
        and (pair := _split(product, chosen[product.name], energy)) is not None
    }
    ranks = {path: pair['left'].shape[-1] for path, pair in factors.items()}

    def init(key: jax.Array, inputs: Any) -> dict[str, Any]:
        fresh = network.init(key, inputs)
        named = paths.leaves_with_paths(fresh['params'])
        split = [(p, named[p.name]) for p in found if p.name in ranks]
        pairs = {p.name: _factors(p, kernel, _decompose(p, kernel), ranks[p.name]) for p, kernel in split}
        return {**fresh, 'params': _put(fresh['params'], pairs)}

    def apply(
        variables: Mapping[str, Any], inputs: Any, *, train: bool = False, rng: jax.Array | None = None
    ) -> tuple[Outputs, dict[str, Any]]:
        packed = {**variables, 'params': _pack(variables['params'], ranks)}
        program, rebuild, leaves = jaxprs.trace_network(network, packed, inputs, train=train, rng=rng, packed=_Factors)
        return rebuild(jaxprs.evaluate(program, leaves, _multiply, {}, _unpack)[0])

    return Network(init, apply), {**variables, 'params': _put(variables['params'], factors)}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Factors:
    """Two kernels that stand for one of this shape."""

    left: jax.Array
    right: jax.Array
    shape: tuple[int, ...] = dataclasses.field(metadata={'static': True})


def _is_alone(product: Product, leaf: jax.Array, names: list[str]) -> bool:
    numbers = product.options['dimension_numbers']
    plain = (
        product.options['feature_group_count'] == product.options['batch_group_count'] == 1
        if product.primitive == 'conv_general_dilated'
        else not numbers[1][1]
    )
    last = product.weights == 1 and max(product.contracted(1)) < min(product.kept(1))
    is_leaf = product.operands[1].shape == leaf.shape
    return plain and last and is_leaf and not product.length and f'{product.name}_2' not in names


def _split(product: Product, kernel: jax.Array, energy: float) -> dict[str, jax.Array] | None:
    rows, columns = _matrix_shape(product, kernel.shape)
    decomposition = _decompose(product, kernel)
    squares = np.asarray(decomposition[1], np.float64) ** 2
    # Rounding must not ask for more than there is.
    rank = int(np.searchsorted(np.cumsum(squares), energy * squares.sum() * (1 - 1e-12))) + 1
    return _factors(product, kernel, decomposition, rank) if rank * (rows + columns) < rows * columns else None


def _decompose(product: Product, kernel: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    matrix = kernel.astype(jnp.float32).reshape(_matrix_shape(product, kernel.shape))
    u, values, v = jnp.linalg.svd(matrix, full_matrices=False)
    return u, values, v


def _factors(product: Product, kernel: jax.Array, decomposition: Any, rank: int) -> dict[str, jax.Array]:
    u, values, v = decomposition
    roots = jnp.sqrt(values[:rank])
    left, right = u[:, :rank] * roots[None, :], roots[:, None] * v[:rank]
    contracted = [kernel.shape[axis] for axis in product.contracted(1)]
    ones = [1] * (len(contracted) - 1) if product.primitive == 'conv_general_dilated' else []
    kept = [kernel.shape[axis] for axis in product.kept(1)]
    return {
        'left': left.reshape(*contracted, rank).astype(kernel.dtype),
        'right': right.reshape(*ones, rank, *kept).astype(kernel.dtype),
    }


def _matrix_shape(product: Product, shape: tuple[int, ...]) -> tuple[int, int]:
    rows = math.prod(shape[axis] for axis in product.contracted(1))
    return rows, math.prod(shape) // rows


def _multiply(product: Product, lhs: Any, rhs: Any, state: Any) -> tuple[jax.Array, None]:
    del state
    if not isinstance(rhs, _Factors):
        return product(_unpack(lhs), _unpack(rhs)), None
    lhs, right = _unpack(lhs), rhs.right.astype(product.operands[1].dtype)
    inner = product(lhs, rhs.left.astype(product.operands[1].dtype))
    if product.primitive == 'conv_general_dilated':
        numbers = product.options['dimension_numbers']
        ones = (1,) * (inner.ndim - 2)
        same = {'window_strides': ones, 'padding': [(0, 0)] * len(ones), 'lhs_dilation': ones, 'rhs_dilation': ones}
        layout = jax.lax.ConvDimensionNumbers(numbers.out_spec, numbers.rhs_spec, numbers.out_spec)
        return product(inner, right, **same, dimension_numbers=layout), None
    return product(inner, right, dimension_numbers=(((inner.ndim - 1,), (0,)), ((), ()))), None


def _unpack(value: Any) -> Any:
    if not isinstance(value, _Factors):
        return value
    rank = value.left.shape[-1]
    return (value.left.reshape(-1, rank) @ value.right.reshape(rank, -1)).reshape(value.shape)


def _put(params: Mapping[str, Any], factors: Mapping[str, Any]) -> dict[str, Any]:
    return paths.map_with_paths(lambda path, leaf: factors.get(path, leaf), dict(params))


def _pack(params: Any, ranks: Mapping[str, int], prefix: str = '') -> Any:
    if not isinstance(params, Mapping):
        return params
    if prefix in ranks:
        left, right = params['left'], params['right']
        kept = right.shape[left.ndim - 1 :] if right.ndim == left.ndim else right.shape[1:]
        return _Factors(left, right, (*left.shape[:-1], *kept))
    return {name: _pack(child, ranks, f'{prefix}/{name}' if prefix else name) for name, child in params.items()}
