"""How a network is computed, not what: in half precision."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from kdjax.networks._linear_logits import LinearLogits
from kdjax.networks._network import Network, Outputs


def mixed_precision(network: Network, dtype: DTypeLike = jnp.bfloat16) -> Network:
    """Computes a network in half precision, while its parameters, gradients, statistics and outputs stay in float32.

    Parameters and floating-point inputs are cast on the way in, logits and features back on the way out, so losses and
    optimizers see float32 only. `LinearLogits` keep half of the digits until they are computed, summed in float32. Modules must
    not fix a `dtype` of their own. Put `preprocess` inside of it, or the inputs that
    it makes stay as they are.

    Args:
      network: the network.
      dtype: of the arithmetic. bfloat16 needs no loss scaling; float16 does, and gets none here.

    Raises:
      ValueError: the type is not floating point.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> from kdjax.networks import from_linen
    >>> network = mixed_precision(from_linen(nn.Dense(3)))
    >>> variables = network.init(jax.random.key(0), jnp.ones((2, 5)))
    >>> outputs, _ = network.apply(variables, jnp.ones((2, 5)))
    >>> variables['params']['kernel'].dtype, outputs.logits.dtype
    (dtype('float32'), dtype('float32'))

    Reference:
      Micikevicius, Narang, Alben, Diamos, Elsen, Garcia, Ginsburg, Houston, Kuchaiev, Venkatesh, Wu. Mixed Precision Training.
      2018. https://arxiv.org/abs/1710.03740
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f'mixed_precision: dtype must be floating point, such as bfloat16, got {jnp.dtype(dtype)}')

    def apply(
        variables: dict[str, Any], inputs: Any, *, train: bool = False, rng: jax.Array | None = None
    ) -> tuple[Outputs, dict[str, Any]]:
        half = {name: _cast(collection, dtype) if name == 'params' else collection for name, collection in variables.items()}
        # Statistics stay in float32, and meet activations that are not.
        with jax.numpy_dtype_promotion('standard'):
            outputs, state = network.apply(half, _cast(inputs, dtype), train=train, rng=rng)
        return _cast(outputs, jnp.float32), {name: _as_before(state[name], variables.get(name)) for name in state}

    return Network(network.init, apply)


def _as_before(state: Any, before: Any) -> Any:
    """State in the types that it had; what is new keeps its own."""
    if jax.tree.structure(state) != jax.tree.structure(before):
        return state
    return jax.tree.map(lambda new, old: new if new.dtype == old.dtype else new.astype(old.dtype), state, before)


def _cast(tree: Any, dtype: DTypeLike) -> Any:
    def cast(x: Any) -> Any:
        # Products of halves are what the network means by its logits, and summed in float32 anyway.
        if isinstance(x, LinearLogits) or not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return x.astype(dtype)

    return jax.tree.map(cast, tree, is_leaf=lambda x: isinstance(x, LinearLogits))
