"""Sampling, one token at a time."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax.generation._sampling import (
    State,
    check_prompts,
    check_sampling,
    draw,
    filtered,
    keys_of_rows,
    logits_at,
    read,
)
from kdjax.networks import Network


class Generated(NamedTuple):
    """What was written after each prompt.

    Attributes:
      tokens: int32 [batch, new_tokens]; after the end of a text, the token that ends it.
      log_probabilities: float32 [batch, new_tokens], of these tokens by the decoder itself, at temperature 1 and with nothing
        cut off; 0 after the end.
      lengths: int32 [batch], how many of the tokens there are, with the one that ends the text.
    """

    tokens: jax.Array
    log_probabilities: jax.Array
    lengths: jax.Array


def sample(
    decoder: Network,
    variables: State,
    prompts: ArrayLike,
    key: jax.Array,
    *,
    new_tokens: int,
    lengths: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    top_k: int | None = None,
    top_p: ArrayLike | None = None,
    eos: ArrayLike | None = None,
) -> Generated:
    """Writes on from prompts: each token is drawn from what the decoder says after those before it.

    y_t ~ softmax(z_t / T), cut to the `top_k` likeliest tokens and then to the fewest that together have `top_p`, and
    renormalised after each. One `jax.lax.scan`, with the cache as its state. Where the decoder gives NaN, tokens are -1 and
    their log-probabilities NaN.

    Args:
      decoder: see `kdjax.generation`.
      variables: its variables; a cache among them is not looked at.
      prompts: integers [batch, length], padded at their right with any number.
      key: a random key, from which each row gets one by its number; or a key for each row.
      new_tokens: how many to write.
      lengths: of the prompts without their padding, integers [batch]; None where none is padded.
      temperature: T; 0 for the likeliest token, the first of several. Traced and 0, it is the smallest that is positive.
      top_k: how many tokens to draw from; those that are as likely as the last of them stay too. None for all.
      top_p: share of the probability to draw from, above 0 and at most 1; None for all.
      eos: the token that ends a text; None for texts that go on.

    Raises:
      ValueError: prompts, lengths, keys or an option do not fit, the decoder has no cache, or one that is too short. A number
        that is traced cannot be known to be wrong: what it would give is -1 and NaN.

    >>> import jax, jax.numpy as jnp
    >>> from kdjax import models, networks
    >>> module = models.Decoder(vocabulary=32, depth=1, width=16, heads=2, hidden=24, cache=8)
    >>> decoder, prompts = networks.from_linen(module, mutable=('cache',)), jnp.array([[5, 7, 2], [3, 0, 0]])
    >>> variables = decoder.init(jax.random.key(0), {'tokens': prompts})
    >>> written = sample(decoder, variables, prompts, jax.random.key(1), new_tokens=4, lengths=jnp.array([3, 1]), temperature=0)
    >>> written.tokens.shape, written.lengths.tolist()
    ((2, 4), [4, 4])

    Reference:
      Holtzman, Buys, Du, Forbes, Choi. The Curious Case of Neural Text Degeneration. 2020. https://arxiv.org/abs/1904.09751
    """
    check_sampling('sample', new_tokens, temperature, top_k, top_p)
    checked = check_prompts('sample', prompts, lengths)
    batch = len(checked.tokens)
    keys = keys_of_rows('sample', key, batch)
    weights = {name: value for name, value in variables.items() if name != 'cache'}
    logits, state = read('sample', decoder, weights, checked, new_tokens, eos)
    end = None if eos is None else jnp.asarray(eos, jnp.int32)

    def write(
        carry: tuple[jax.Array, State, jax.Array], step: jax.Array
    ) -> tuple[tuple, tuple[jax.Array, jax.Array, jax.Array]]:
        logits, state, ended = carry
        at_step = jax.vmap(lambda key: jax.random.fold_in(key, step))(keys)
        drawn = draw(at_step, filtered(logits, temperature, top_k, top_p))
        log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        chosen = jnp.take_along_axis(log_p, jnp.maximum(drawn, 0)[:, None], axis=-1)[:, 0]
        tokens = drawn if end is None else jnp.where(ended, end, drawn)
        now_ended = ended if end is None else ended | (tokens == end)
        inputs = {'tokens': tokens[:, None], 'positions': (checked.lengths + step)[:, None]}
        outputs, state = decoder.apply({**weights, **state}, inputs)
        return (logits_at(outputs, jnp.zeros(batch, jnp.int32)), state, now_ended), (
            tokens,
            jnp.where(ended, 0.0, chosen),
            ~ended,
        )

    start = logits, state, jnp.zeros(batch, jnp.bool_)
    _, (tokens, log_probabilities, counted) = jax.lax.scan(write, start, jnp.arange(new_tokens, dtype=jnp.int32))
    return Generated(tokens.T, log_probabilities.T, jnp.sum(counted, axis=0, dtype=jnp.int32))
