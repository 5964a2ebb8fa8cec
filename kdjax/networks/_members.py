"""The members of networks that are made of networks, one by one."""

from typing import Any

import jax

from kdjax.networks._network import Network, Outputs


def tap_logits(network: Network) -> Network:
    """Adds a network's logits to its features, as `'logits'`, so that they can still be told apart in an `ensemble`.

    Those of member i of an ensemble are its feature `'i/logits'`; see `objectives.of_member`.

    Raises:
      ValueError: when traced: the network gives no logits.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> from kdjax.networks import ensemble, from_linen
    >>> network = ensemble([tap_logits(from_linen(nn.Dense(3)))] * 2)
    >>> outputs, _ = network.apply(network.init(jax.random.key(0), jnp.ones((2, 5))), jnp.ones((2, 5)))
    >>> outputs.features['1/logits'].shape
    (2, 3)
    """

    def apply(
        variables: dict[str, Any], inputs: Any, *, train: bool = False, rng: jax.Array | None = None
    ) -> tuple[Outputs, dict[str, Any]]:
        outputs, state = network.apply(variables, inputs, train=train, rng=rng)
        if outputs.logits is None:
            raise ValueError('tap_logits: the network gives no logits')
        return Outputs(outputs.logits, {**outputs.features, 'logits': outputs.logits}), state

    return Network(network.init, apply)


def member_variables(variables: dict[str, Any], member: int) -> dict[str, Any]:
    """The variables of one member of an ensemble: what `ensemble_variables` joined, taken apart.

    Raises:
      ValueError: there is no such member.

    >>> member_variables({'params': {'0': 1, '1': 2}, 'batch_stats': {'1': 3}}, 1)
    {'params': 2, 'batch_stats': 3}
    """
    name = str(member)
    own = {key: collection[name] for key, collection in variables.items() if name in collection}
    if not own:
        found = ', '.join(sorted(set().union(*variables.values()))) or 'none'
        raise ValueError(f'member_variables: there is no member {member}; there are: {found}')
    return own
