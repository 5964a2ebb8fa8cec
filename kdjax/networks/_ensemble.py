"""One network of several, and their variables, joined and taken apart."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.networks._linear_logits import LinearLogits, dense_logits
from kdjax.networks._network import Network, Outputs


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


def ensemble(
    members: Sequence[Network],
    *,
    average: Literal['probabilities', 'logits'] = 'probabilities',
    weights: Sequence[float] | None = None,
) -> Network:
    """Makes one network of several, whose prediction is the mean of theirs.

    `average='probabilities'`: logits are log of the mean of the members' softmax, so that softmax of them is that mean.
    `average='logits'`: the mean of the logits, whose softmax is the normalised geometric mean of the members' at any
    temperature.

    Args:
      members: networks over the same classes.
      average: `'probabilities'` or `'logits'`.
      weights: how much each member counts in the mean, positive numbers of any sum; equally if not given.

    Returns:
      The network. In every collection of its variables member i stands under `str(i)`; `ensemble_variables` makes them from the
      members' own. The features of member i are named `'i/path'`; where all members have a feature of the same size, `'path'`
      is all of them side by side, along the channels.

    Raises:
      ValueError: no members, an unknown average, weights that are not a positive number for each, or, when traced, members
        whose logits differ in shape.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> from kdjax.networks import from_linen
    >>> network = ensemble([from_linen(nn.Dense(3))] * 2)
    >>> variables = network.init(jax.random.key(0), jnp.ones((4, 5)))
    >>> outputs, state = network.apply(variables, jnp.ones((4, 5)))
    >>> outputs.logits.shape, sorted(variables['params'])
    ((4, 3), ['0', '1'])
    """
    members = tuple(members)
    if not members:
        raise ValueError('ensemble: there must be at least one member')
    if average not in ('probabilities', 'logits'):
        raise ValueError(f"ensemble: average must be 'probabilities' or 'logits', got {average!r}")
    shares = np.ones(len(members)) if weights is None else np.asarray(weights, np.float64)
    if shares.shape != (len(members),) or not np.all(np.isfinite(shares) & (shares > 0)):
        raise ValueError(f'ensemble: weights must be a positive number for each of {len(members)} members, got {weights}')
    shares = (shares / shares.sum()).astype(np.float32)

    def init(key: jax.Array, inputs: Any) -> dict[str, Any]:
        keys = jax.random.split(key, len(members))
        return ensemble_variables([member.init(k, inputs) for member, k in zip(members, keys, strict=True)])

    def apply(
        variables: dict[str, Any], inputs: Any, *, train: bool = False, rng: jax.Array | None = None
    ) -> tuple[Outputs, dict[str, Any]]:
        outputs, state = apply_members(members, variables, inputs, train=train, rng=rng)
        logits = [own.logits for own in outputs]
        if any(x is None for x in logits):
            raise ValueError(f'ensemble: member {[x is None for x in logits].index(True)} gives no logits')
        if len({x.shape for x in logits}) > 1:
            raise ValueError(f'ensemble: the members must give logits of one shape, got {[x.shape for x in logits]}')
        stacked = jnp.stack([dense_logits(x) for x in logits]).astype(jnp.float32)
        share = shares.reshape(-1, *(1,) * (stacked.ndim - 1))
        if average == 'logits':
            mean = jnp.sum(share * stacked, axis=0)
        else:
            mean = jax.nn.logsumexp(jax.nn.log_softmax(stacked, axis=-1) + np.log(share), axis=0)
        return Outputs(mean, _join_features([own.features for own in outputs])), state

    return Network(init, apply)


def apply_members(
    members: Sequence[Network], variables: dict[str, Any], inputs: Any, *, train: bool, rng: jax.Array | None
) -> tuple[list[Outputs], dict[str, Any]]:
    """What every member gives, each with its own variables and noise, and their new state joined."""
    outputs, states = [], []
    for i, member in enumerate(members):
        own = {name: collection[str(i)] for name, collection in variables.items() if str(i) in collection}
        own_rng = None if rng is None else jax.random.fold_in(rng, i)
        given, state = member.apply(own, inputs, train=train, rng=own_rng)
        outputs.append(given)
        states.append(state)
    return outputs, ensemble_variables(states)


def _join_features(members: Sequence[dict[str, jax.Array]]) -> dict[str, jax.Array]:
    joined = {f'{i}/{path}': value for i, features in enumerate(members) for path, value in features.items()}
    for path in members[0]:
        values = [features[path] for features in members if path in features]
        if any(isinstance(value, LinearLogits) for value in values):
            continue  # of every member alone, as `objectives.of_member` takes them
        if len(values) == len(members) and values[0].ndim and len({value.shape[:-1] for value in values}) == 1:
            joined.setdefault(path, jnp.concatenate(values, axis=-1))
    return joined


def ensemble_variables(members: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Joins the variables of separately trained members into those of their `ensemble`.

    >>> ensemble_variables([{'params': 1}, {'params': 2, 'batch_stats': 3}])
    {'params': {'0': 1, '1': 2}, 'batch_stats': {'1': 3}}
    """
    joined: dict[str, Any] = {}
    for i, variables in enumerate(members):
        for name, collection in variables.items():
            joined.setdefault(name, {})[str(i)] = collection
    return joined
