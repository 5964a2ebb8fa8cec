"""What parts of a network are worth by what they compute on data, rather than by their weights."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import jaxprs, numerics
from kdjax.jaxprs import Product
from kdjax.meshes import on_any_mesh
from kdjax.networks import Network
from kdjax.paths import leaves_with_paths
from kdjax.pruning._scores import Scores


def activation_norms(network: Network, variables: Mapping[str, Any], batches: Iterable[Any], *, order: float = 1) -> Scores:
    """Minitron's importance by activations: how large what each kernel reads is, for every channel that it reads.

    (mean |x|^p)^(1/p) over all examples and positions of what enters a product with the kernel, channel by channel: mean
    absolute activations for p = 1, their root mean square for p = 2. It is the importance of the hidden units of an MLP at the
    kernel behind them, of the channels of a residual stream at those behind its norms, and that of a head is the sum over its
    channels at the projection behind the attention. `channels.masks(scores, sparsity)` of `channel_groups` chooses by it.

    Every position counts: give sequences without padding.

    Args:
      network: any; it is evaluated with `train=False`.
      variables: of the network.
      batches: calibration data: batches of inputs, `batch['inputs']` of a data set's, at least one.
      order: p, positive.

    Returns:
      float32 scores for all parameters, by path. A kernel's have its length along the axes that it reads along, and 1 along
      the others; those of arrays that are no kernel, or one only once reshaped, are 0, of
      length 1 along all axes.

    Raises:
      ValueError: there is no batch, `order` is not positive, the network has no kernel, or it fails on a batch.

    >>> import jax, jax.numpy as jnp
    >>> from kdjax import models, networks, pruning
    >>> network = networks.from_linen(models.MLP((4,), classes=3))
    >>> variables = network.init(jax.random.key(0), jnp.ones((2, 3)))
    >>> scores = activation_norms(network, variables, [jnp.array([[1., 2., 0.], [3., -4., 0.]])])
    >>> print(scores['hidden0/kernel'].tolist(), scores['head/kernel'].shape)
    [[2.0], [3.0], [0.0]] (4, 1)

    Reference:
      Muralidharan, Sreenivas, Joshi, Chochowski, Patwary, Shoeybi, Catanzaro, Kautz, Molchanov. Compact Language Models via
      Pruning and Knowledge Distillation. 2024. https://arxiv.org/abs/2407.14679
    """
    if not order > 0:
        raise ValueError(f'activation_norms: order must be positive, got {order}; use 1 or 2')

    @jax.jit
    def observe(variables: Mapping[str, Any], inputs: Any) -> dict[str, jax.Array]:
        program, _, leaves = jaxprs.trace_network(network, variables, inputs)

        def multiply(product: Product, lhs: Any, rhs: Any, state: Any) -> tuple[jax.Array, Any]:
            del state
            if product.path is None or product.weights is None or not product.contracted(product.weights):
                return product(lhs, rhs), None
            x = rhs if product.weights == 0 else lhs
            return product(lhs, rhs), _mean_powers(product, jnp.abs(x.astype(jnp.float32)) ** jnp.float32(order))

        powers = jaxprs.evaluate(program, leaves, multiply, {})[1]
        found: dict[str, list[jax.Array]] = {}
        for product in jaxprs.products(program):
            if product.name in powers:
                found.setdefault(str(product.path), []).append(powers[product.name])
        return {path: sum(each[1:], each[0]) / len(each) for path, each in found.items()}

    found = [observe(variables, inputs) for inputs in batches]
    if not found:
        raise ValueError('activation_norms: there are no batches; give at least one')
    weights = leaves_with_paths(variables['params'])
    scores = {path: jnp.zeros((1,) * weight.ndim) for path, weight in weights.items()}
    for path in found[0]:
        mean = jnp.mean(jnp.stack([each[path] for each in found]), axis=0)
        # A kernel that is reshaped before it is used has other axes than its product.
        if mean.ndim == weights[path].ndim and all(n in (1, m) for n, m in zip(mean.shape, weights[path].shape, strict=True)):
            scores[path] = mean ** jnp.float32(1 / order)
    if not found[0]:
        raise ValueError('activation_norms: the network multiplies its inputs by no parameter')
    return scores


def _mean_powers(product: Product, x: jax.Array) -> jax.Array:
    """The mean over all but the channels that are summed over, with the axes of the kernel."""
    kernel = product.operands[product.weights or 0].shape
    shape = [1] * len(kernel)
    numbers = product.options['dimension_numbers']
    if product.primitive == 'conv_general_dilated':
        axis = numbers.rhs_spec[1]
        mean = jnp.mean(x, axis=tuple(i for i in range(x.ndim) if i != numbers.lhs_spec[1]))
        # Of a convolution in groups, each kernel position reads one channel of every group.
        shape[axis] = kernel[axis]
        return jnp.mean(mean.reshape(-1, kernel[axis]), axis=0).reshape(shape)
    (lhs, rhs), _ = numbers
    own, read = (lhs, rhs) if product.weights == 0 else (rhs, lhs)
    mean = jnp.mean(x, axis=tuple(i for i in range(x.ndim) if i not in read))
    # The axes of the mean are in the order of the input's, and go to those of the kernel that they meet.
    place = dict(zip(sorted(read), range(len(read)), strict=True))
    order = sorted(range(len(own)), key=lambda i: own[i])
    for i in order:
        shape[own[i]] = kernel[own[i]]
    return jnp.transpose(mean, [place[read[i]] for i in order]).reshape(shape)


@on_any_mesh
def block_importance(inputs: ArrayLike, outputs: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
    """ShortGPT's block influence: how far a block turns what enters it, the mean of 1 - cos(x, y) over positions.

    Blocks that hardly turn their inputs are the first to leave out, as in Minitron's pruning of depth.

    Args:
      inputs: what enters the block, hidden states [..., width], floating point; arithmetic is in float32.
      outputs: what leaves it, of the same shape.
      where: boolean, broadcastable to [...]: positions to keep.

    Returns:
      A float32 scalar from 0 to 2; 0 where no position is kept, and 1 of a position for a vector of zeros.

    Raises:
      ValueError: the shapes differ, or a dtype is not floating point.

    >>> import jax.numpy as jnp
    >>> print(block_importance(jnp.array([[1., 0.], [0., 2.]]), jnp.array([[1., 1.], [0., 1.]])))
    0.146

    References:
      Men, Xu, Zhang, Wang, Lin, Lu, Han, Chen. ShortGPT: Layers in Large Language Models are More Redundant Than You Expect.
      2024. https://arxiv.org/abs/2403.03853
      Muralidharan et al. Compact Language Models via Pruning and Knowledge Distillation. 2024.
      https://arxiv.org/abs/2407.14679
    """
    x, y = (numerics.as_float32(f'block_importance: {name}', z) for name, z in (('inputs', inputs), ('outputs', outputs)))
    if x.shape != y.shape or x.ndim < 1:
        raise ValueError(f'block_importance: inputs {x.shape} and outputs {y.shape} must have one shape [..., width]')
    kept = None if where is None else jnp.broadcast_to(numerics.booleans('block_importance', where), x.shape[:-1])
    if kept is not None:
        x, y = (jnp.where(kept[..., None], z, 0.0) for z in (x, y))
    cosines = jnp.sum(numerics.l2_normalize(x, -1) * numerics.l2_normalize(y, -1), axis=-1)
    return numerics.masked_mean(1.0 - cosines, tuple(range(cosines.ndim)), kept)
