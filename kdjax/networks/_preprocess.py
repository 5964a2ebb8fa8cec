"""Pure functions before a network's inputs and behind its logits."""

from collections.abc import Callable
from typing import Any

import jax

from kdjax.networks._linear_logits import LinearLogits
from kdjax.networks._network import Network, Outputs


def preprocess(network: Network, function: Callable[[Any], Any]) -> Network:
    """Puts a pure function in front of a network, such as the normalisation that it was trained with.

    Teacher and student then share raw inputs, such as uint8 images, though each was trained with a mean and a deviation of
    its own.

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
    the first task of a network with several, `lambda logits: logits + shift` moves its biases. Of a network that ends in a
    softmax, `jax.numpy.log` makes logits: they differ by a constant that no softmax sees. Of one that ends in a sigmoid,
    `jax.scipy.special.logit` does, and one yes or no for each example becomes two classes by
    `lambda p: jnp.log(jnp.stack([1 - p, p], axis=-1))`.

    Args:
      network: the network; its features stay as they are.
      function: from logits to logits; a network without logits stays without. Of `LinearLogits` it can take some classes,
        `logits[..., :50_257]`, such as a vocabulary without its padding; `networks.dense_logits` makes an array of them.

    Raises:
      ValueError: when traced: the function does something else with `LinearLogits`.

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
        logits: Any = outputs.logits
        try:
            return Outputs(None if logits is None else function(logits), outputs.features), state
        except (TypeError, AttributeError) as error:
            if not isinstance(logits, LinearLogits):
                raise
            raise ValueError(
                'postprocess: of LinearLogits the function can only pick classes, logits[..., start:stop], or make an array, '
                f'networks.dense_logits(logits): {error}'
            ) from None

    return Network(network.init, apply)
