"""Training some of a network's parameters while the others stay as they are."""

from typing import Any

import optax

from kdjax.paths import Leaves, map_with_paths, select


def train_only(optimizer: optax.GradientTransformation, leaves: Leaves) -> optax.GradientTransformation:
    """Has any optimizer see only some of the parameters; the others keep their values, bit for bit.

    What is frozen has no moments, is not decayed, and does not count in a norm that the optimizer clips by. Gradients still
    pass through frozen layers to those before them. Batch statistics are no parameters, and go on changing in training.

    Args:
      optimizer: any optimizer.
      leaves: the parameters to train, as patterns over their paths or a predicate of path and array; `'head/*'`, say.

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

    return optax.partition({'trained': optimizer, 'frozen': optax.set_to_zero()}, labels)
