"""More features of a network than its activations, for objectives to compare: logits, parameters, derivatives."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.networks._linear_logits import dense_logits
from kdjax.networks._network import Network, Outputs, as_paths, select_features
from kdjax.paths import leaves_with_paths


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


def tap_parameters(network: Network, paths: str | tuple[str, ...]) -> Network:
    """Adds parameters to a network's features, for objectives that need them beside activations.

    Such are the scale and bias of a batch norm (`objectives.overhaul`), or the kernel of a head (`objectives.cat_kd`).
    Gradients flow into the student's.

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
            return dense_logits(outputs.logits), (outputs, state)

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
