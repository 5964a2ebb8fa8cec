"""Pruning as an optax transformation: it wraps an optimizer, and no trainer needs to know."""

import collections
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kdjax import paths
from kdjax.paths import Leaves, kernels, select
from kdjax.pruning._masks import MaskFunction, Masks, global_masks
from kdjax.pruning._scores import Arrays, ScoreFunction, Scores, magnitude


class PruneState(NamedTuple):
    """State of `prune`.

    Attributes:
      step: number of updates so far.
      sparsity: the sparsity of the masks.
      masks: true for the weights that stay, by path, for the arrays that are pruned; of the scores' shapes, which broadcast to
        those of the weights.
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
    scores: ScoreFunction = magnitude,
    masks: MaskFunction = global_masks,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that a growing share of the weights becomes, and stays, exactly zero.

    Each update lets `inner` take its step, renews the masks where the schedule asks for more sparsity, by the scores of the
    weights as that step leaves them, and replaces the update of every pruned weight w by -w. It must be the last of a chain:
    what follows would change that -w (`check_outermost`). Masking gradients alone would not do: momentum gathered before a
    weight is pruned would move it off zero again. A pruned weight does not come back.

    Args:
      inner: the optimizer.
      sparsity: the share of the scores to prune, a number or a schedule of the step, such as `cubic`.
      leaves: which arrays are pruned: patterns, a predicate, or what `product_kernels` finds. By default those of two or more
        axes that are not named as biases or norms are, tables of embeddings among them.
      scores: `(weights, gradients) -> scores`, all by path; the lowest go. `magnitude`, or `filter_norms()` for whole filters.
        The gradients are those of the step.
      masks: `(scores, sparsity) -> masks`: `global_masks`, `layer_masks`, `erk_masks`, `n_m_masks(2, 4)`.

    Returns:
      The transformation. Its `update` needs `params`. Its state is a `PruneState`.

    Raises:
      ValueError: the number lies outside [0, 1]; from `init`: `leaves` picks nothing, or scores or masks do not fit the arrays
        that it picks; from `update`: no params.

    >>> import jax.numpy as jnp, optax
    >>> params = {'kernel': jnp.array([[3., -1.], [0.5, 2.]])}
    >>> optimizer = prune(optax.sgd(0.0), 0.5)
    >>> updates, state = optimizer.update(params, optimizer.init(params), params)
    >>> print(optax.apply_updates(params, updates)['kernel'])
    [[3. 0.]
     [0. 2.]]
    """
    inner = optax.with_extra_args_support(inner)
    if isinstance(sparsity, (int, float)) and not 0 <= sparsity <= 1:
        raise ValueError(f'prune: sparsity must be between 0 and 1, got {sparsity}')

    def init(params: Any) -> PruneState:
        weights = select(leaves, params)
        # A number stays a number here: masks can then check it, and their count is exact for any size.
        target = jnp.float32(0.0) if callable(sparsity) else sparsity
        score_shapes = jax.eval_shape(scores, weights, weights)
        mask_shapes = jax.eval_shape(lambda shapes: masks(shapes, target), score_shapes)
        _check_shapes(weights, score_shapes, mask_shapes)
        everything = {path: _all_true(mask_shapes[path], weight) for path, weight in weights.items()}
        return PruneState(jnp.int32(0), jnp.float32(0.0), everything, inner.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, PruneState]:
        if params is None:
            raise ValueError('prune: update needs params')
        # `where` and not a product: a pruned weight's gradient may be NaN or infinite.
        grads = paths.map_with_paths(lambda path, g: _where(state.masks, path, g, jnp.zeros_like(g)), updates)
        updates, inner_state = inner.update(grads, state.inner, params, **extra)
        target = sparsity(state.step) if callable(sparsity) else sparsity

        def renew() -> Masks:
            moved = paths.leaves_with_paths(optax.apply_updates(params, updates))
            gradients = paths.leaves_with_paths(grads)
            found = scores({path: moved[path] for path in state.masks}, {path: gradients[path] for path in state.masks})
            return masks({path: _ranked(found[path], mask) for path, mask in state.masks.items()}, target)

        reached = jnp.maximum(jnp.asarray(target, jnp.float32), state.sparsity)
        new_masks = jax.lax.cond(reached > state.sparsity, renew, lambda: state.masks)
        updates = paths.map_with_paths(lambda path, u, p: _zeroing(new_masks, path, u, p), updates, params)
        return updates, PruneState(state.step + 1, reached, new_masks, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def check_outermost(opt_state: Any) -> None:
    """Checks that nothing in a chain comes after `prune`.

    `optax.chain(prune(adam), optax.scale(0.5))` would halve the updates that take pruned weights to zero, and none would get
    there. Wrappers, such as `optax.MultiSteps` or `optimizers.average_parameters`, may stand around it, unless they change the
    updates: `optax.lookahead` and `optax.contrib.schedule_free` do, and are not found out.

    Args:
      opt_state: the state that an optimizer's `init` made.

    Raises:
      ValueError: a `prune` stands in a chain before something else.

    >>> import jax.numpy as jnp, optax
    >>> params = {'kernel': jnp.ones((2, 2))}
    >>> check_outermost(optax.chain(optax.clip(1.0), prune(optax.adam(0.1), 0.5)).init(params))
    >>> check_outermost(optax.chain(prune(optax.adam(0.1), 0.5), optax.scale(0.5)).init(params))
    Traceback (most recent call last):
    ...
    ValueError: prune must be the last of a chain, or what follows keeps weights off zero: optax.chain(..., prune(...))
    """
    children = [
        child for child in jax.tree.leaves(opt_state, is_leaf=lambda node: node is not opt_state) if child is not opt_state
    ]
    # What the states of `optax.chain` and `optax.named_chain` are; those of wrappers are tuples with names, and none of these.
    is_chain = type(opt_state) in (tuple, collections.OrderedDict)
    if is_chain and any(map(_holds_prune, children[:-1])):
        raise ValueError(
            'prune must be the last of a chain, or what follows keeps weights off zero: optax.chain(..., prune(...))'
        )
    for child in children:
        check_outermost(child)


def _holds_prune(state: Any) -> bool:
    is_prune = lambda node: isinstance(node, PruneState)  # noqa: E731
    return any(map(is_prune, jax.tree.leaves(state, is_leaf=is_prune)))


def apply_masks(masks: Masks, params: Any) -> Any:
    """Sets the pruned weights of a tree to zero.

    >>> import jax.numpy as jnp
    >>> print(apply_masks({'kernel': jnp.array([True, False])}, {'kernel': jnp.array([1., 2.])})['kernel'])
    [1. 0.]
    """
    return paths.map_with_paths(lambda path, p: _where(masks, path, p, jnp.zeros_like(p)), params)


def _check_shapes(weights: Arrays, scores: Scores, masks: Masks) -> None:
    for path, weight in weights.items():
        for name, arrays in (('scores', scores), ('masks', masks)):
            if path not in arrays:
                raise ValueError(f'prune: {name} returned nothing for {path}; it must return an array for every path')
        score, mask = scores[path].shape, masks[path].shape
        fits = len(score) == weight.ndim and all(s in (1, w) for s, w in zip(score, weight.shape, strict=True))
        if not fits or mask != score:
            raise ValueError(
                f'prune: {path} has shape {weight.shape}, its scores {score} and its mask {mask}; scores need that shape, or 1 '
                'along axes that are pruned together, and masks the shape of the scores'
            )


def _all_true(shape: jax.ShapeDtypeStruct, weight: jax.Array) -> jax.Array:
    # Where it can, the mask lies beside its weight, on the same devices.
    return jnp.ones_like(weight, jnp.bool_) if shape.shape == weight.shape else jnp.ones(shape.shape, jnp.bool_)


def _ranked(score: jax.Array, mask: jax.Array) -> jax.Array:
    # Whatever its score, a pruned weight ranks below every other: these are finite. NaN, a failure to be seen, stays.
    finite = jnp.nan_to_num(score.astype(jnp.float32), nan=jnp.finfo(jnp.float32).max)
    return jnp.where(mask, finite, -jnp.inf)


def _where(masks: Masks, path: str, kept: jax.Array, pruned: jax.Array) -> jax.Array:
    return jnp.where(masks[path], kept, pruned) if path in masks else kept


def _zeroing(masks: Masks, path: str, update: jax.Array, weight: jax.Array) -> jax.Array:
    if path not in masks:
        return update
    dtype = sum_dtype(update, weight)
    return jnp.where(masks[path], update.astype(dtype), -weight.astype(dtype))


def sum_dtype(update: jax.Array, weight: jax.Array) -> Any:
    """The wider dtype of both: in a narrower one -w would be rounded, and w + -w would not be zero."""
    with jax.numpy_dtype_promotion('standard'):
        return jnp.promote_types(update.dtype, weight.dtype)
