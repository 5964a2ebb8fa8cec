"""What kdjax means by a network: two pure functions, and what comes out of them."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax

from kdjax.paths import leaves_with_paths

Variables = Mapping[str, Any]
"""`{'params': trained parameters, **state}`; state, such as `'batch_stats'`, changes in training without gradients."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outputs:
    """What a network computes for a batch.

    Attributes:
      logits: [batch, classes], [batch, positions, classes] for tokens or pixels, or None for a network that gives none; an
        array, or the `LinearLogits` of a `linear_head`.
      features: activations by module path; images as [batch, height, width, channels], tokens as [batch, length, width].
    """

    logits: Any
    features: dict[str, Any] = dataclasses.field(default_factory=dict)


class Apply(Protocol):
    """The forward pass of a `Network`."""

    def __call__(
        self, variables: Any, inputs: Any, *, train: bool = False, rng: jax.Array | None = None
    ) -> tuple[Outputs, dict[str, Any]]:
        """Returns the outputs for a batch, and the state after it.

        Args:
          variables: parameters and state, as `init` makes them; see `Variables`. The type is open, so that a function that asks
            for a dict is an `Apply` too.
          inputs: a batch of inputs.
          train: whether dropout drops and batch norm uses, and updates, the batch's statistics.
          rng: a key for dropout and other noise; needed with `train=True` by networks that have any.
        """
        ...


class Network(NamedTuple):
    """A pair of pure functions. `init(key, inputs) -> variables` needs only the shapes of `inputs`; `apply` is an `Apply`.

    Inputs are any pytree of arrays with a leading axis of examples. Those of `from_linen` and `from_nnx` are networks like any
    two functions of one's own.

    >>> import jax, jax.numpy as jnp
    >>> def apply(variables, inputs, *, train=False, rng=None):
    ...     return Outputs(inputs['x'] @ variables['params']['w']), {}
    >>> network = Network(lambda key, inputs: {'params': {'w': jnp.ones((inputs['x'].shape[-1], 3))}}, apply)
    >>> inputs = {'x': jnp.ones((2, 5))}
    >>> network.apply(network.init(jax.random.key(0), inputs), inputs)[0].logits.shape
    (2, 3)
    """

    init: Callable[[jax.Array, Any], dict[str, Any]]
    apply: Apply


def unchanged(state: Mapping[str, Any], variables: Variables) -> set[str]:
    """Paths of the arrays of a state after a call that are the very ones which went in."""
    before = leaves_with_paths(variables)
    return {path for path, leaf in leaves_with_paths(state).items() if leaf is before.get(path)}


def as_outputs(result: Any, features: dict[str, Any], owner: str) -> Outputs:
    """Wraps what a module returns: logits alone, or `Outputs` of its own, to which the tapped features are added."""
    if isinstance(result, Outputs):
        return Outputs(result.logits, {**result.features, **features})
    if not isinstance(result, jax.Array):
        raise ValueError(f'{owner} must return logits or kdjax.networks.Outputs, got {type(result).__name__}')
    return Outputs(result, features)


def select_features(wanted: tuple[str, ...], available: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """Picks activations by module path.

    Raises:
      ValueError: there is no such path; the message lists those there are.
    """
    missing = [path for path in wanted if path not in available]
    if missing:
        raise ValueError(f'{owner} has no feature {missing[0]!r}; there are: {", ".join(sorted(available))}')
    return {path: available[path] for path in wanted}


def as_paths(features: str | tuple[str, ...]) -> tuple[str, ...]:
    """`features='stage3'` means the one path, not its letters."""
    return (features,) if isinstance(features, str) else tuple(features)
