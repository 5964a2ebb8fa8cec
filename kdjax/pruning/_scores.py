"""What a weight is worth: the lowest scores go first.

Scores are functions `(weights, gradients) -> scores`, all three by path. A score array has the shape of its weight, or length 1
along the axes over which weights live and die together: one score for a whole filter or row prunes it whole.
"""

import zlib
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp

Arrays = dict[str, jax.Array]
"""Weights, or gradients, by path."""

Scores = dict[str, jax.Array]
"""Scores of the weights that may be pruned, by the path of their array; shapes broadcast to those of the weights."""

ScoreFunction = Callable[[Arrays, Arrays], Scores]
"""`(weights, gradients) -> scores`."""


def magnitude(weights: Arrays, gradients: Arrays | None = None) -> Scores:
    """|w|: the smallest weights go first.

    Args:
      weights: by path, any shapes.
      gradients: not used.

    Returns:
      Float32 scores of the weights' shapes.

    >>> import jax.numpy as jnp
    >>> print(magnitude({'kernel': jnp.array([-2., 1.])})['kernel'])
    [2. 1.]

    Reference:
      Han, Pool, Tran, Dally. Learning both Weights and Connections for Efficient Neural Networks. 2015.
      https://arxiv.org/abs/1506.02626
    """
    del gradients
    return {path: jnp.abs(weight.astype(jnp.float32)) for path, weight in weights.items()}


def saliency(weights: Arrays, gradients: Arrays) -> Scores:
    """|w · ∂L/∂w|: to first order, how much the loss L changes when the weight w becomes zero.

    Args:
      weights: by path, any shapes.
      gradients: of the same paths and shapes.

    Returns:
      Float32 scores of the weights' shapes.

    >>> import jax.numpy as jnp
    >>> print(saliency({'kernel': jnp.array([-2., 1.])}, {'kernel': jnp.array([0.25, 3.])})['kernel'])
    [0.5 3. ]

    Reference:
      Molchanov, Mallya, Tyree, Frosio, Kautz. Importance Estimation for Neural Network Pruning. 2019.
      https://arxiv.org/abs/1906.10771
    """
    return {path: jnp.abs(weight.astype(jnp.float32) * gradients[path].astype(jnp.float32)) for path, weight in weights.items()}


def slice_norms(axis: int | Sequence[int], order: float = 1) -> ScoreFunction:
    """One score for each slice: (Σ |w|^p)^(1/p), the p-norm of its weights, max |w| for p = inf.

    `slice_norms(0)` scores the rows of a dense kernel [in, out], the inputs; `slice_norms(1)` its columns, the outputs. The
    sparsity is then the share of slices. Slices of different arrays differ in size, and so their norms do not compare:
    `layer_masks` fits better than `global_masks`.

    Args:
      axis: the axis, or axes, whose indices number the slices.
      order: p, positive; 1, 2 and `math.inf` are usual.

    Returns:
      Scores whose shape is the weight's along `axis` and 1 along all other axes, float32.

    Raises:
      ValueError: `order` is not positive; when called: an array lacks the axis.

    >>> import jax.numpy as jnp
    >>> scores = slice_norms(1, order=2)
    >>> print(scores({'kernel': jnp.array([[3., 1.], [4., 0.]])}, {})['kernel'])
    [[5. 1.]]

    Reference:
      Li, Kadav, Durdanovic, Samet, Graf. Pruning Filters for Efficient ConvNets. 2017. https://arxiv.org/abs/1608.08710
    """
    if not order > 0:
        raise ValueError(f'slice_norms: order must be positive, got {order}; use 1, 2 or math.inf')
    axes = (axis,) if isinstance(axis, int) else tuple(axis)

    def norms(path: str, weight: jax.Array) -> jax.Array:
        if any(not -weight.ndim <= a < weight.ndim for a in axes):
            raise ValueError(
                f'slice_norms: {path} of shape {weight.shape} has no axis {axis}; prune other arrays, or other axes'
            )
        kept = {a % weight.ndim for a in axes}
        others = tuple(a for a in range(weight.ndim) if a not in kept)
        # JAX takes any positive order, though its type says int.
        return jnp.linalg.vector_norm(weight.astype(jnp.float32), ord=cast(Any, order), axis=others, keepdims=True)

    return lambda weights, gradients: {path: norms(path, weight) for path, weight in weights.items()}


def filter_norms(order: float = 1) -> ScoreFunction:
    """`slice_norms` of the last axis: the filters of a convolution [height, width, in, out], the outputs of a dense kernel.

    With `layer_masks` this is what PyTorch calls `ln_structured` with `dim=0`: there the outputs are the first axis.

    >>> import jax.numpy as jnp
    >>> filter_norms()({'kernel': jnp.ones((3, 3, 8, 16))}, {})['kernel'].shape
    (1, 1, 1, 16)
    """
    return slice_norms(-1, order)


def channel_norms(order: float = 1) -> ScoreFunction:
    """`slice_norms` of the last axis but one: the input channels of a convolution, the rows of a dense kernel [in, out].

    >>> import jax.numpy as jnp
    >>> channel_norms()({'kernel': jnp.ones((3, 3, 8, 16))}, {})['kernel'].shape
    (1, 1, 8, 1)
    """
    return slice_norms(-2, order)


def random_scores(key: jax.Array) -> ScoreFunction:
    """Uniform scores in [0, 1): the control that any other score must beat.

    They depend on the key, the path and the shape alone. So they are the same at every step, and in a run that resumes.

    Args:
      key: a random key.

    Returns:
      Scores of the weights' shapes, float32.

    >>> import jax, jax.numpy as jnp
    >>> scores = random_scores(jax.random.key(0))({'kernel': jnp.ones((2, 3))}, {})
    >>> scores['kernel'].shape
    (2, 3)
    """

    def scores(weights: Arrays, gradients: Arrays) -> Scores:
        del gradients
        # Python's own hash of a string differs between processes.
        numbers = {path: zlib.crc32(path.encode()) for path in weights}
        return {path: jax.random.uniform(jax.random.fold_in(key, numbers[path]), weights[path].shape) for path in weights}

    return scores
