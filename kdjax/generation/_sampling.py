"""What generators share: checks of prompts, the cache after a prompt, and the distribution that a token is drawn from."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kdjax import numerics
from kdjax.networks import LinearLogits, Network, Outputs, dense_logits

State = dict[str, Any]


class Prompts(NamedTuple):
    """Prompts whose shapes fit: tokens [batch, length], zeros where padded, lengths [batch], and the tokens where known."""

    tokens: jax.Array
    lengths: jax.Array
    known: np.ndarray | None


def check_prompts(name: str, prompts: ArrayLike, lengths: ArrayLike | None) -> Prompts:
    """Prompts [batch, length] and the length of each, as int32."""
    prompts = prompts if isinstance(prompts, jax.Array) else np.asarray(prompts)
    shape, dtype = prompts.shape, prompts.dtype
    if len(shape) != 2 or not jnp.issubdtype(dtype, jnp.integer) or shape[1] < 1:
        raise ValueError(f'{name}: prompts must be integers [batch, length] of one token or more, got {dtype} {shape}')
    lengths = np.full(shape[0], shape[1], np.int32) if lengths is None else lengths
    lengths = lengths if isinstance(lengths, jax.Array) else np.asarray(lengths)
    if lengths.shape != shape[:1] or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(
            f'{name}: lengths must be integers {shape[:1]}, one of each prompt, got {lengths.dtype} {lengths.shape}'
        )
    numbers, tokens = numerics.known(lengths), numerics.known(prompts)
    if numbers is not None and np.any((numbers < 1) | (numbers > shape[1])):
        wrong = numbers[(numbers < 1) | (numbers > shape[1])][0]
        raise ValueError(f'{name}: lengths of prompts must be from 1 to {shape[1]}, got {wrong}')
    if tokens is not None:
        tokens = None if numbers is None else np.where(np.arange(shape[1])[None] < numbers[:, None], tokens, 0)
    lengths = jnp.asarray(lengths, jnp.int32)
    # Padding may be a number that is no token, such as -1, which the decoder would answer with NaN.
    inside = jnp.arange(shape[1], dtype=jnp.int32)[None] < lengths[:, None]
    return Prompts(jnp.where(inside, jnp.asarray(prompts, jnp.int32), 0), lengths, tokens)


def check_count(name: str, **counts: int | None) -> None:
    """Raises where one is not an integer of at least 1, or None."""
    for argument, count in counts.items():
        if count is not None and (not isinstance(count, (int, np.integer)) or count < 1):
            raise ValueError(f'{name}: {argument} must be an integer of at least 1, got {count}')


def check_sampling(name: str, new_tokens: int, temperature: ArrayLike, top_k: int | None, top_p: ArrayLike | None) -> None:
    """Raises where there is nothing to draw from; numbers that are traced are NaN instead, and so is what is drawn from."""
    check_count(name, new_tokens=new_tokens, top_k=top_k)
    numerics.check_scalars(name, temperature=temperature, top_p=1.0 if top_p is None else top_p)
    number, share = numerics.known(temperature), None if top_p is None else numerics.known(top_p)
    if number is not None and not 0 <= number < np.inf:
        raise ValueError(f'{name}: temperature must be positive, or 0 for the likeliest token, got {temperature}')
    if share is not None and not 0 < share <= 1:
        raise ValueError(f'{name}: top_p must be above 0 and at most 1, got {top_p}')


def keys_of_rows(name: str, key: jax.Array, rows: int) -> jax.Array:
    """A key for each row, so that a row does not depend on how many others there are."""
    if jnp.issubdtype(key.dtype, jnp.uint32):
        key = jax.random.wrap_key_data(key)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.shape not in ((), (rows,)):
        raise ValueError(f'{name}: key must be a random key, or one for each of {rows} rows, got {key.dtype} {key.shape}')
    return key if key.ndim == 1 else jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(rows))


def read(
    name: str, decoder: Network, variables: State, prompts: Prompts, further: int, eos: ArrayLike | None
) -> tuple[jax.Array, State]:
    """The logits after each prompt [batch, vocabulary] and the state, once they are known to leave room for more tokens.

    Prompts are padded at their right: what stands there is overwritten by what comes, before anything sees it.
    """
    batch, length = prompts.tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (batch, length))
    outputs, state = decoder.apply(variables, {'tokens': prompts.tokens, 'positions': positions})
    found, vocabulary = prompts.known, outputs.logits.shape[-1]
    if found is not None and np.any((found < 0) | (found >= vocabulary)):
        wrong = found[(found < 0) | (found >= vocabulary)][0]
        raise ValueError(f'{name}: tokens of prompts must be from 0 to {vocabulary - 1}, got {wrong}')
    end = None if eos is None else numerics.known(eos)
    if end is not None and (end.ndim or not np.issubdtype(end.dtype, np.integer) or not 0 <= end < vocabulary):
        raise ValueError(f'{name}: eos must be a token from 0 to {vocabulary - 1}, or None, got {eos}')
    room = _room(state)
    if not state or room is None:
        raise ValueError(
            f'{name}: the decoder keeps no cache: give it one, as in networks.from_linen(models.Decoder(..., cache=512), '
            "mutable=('cache',))"
        )
    if length + further > room:
        raise ValueError(f'{name}: prompts of {length} tokens and {further} new ones need a longer cache than {room}')
    return logits_at(outputs, prompts.lengths - 1), state


def logits_at(outputs: Outputs, index: jax.Array) -> jax.Array:
    """The logits [batch, vocabulary] at one place of each row; of a `linear_head` no others are computed."""
    logits: Any = outputs.logits
    factors = isinstance(logits, LinearLogits)
    picked = jnp.take_along_axis(logits.hidden if factors else logits, index[:, None, None], axis=1)
    return (dense_logits(dataclasses.replace(logits, hidden=picked)) if factors else picked)[:, 0]


def _room(state: State) -> int | None:
    """The number of slots of a cache, whose arrays are [..., batch, slots, heads, width]."""
    sizes = {
        leaf.shape[-3] for path, leaf in jax.tree_util.tree_leaves_with_path(state) if getattr(path[-1], 'key', '') == 'keys'
    }
    return min(sizes) if sizes else None


def filtered(logits: jax.Array, temperature: ArrayLike, top_k: int | None, top_p: ArrayLike | None) -> jax.Array:
    """Log-probabilities [..., vocabulary] to draw from; at temperature 0 all is on the first of the likeliest tokens."""
    logits = logits.astype(jnp.float32)
    number = numerics.known(temperature)
    if number is not None and number == 0:
        likeliest = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=jnp.bool_)
        broken = jnp.any(jnp.isnan(logits), axis=-1, keepdims=True)
        return jnp.where(broken, jnp.nan, jnp.where(likeliest, 0.0, -jnp.inf))
    temperature = jnp.asarray(temperature, jnp.float32)
    temperature = jnp.where(temperature >= 0, jnp.maximum(temperature, jnp.finfo(jnp.float32).tiny), jnp.nan)
    # From the largest on, or a temperature near 0 makes them infinite.
    log_p = jax.nn.log_softmax((logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature, axis=-1)
    if top_k is not None and top_k < logits.shape[-1]:
        least = jax.lax.top_k(log_p, top_k)[0][..., -1:]
        log_p = jax.nn.log_softmax(jnp.where(log_p < least, -jnp.inf, log_p), axis=-1)
    if top_p is not None:
        share = jnp.asarray(top_p, jnp.float32)
        share = jnp.where((share > 0) & (share <= 1), share, jnp.nan)
        falling = -jnp.sort(-log_p, axis=-1)
        # A token is kept where those before it have less than top_p, so that the first always is; with 1 rounding cuts none.
        before = jnp.cumsum(jnp.exp(falling), axis=-1) - jnp.exp(falling)
        kept = (before < share) | (share == 1)
        least = jnp.min(jnp.where(kept, falling, jnp.inf), axis=-1, keepdims=True)
        log_p = jax.nn.log_softmax(jnp.where(log_p < least, -jnp.inf, log_p), axis=-1)
    return log_p


def draw(keys: jax.Array, log_p: jax.Array) -> jax.Array:
    """One token for each row; -1 where there is no distribution."""
    tokens = jax.vmap(jax.random.categorical)(keys, log_p).astype(jnp.int32)
    return jnp.where(jnp.any(jnp.isnan(log_p), axis=-1), -1, tokens)
