"""Networks with several tasks: logits [batch, tasks, classes], which every loss and objective on logits takes as they are."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kdjax.networks.network import Network, Outputs
from kdjax.networks.transformations import ensemble, ensemble_variables


def multitask(members: Sequence[Network]) -> Network:
    """Makes one network of several tasks out of one network for each, such as the teachers of a student with several heads.

    Labels are [batch, tasks], negative where an example has none for a task; what a task has fewer classes than others is
    filled up with logits of -inf, to which losses give no weight.

    Args:
      members: one network for each task, with logits [batch, classes].

    Returns:
      The network, with logits [batch, tasks, classes]. Variables and features of member i stand under `str(i)`, as in
      `ensemble`; `ensemble_variables` makes the variables from the members' own.

    Raises:
      ValueError: no members, or, when traced, one without logits [batch, classes].

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> from kdjax.networks import ensemble_variables, from_linen
    >>> network = multitask([from_linen(nn.Dense(3)), from_linen(nn.Dense(2))])
    >>> outputs, _ = network.apply(network.init(jax.random.key(0), jnp.ones((4, 5))), jnp.ones((4, 5)))
    >>> outputs.logits.shape, bool(jnp.isneginf(outputs.logits[:, 1, 2]).all())
    ((4, 2, 3), True)

    Reference:
      Clark, Luong, Khandelwal, Manning, Le. BAM! Born-Again Multi-Task Networks for Natural Language Understanding. 2019.
      https://arxiv.org/abs/1907.04829
    """
    members = tuple(members)
    if not members:
        raise ValueError('multitask: there must be at least one member')

    def apply(
        variables: dict[str, Any], inputs: Any, *, train: bool = False, rng: jax.Array | None = None
    ) -> tuple[Outputs, dict[str, Any]]:
        logits, features, states = [], {}, []
        for i, member in enumerate(members):
            own = {name: collection[str(i)] for name, collection in variables.items() if str(i) in collection}
            own_rng = None if rng is None else jax.random.fold_in(rng, i)
            outputs, state = member.apply(own, inputs, train=train, rng=own_rng)
            if outputs.logits is None or outputs.logits.ndim != 2:
                found = None if outputs.logits is None else outputs.logits.shape
                raise ValueError(f'multitask: member {i} must give logits [batch, classes], got {found}')
            logits.append(outputs.logits.astype(jnp.float32))
            features |= {f'{i}/{path}': value for path, value in outputs.features.items()}
            states.append(state)
        classes = max(x.shape[1] for x in logits)
        filled = [jnp.pad(x, ((0, 0), (0, classes - x.shape[1])), constant_values=-jnp.inf) for x in logits]
        return Outputs(jnp.stack(filled, axis=1), features), ensemble_variables(states)

    return Network(ensemble(members).init, apply)


def postprocess(network: Network, function: Callable[[jax.Array], jax.Array]) -> Network:
    """Puts a pure function behind a network's logits.

    `lambda logits: logits.reshape(-1, 2, 10)` makes two tasks of a network with 20 classes, `lambda logits: logits[:, 0]` is
    the first task of a network with several, `lambda logits: logits + shift` moves its biases.

    Args:
      network: the network; its features stay as they are.
      function: from logits to logits.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> from kdjax.networks import from_linen
    >>> network = postprocess(from_linen(nn.Dense(6)), lambda logits: logits.reshape(-1, 2, 3))
    >>> network.apply(network.init(jax.random.key(0), jnp.ones((4, 5))), jnp.ones((4, 5)))[0].logits.shape
    (4, 2, 3)
    """

    def apply(
        variables: dict[str, Any], inputs: Any, *, train: bool = False, rng: jax.Array | None = None
    ) -> tuple[Outputs, dict[str, Any]]:
        outputs, state = network.apply(variables, inputs, train=train, rng=rng)
        return Outputs(function(outputs.logits), outputs.features), state

    return Network(network.init, apply)
