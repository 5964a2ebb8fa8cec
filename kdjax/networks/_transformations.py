"""Functions from networks to networks: what they return goes wherever a network goes."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.networks._network import Network, Outputs, as_paths, select_features
from kdjax.paths import leaves_with_paths


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
        stacked = jnp.stack(logits).astype(jnp.float32)
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


def preprocess(network: Network, function: Callable[[Any], Any]) -> Network:
    """Puts a pure function in front of a network, such as the normalisation that it was trained with.

    Teacher and student then share raw inputs, uint8 images say, though each was trained with a mean and a deviation of its own.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> from kdjax.networks import from_linen
    >>> network = preprocess(from_linen(nn.Dense(3)), lambda x: x.astype(jnp.float32) / 255)
    >>> network.init(jax.random.key(0), jnp.ones((2, 5), jnp.uint8))['params']['kernel'].dtype
    dtype('float32')
    """

    def init(key: jax.Array, inputs: Any) -> dict[str, Any]:
        return network.init(key, jax.eval_shape(function, inputs))

    def apply(
        variables: dict[str, Any], inputs: Any, *, train: bool = False, rng: jax.Array | None = None
    ) -> tuple[Outputs, dict[str, Any]]:
        return network.apply(variables, function(inputs), train=train, rng=rng)

    return Network(init, apply)


def postprocess(network: Network, function: Callable[[jax.Array], jax.Array]) -> Network:
    """Puts a pure function behind a network's logits.

    `lambda logits: logits.reshape(-1, 2, 10)` makes two tasks of a network with 20 classes, `lambda logits: logits[:, 0]` is
    the first task of a network with several, `lambda logits: logits + shift` moves its biases.

    Args:
      network: the network; its features stay as they are.
      function: from logits to logits; a network without logits stays without.

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
        logits = None if outputs.logits is None else function(outputs.logits)
        return Outputs(logits, outputs.features), state

    return Network(network.init, apply)


def tap_parameters(network: Network, paths: str | tuple[str, ...]) -> Network:
    """Adds parameters to a network's features, for objectives that need them beside activations.

    Such are the kernel of a head whose logits should never exist (`objectives.linear_soft_targets`), or the scale and bias of a
    batch norm (`objectives.overhaul`). Gradients flow into the student's.

    Args:
      network: the network.
      paths: of parameters, such as `'head/kernel'`.

    Raises:
      ValueError: from `apply`, when traced: there is no such parameter; the message lists those there are.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> from kdjax.networks import from_linen
    >>> network = tap_parameters(from_linen(nn.Dense(3)), 'kernel')
    >>> outputs, _ = network.apply(network.init(jax.random.key(0), jnp.ones((2, 5))), jnp.ones((2, 5)))
    >>> outputs.features['kernel'].shape
    (5, 3)
    """
    paths = as_paths(paths)

    def apply(
        variables: dict[str, Any], inputs: Any, *, train: bool = False, rng: jax.Array | None = None
    ) -> tuple[Outputs, dict[str, Any]]:
        outputs, state = network.apply(variables, inputs, train=train, rng=rng)
        tapped = select_features(paths, leaves_with_paths(variables.get('params', {})), 'the network')
        return Outputs(outputs.logits, {**outputs.features, **tapped}), state

    return Network(network.init, apply)


def tap_jacobian(network: Network, directions: jax.Array | None = None) -> Network:
    """Adds the derivative of a network's logits with respect to its inputs to its features, as `'jacobian'`.

    The feature is [batch, directions, ...], one vector-Jacobian product for each direction in the space of the logits; see
    `losses.jacobian`. In training a batch norm makes every logit depend on all inputs of the batch; the derivative is that of
    the sum over the batch.

    Args:
      network: a network whose inputs are one floating-point array [batch, ...].
      directions: [directions, classes], shared by all examples; every class of its own if not given.

    Raises:
      ValueError: from `apply`, when traced: the inputs are something else, or the network gives no logits.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> from kdjax.networks import from_linen
    >>> network = tap_jacobian(from_linen(nn.Dense(3)))
    >>> outputs, _ = network.apply(network.init(jax.random.key(0), jnp.ones((2, 5))), jnp.ones((2, 5)))
    >>> outputs.features['jacobian'].shape
    (2, 3, 5)
    """

    def apply(
        variables: dict[str, Any], inputs: Any, *, train: bool = False, rng: jax.Array | None = None
    ) -> tuple[Outputs, dict[str, Any]]:
        def logits(inputs: Any) -> Any:
            outputs, state = network.apply(variables, inputs, train=train, rng=rng)
            if outputs.logits is None:
                raise ValueError('tap_jacobian: the network gives no logits')
            return outputs.logits, (outputs, state)

        found = inputs.dtype if isinstance(inputs, jax.Array | np.ndarray) else type(inputs).__name__
        if not isinstance(found, np.dtype) or not jnp.issubdtype(found, jnp.floating):
            raise ValueError(
                f'tap_jacobian: inputs must be one floating-point array, got {found}: put preprocess outside of it'
            )
        values, pullback, (outputs, state) = jax.vjp(logits, inputs, has_aux=True)
        chosen = jnp.eye(values.shape[-1], dtype=values.dtype) if directions is None else directions.astype(values.dtype)
        jacobian = jax.vmap(lambda direction: pullback(jnp.broadcast_to(direction, values.shape))[0], out_axes=1)(chosen)
        return Outputs(outputs.logits, {**outputs.features, 'jacobian': jacobian}), state

    return Network(network.init, apply)
