"""Networks with several tasks: logits [batch, tasks, classes], which every loss and objective on logits takes as they are."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kdjax.networks._ensemble import apply_members, ensemble
from kdjax.networks._linear_logits import dense_logits
from kdjax.networks._network import Network, Outputs


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
        outputs, state = apply_members(members, variables, inputs, train=train, rng=rng)
        for i, own in enumerate(outputs):
            if own.logits is None or own.logits.ndim != 2:
                found = None if own.logits is None else own.logits.shape
                raise ValueError(f'multitask: member {i} must give logits [batch, classes], got {found}')
        logits = [dense_logits(own.logits).astype(jnp.float32) for own in outputs]
        features = {f'{i}/{path}': value for i, own in enumerate(outputs) for path, value in own.features.items()}
        classes = max(x.shape[1] for x in logits)
        filled = [jnp.pad(x, ((0, 0), (0, classes - x.shape[1])), constant_values=-jnp.inf) for x in logits]
        return Outputs(jnp.stack(filled, axis=1), features), state

    return Network(ensemble(members).init, apply)
