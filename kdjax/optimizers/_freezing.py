"""Training some of a network's parameters while the others, and the state of their layers, stay as they are."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kdjax.paths import Leaves, leaves_with_paths, map_with_paths, select


class FreezeState(NamedTuple):
    """State of `train_only`.

    Attributes:
      inner: state of the optimizer inside.
      frozen: whether a parameter is frozen, a boolean scalar for each by its path.
    """

    inner: optax.OptState
    frozen: dict[str, jax.Array]


def train_only(optimizer: optax.GradientTransformation, leaves: Leaves) -> optax.GradientTransformationExtraArgs:
    """Freezing: lets an optimizer see only some of the parameters; the others keep their values, bit for bit.

    What is frozen has no moments, is not decayed, and does not count in a norm that the optimizer clips by. Gradients still
    pass through frozen layers to those before them.

    `training.distillation` keeps the state of a frozen layer too, the statistics of its batch norm (`keep_frozen_state`): in
    evaluation a frozen backbone computes bit for bit what it did. While training, it goes on normalising by the batch.

    Args:
      optimizer: any optimizer.
      leaves: the parameters to train, as patterns over their paths, such as `'head/*'`, or a predicate of path and array.

    Returns:
      The transformation. Its state is a `FreezeState`.

    Raises:
      ValueError: from `init`: nothing is picked, or a pattern matches nothing; the message lists the paths.

    >>> import jax.numpy as jnp, optax
    >>> params = {'hidden': {'kernel': jnp.ones(2)}, 'head': {'kernel': jnp.ones(2)}}
    >>> optimizer = train_only(optax.sgd(0.5), 'head/*')
    >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
    >>> print(updates['hidden']['kernel'], updates['head']['kernel'])
    [0. 0.] [-0.5 -0.5]
    """

    def labels(params: Any) -> Any:
        trained = select(leaves, params)
        return map_with_paths(lambda path, leaf: 'trained' if path in trained else 'frozen', params)

    parts = optax.partition({'trained': optimizer, 'frozen': optax.set_to_zero()}, labels)

    def init(params: Any) -> FreezeState:
        frozen = {path: jnp.bool_(label == 'frozen') for path, label in leaves_with_paths(labels(params)).items()}
        return FreezeState(parts.init(params), frozen)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, FreezeState]:
        updates, inner = parts.update(updates, state.inner, params, **extra)
        return updates, state._replace(inner=inner)

    return optax.GradientTransformationExtraArgs(init, update)


def keep_frozen_state(opt_state: optax.OptState, old_state: dict[str, Any], new_state: dict[str, Any]) -> dict[str, Any]:
    """A network's state after a step, with that of frozen layers as it was before.

    A leaf such as `'batch_stats/backbone/norm/mean'` belongs to the layer `'backbone/norm'`, or, where that has no parameters,
    to the nearest layer around it that has some. It keeps its old value where `train_only` freezes all of that layer's
    parameters. State that lies beside no layer, such as the ranges of quantized activations, goes on.

    Args:
      opt_state: the optimizer's, in which a `FreezeState` may stand anywhere; without one everything is new.
      old_state: collections of state, such as `'batch_stats'`, before the step.
      new_state: the same after the step.

    Returns:
      Collections like `new_state`.

    >>> frozen = {'backbone/norm/scale': jnp.bool_(True), 'head/kernel': jnp.bool_(False)}
    >>> state = lambda x: {'batch_stats': {'backbone': {'norm': {'mean': jnp.array(x)}}, 'head': {'mean': jnp.array(x)}}}
    >>> kept = keep_frozen_state(FreezeState(None, frozen), state(0.0), state(1.0))
    >>> print(kept['batch_stats']['backbone']['norm']['mean'], kept['batch_stats']['head']['mean'])
    0.0 1.0
    """
    frozen: dict[str, jax.Array] = {}
    for own in _frozen(opt_state):
        # Side by side they know parameters of their own; one inside of another trains what both train.
        frozen |= {path: flag | frozen[path] if path in frozen else flag for path, flag in own.items()}
    if not frozen:
        return new_state
    before = leaves_with_paths(old_state)

    def keep(path: str, new: jax.Array) -> jax.Array:
        layer = path.partition('/')[2]
        while layer and path in before:
            layer = layer.rpartition('/')[0]
            own = [flag for parameter, flag in frozen.items() if not layer or parameter.startswith(f'{layer}/')]
            if own:
                return jnp.where(jnp.all(jnp.stack(own)), before[path], new)
        return new

    return map_with_paths(keep, new_state)


def _frozen(opt_state: Any) -> Iterator[dict[str, jax.Array]]:
    is_freeze = lambda node: isinstance(node, FreezeState)  # noqa: E731
    for node in jax.tree.leaves(opt_state, is_leaf=is_freeze):
        if is_freeze(node):
            yield node.frozen
            yield from _frozen(node.inner)
