"""What generators share: checks of prompts, the cache after a prompt, and the distribution that a token is drawn from."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kdjax import numerics
from kdjax.networks import Network

State = dict[str, Any]


def check_prompts(name: str, prompts: ArrayLike, lengths: ArrayLike | None) -> tuple[jax.Array, jax.Array]:
    """Prompts [batch, length] and the length of each, as int32."""
    prompts = jnp.asarray(prompts)
    if prompts.ndim != 2 or not jnp.issubdtype(prompts.dtype, jnp.integer) or prompts.shape[1] < 1:
        raise ValueError(
            f'{name}: prompts must be integers [batch, length] of one token or more, got {prompts.dtype} {prompts.shape}'
        )
    found = jnp.full(len(prompts), prompts.shape[1], jnp.int32) if lengths is None else jnp.asarray(lengths)
    if found.shape != prompts.shape[:1] or not jnp.issubdtype(found.dtype, jnp.integer):
        raise ValueError(
            f'{name}: lengths must be integers {prompts.shape[:1]}, one of each prompt, got {found.dtype} {found.shape}'
        )
    numbers = numerics.known(found)
    if numbers is not None and np.any((numbers < 1) | (numbers > prompts.shape[1])):
        wrong = numbers[(numbers < 1) | (numbers > prompts.shape[1])][0]
        raise ValueError(f'{name}: lengths of prompts must be from 1 to {prompts.shape[1]}, got {wrong}')
    return prompts.astype(jnp.int32), found.astype(jnp.int32)


def check_sampling(name: str, new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises where there is nothing to draw from."""
    if new_tokens < 1:
        raise ValueError(f'{name}: new_tokens must be at least 1, got {new_tokens}')
    if not 0 <= temperature < float('inf'):
        raise ValueError(f'{name}: temperature must be positive, or 0 for the likeliest token, got {temperature}')
    if top_k is not None and top_k < 1:
        raise ValueError(f'{name}: top_k must be at least 1, got {top_k}')
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f'{name}: top_p must be above 0 and at most 1, got {top_p}')


def keys_of_rows(key: jax.Array, rows: int) -> jax.Array:
    """A key for each row, so that a row does not depend on how many others there are."""
    return key if key.ndim == 1 else jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(rows))


def read(
    name: str, decoder: Network, variables: State, prompts: jax.Array, lengths: jax.Array, further: int
) -> tuple[jax.Array, State]:
    """The logits after each prompt [batch, vocabulary] and the state, once they are known to leave room for more tokens.

    Prompts are padded at their right: what stands there is overwritten by what comes, before anything sees it.
    """
    positions = jnp.broadcast_to(jnp.arange(prompts.shape[1], dtype=jnp.int32)[None], prompts.shape)
    outputs, state = decoder.apply(variables, {'tokens': prompts, 'positions': positions})
    found, vocabulary = numerics.known(prompts), outputs.logits.shape[-1]
    if found is not None and np.any((found < 0) | (found >= vocabulary)):
        wrong = found[(found < 0) | (found >= vocabulary)][0]
        raise ValueError(f'{name}: tokens of prompts must be from 0 to {vocabulary - 1}, got {wrong}')
    room = _room(state)
    if not state or room is None:
        raise ValueError(
            f'{name}: the decoder keeps no cache: give it one, as in networks.from_linen(models.Decoder(..., cache=512), '
            "mutable=('cache',))"
        )
    if prompts.shape[1] + further > room:
        raise ValueError(f'{name}: prompts of {prompts.shape[1]} tokens and {further} new ones need a longer cache than {room}')
    return jnp.take_along_axis(outputs.logits, lengths[:, None, None] - 1, axis=1)[:, 0], state


def _room(state: State) -> int | None:
    """The number of slots of a cache, whose arrays are [..., batch, slots, heads, width]."""
    sizes = {
        leaf.shape[-3] for path, leaf in jax.tree_util.tree_leaves_with_path(state) if getattr(path[-1], 'key', '') == 'keys'
    }
    return min(sizes) if sizes else None


def filtered(logits: jax.Array, temperature: float, top_k: int | None, top_p: float | None) -> jax.Array:
    """Log-probabilities [..., vocabulary] to draw from; at temperature 0 all is on the first of the likeliest tokens."""
    logits = logits.astype(jnp.float32)
    if temperature == 0:
        likeliest = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=jnp.bool_)
        broken = jnp.any(jnp.isnan(logits), axis=-1, keepdims=True)
        return jnp.where(broken, jnp.nan, jnp.where(likeliest, 0.0, -jnp.inf))
    log_p = jax.nn.log_softmax(logits / temperature, axis=-1)
    if top_k is not None and top_k < logits.shape[-1]:
        least = jax.lax.top_k(log_p, top_k)[0][..., -1:]
        log_p = jax.nn.log_softmax(jnp.where(log_p < least, -jnp.inf, log_p), axis=-1)
    if top_p is not None and top_p < 1:
        falling = -jnp.sort(-log_p, axis=-1)
        # A token is kept where those before it have less than top_p, so that the first always is.
        before = jnp.cumsum(jnp.exp(falling), axis=-1) - jnp.exp(falling)
        least = jnp.min(jnp.where(before < top_p, falling, jnp.inf), axis=-1, keepdims=True)
        log_p = jax.nn.log_softmax(jnp.where(log_p < least, -jnp.inf, log_p), axis=-1)
    return log_p


def draw(keys: jax.Array, log_p: jax.Array) -> jax.Array:
    """One token for each row; -1 where there is no distribution."""
    tokens = jax.vmap(jax.random.categorical)(keys, log_p).astype(jnp.int32)
    return jnp.where(jnp.any(jnp.isnan(log_p), axis=-1), -1, tokens)
