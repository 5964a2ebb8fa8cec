"""Pruning as an optax transformation: it wraps an optimizer, and no trainer needs to know."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kdjax import paths
from kdjax.paths import Leaves, kernels, select
from kdjax.pruning.masks import Masks, Scores, global_masks, magnitude


class PruneState(NamedTuple):
    """State of `prune`.

    Attributes:
      step: number of updates so far.
      sparsity: the sparsity of the masks.
      masks: true for the weights that stay, by path, for the arrays that are pruned.
      inner: state of the wrapped transformation.
    """

    step: jax.Array
    sparsity: jax.Array
    masks: Masks
    inner: optax.OptState


def prune(
    inner: optax.GradientTransformation,
    sparsity: float | Callable[[Any], Any],
    *,
    leaves: Leaves = kernels,
    scores: Callable[[dict[str, jax.Array]], Scores] = magnitude,
    masks: Callable[[Scores, Any], Masks] = global_masks,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that a growing share of the weights becomes, and stays, exactly zero.

    Each update lets `inner` take its step, renews the masks where the schedule asks for more sparsity, by the scores of the
    weights as that step leaves them, and replaces the update of every pruned weight w by -w. It must be outermost in a
    chain. Masking gradients alone would not do: momentum gathered before a weight is pruned would move it off zero again. A
    pruned weight does not come back.

    Args:
      inner: the optimizer.
      sparsity: the share of the weights to prune, a number or a schedule of the step, such as `cubic`.
      leaves: which arrays are pruned.
      scores: weights by path -> scores by path; the lowest go.
      masks: `(scores, sparsity) -> masks`: `global_masks` or `layer_masks`.

    Returns:
      The transformation. Its `update` needs `params`. Its state is a `PruneState`.

    Raises:
      ValueError: the number lies outside [0, 1]; from `init`: `leaves` picks nothing; from `update`: no params.

    >>> import jax.numpy as jnp, optax
    >>> params = {'kernel': jnp.array([[3., -1.], [0.5, 2.]])}
    >>> optimizer = prune(optax.sgd(0.0), 0.5)
    >>> updates, state = optimizer.update(params, optimizer.init(params), params)
    >>> print(optax.apply_updates(params, updates)['kernel'])
    [[3. 0.]
     [0. 2.]]
    """
    inner = optax.with_extra_args_support(inner)
    if not callable(sparsity) and not 0 <= sparsity <= 1:
        raise ValueError(f'prune: sparsity must be between 0 and 1, got {sparsity}')

    def init(params: Any) -> PruneState:
        everything = {path: jnp.ones(leaf.shape, jnp.bool_) for path, leaf in select(leaves, params).items()}
        return PruneState(jnp.int32(0), jnp.float32(0.0), everything, inner.init(params))

    def update(grads: Any, state: PruneState, params: Any = None, **extra: Any) -> tuple[Any, PruneState]:
        if params is None:
            raise ValueError('prune: update needs params')
        # `where` and not a product: a pruned weight's gradient may be NaN or infinite.
        grads = paths.map_with_paths(lambda path, g: _where(state.masks, path, g, jnp.zeros_like(g)), grads)
        updates, inner_state = inner.update(grads, state.inner, params, **extra)
        target = jnp.asarray(sparsity(state.step) if callable(sparsity) else sparsity, jnp.float32)

        def renew() -> Masks:
            moved = paths.leaves_with_paths(optax.apply_updates(params, updates))
            weight_scores = scores({path: moved[path] for path in state.masks})
            # Whatever its score, a pruned weight ranks below every other.
            ranked = {path: jnp.where(state.masks[path], score, -jnp.inf) for path, score in weight_scores.items()}
            # A number stays a number here: its count is then exact for any size.
            return masks(ranked, target if callable(sparsity) else sparsity)

        new_masks = jax.lax.cond(target > state.sparsity, renew, lambda: state.masks)
        updates = paths.map_with_paths(lambda path, u, p: _zeroing(new_masks, path, u, p), updates, params)
        reached = jnp.maximum(target, state.sparsity)
        return updates, PruneState(state.step + 1, reached, new_masks, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _where(masks: Masks, path: str, kept: jax.Array, pruned: jax.Array) -> jax.Array:
    return jnp.where(masks[path], kept, pruned) if path in masks else kept


def _zeroing(masks: Masks, path: str, update: jax.Array, weight: jax.Array) -> jax.Array:
    if path not in masks:
        return update
    # In the wider of both dtypes: in a narrower one -w would be rounded, and w + -w would not be zero.
    with jax.numpy_dtype_promotion('standard'):
        dtype = jnp.promote_types(update.dtype, weight.dtype)
    return jnp.where(masks[path], update.astype(dtype), -weight.astype(dtype))


def apply_masks(masks: Masks, params: Any) -> Any:
    """Sets the pruned weights of a tree to zero.

    >>> import jax.numpy as jnp
    >>> print(apply_masks({'kernel': jnp.array([True, False])}, {'kernel': jnp.array([1., 2.])})['kernel'])
    [1. 0.]
    """
    return paths.map_with_paths(lambda path, p: _where(masks, path, p, jnp.zeros_like(p)), params)
