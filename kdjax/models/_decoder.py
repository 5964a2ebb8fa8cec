"""Decoders of the Llama family: what most language models of today are, with a cache that a network carries as its state."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict

from kdjax.models._decoder_blocks import Block, ScannedBlock, angles_of, normalized, product_in_float32
from kdjax.models._narrowing import within


class Decoder(nn.Module):
    """Llama's decoder: RMS norms, rotary positions, grouped queries and a gated MLP, from tokens to the next one's logits.

    Blocks are named `block0`, `block1`, ... and give hidden states [batch, length, width]; `hidden` is the normalised state
    that enters the head, whose kernel is `head/kernel` [width, vocabulary], or `tokens/embedding` [vocabulary, width] where
    `tied`: `networks.linear_head` takes them in place of the logits. Norms, angles and softmax are in float32, products for
    logits are summed in it, and all else is in `dtype`; parameters are in float32.

    With `cache`, keys and values are kept in the collection `'cache'`, each at its position, so that a call with the tokens of
    a few positions sees all before them: `networks.from_linen(decoder, mutable=('cache',))` carries it, and
    `kdjax.generation.sample` fills it. To go back is to go on from an earlier position. Parameters are the same with and
    without, and so are the logits, up to rounding; beyond the cache they are NaN.

    Attributes:
      vocabulary: number of tokens.
      depth: number of blocks.
      width: of the hidden states.
      heads: of the queries.
      hidden: width of the MLP, down(silu(gate(x)) · up(x)), between its layers.
      key_value_heads: heads of keys and values, each of which serves as many heads of queries; they divide `heads`. None for as
        many as `heads`.
      head_width: of a head, even; None for `width / heads`.
      theta: base of the rotary frequencies.
      epsilon: of the norms.
      attention_bias: whether queries, keys and values have a bias, as Qwen2's.
      tied: whether the head is the embedding, transposed.
      softcap: c > 0, logits become c · tanh(z / c), as Gemma's; None for none.
      window: how many positions a token sees, itself included; None for all before it.
      cache: length of the cache; None for a decoder without.
      scan: whether the blocks are one program that runs `depth` times, with parameters stacked under `blocks`. It compiles
        faster, and blocks have no paths of their own.
      narrowed: hidden widths of MLPs that have fewer, by the paths of both layers that make them, such as `block0/gate` and
        `block0/up`; see `kdjax.models.narrow`.
      dtype: of the arithmetic between norms.

    >>> import jax, jax.numpy as jnp
    >>> from kdjax import networks
    >>> decoder = Decoder(vocabulary=32, depth=2, width=16, heads=4, hidden=24, key_value_heads=2)
    >>> network = networks.from_linen(decoder, features='block1')
    >>> tokens = jnp.array([[5, 7, 2]])
    >>> outputs, _ = network.apply(network.init(jax.random.key(0), tokens), tokens)
    >>> outputs.logits.shape, outputs.features['block1'].shape
    ((1, 3, 32), (1, 3, 16))

    References:
      Touvron et al. LLaMA: Open and Efficient Foundation Language Models. 2023. https://arxiv.org/abs/2302.13971
      Su, Lu, Pan, Murtadha, Wen, Liu. RoFormer: Enhanced Transformer with Rotary Position Embedding. 2021.
      https://arxiv.org/abs/2104.09864
      Ainslie, Lee-Thorp, de Jong, Zemlyanskiy, Lebrón, Sanghai. GQA: Training Generalized Multi-Query Transformer Models from
      Multi-Head Checkpoints. 2023. https://arxiv.org/abs/2305.13245
      Shazeer. GLU Variants Improve Transformer. 2020. https://arxiv.org/abs/2002.05202
      Zhang, Sennrich. Root Mean Square Layer Normalization. 2019. https://arxiv.org/abs/1910.07467
    """

    vocabulary: int
    depth: int
    width: int
    heads: int
    hidden: int
    key_value_heads: int | None = None
    head_width: int | None = None
    theta: float = 10_000.0
    epsilon: float = 1e-5
    attention_bias: bool = False
    tied: bool = False
    softcap: float | None = None
    window: int | None = None
    cache: int | None = None
    scan: bool = False
    narrowed: Mapping[str, int] = FrozenDict()
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array, positions: jax.Array | None = None, segments: jax.Array | None = None) -> jax.Array:
        """Maps tokens [batch, length] to logits [batch, length, vocabulary] of the token after each.

        Args:
          tokens: integers below the vocabulary; others make all logits of their row NaN.
          positions: integers [batch, length]; by default from 0, anew in each segment and, with a cache, in each call.
          segments: integers [batch, length] that say which text each token is of, in a row that packs several; a token sees its
            own alone, and what has the same number without being beside it is the same text.

        Raises:
          ValueError: shapes or dtypes do not fit, or heads, or a window, a cache or a softcap is not positive; or
            the cache is of another batch.
        """
        _check(self, tokens, positions, segments)
        tokens = jnp.asarray(tokens, jnp.int32)
        positions = _positions(tokens, segments) if positions is None else jnp.asarray(positions, jnp.int32)
        seen = None if self.cache is not None else _seen(tokens, segments, self.window)
        head_width = self.head_width or self.width // self.heads
        angles = angles_of(positions, head_width, self.theta)
        known = (tokens >= 0) & (tokens < self.vocabulary)
        embedding = nn.Embed(self.vocabulary, self.width, dtype=self.dtype, name='tokens')
        # Traced tokens can be no error, and must not become plausible numbers: not their own, nor of what sees them.
        x = jnp.where(known[..., None], embedding(jnp.where(known, tokens, 0)), jnp.nan)
        options = (
            *(self.width, self.heads, self.key_value_heads or self.heads, head_width),
            *(self.hidden, self.epsilon, self.attention_bias, self.window, self.cache, self.dtype),
        )
        if self.scan:
            lifted: Any = nn.scan  # whose types know axes alone
            stacked = lifted(
                ScannedBlock,
                variable_axes={'params': 0, 'cache': 0},
                split_rngs={'params': True},
                in_axes=(nn.broadcast, nn.broadcast, nn.broadcast),
                length=self.depth,
            )
            narrowed = within(within(self.narrowed, 'blocks'), 'block')
            x, _ = stacked(options, narrowed, name='blocks')(x, positions, angles, seen)
        else:
            for i in range(self.depth):
                x = Block(*options, within(self.narrowed, f'block{i}'), name=f'block{i}')(x, positions, angles, seen)
        x = normalized(x, self.epsilon, self.dtype, 'hidden')
        # Half precision has a step of 1/8 at a logit of 20, which a softmax shows: the products are not rounded to it.
        if self.tied:
            logits = product_in_float32(x, embedding.embedding.astype(self.dtype), (((2,), (1,)), ((), ())))
        else:
            head = nn.Dense(self.vocabulary, use_bias=False, dtype=self.dtype, dot_general=product_in_float32, name='head')
            logits = head(x)
        if self.softcap is not None:
            logits = self.softcap * jnp.tanh(logits / self.softcap)
        if self.cache is None:
            return logits
        return jnp.where(((positions >= 0) & (positions < self.cache))[..., None], logits, jnp.nan)


def _check(decoder: Decoder, tokens: jax.Array, positions: jax.Array | None, segments: jax.Array | None) -> None:
    of_keys = decoder.key_value_heads or decoder.heads
    if decoder.heads % of_keys or (decoder.head_width is None and decoder.width % decoder.heads):
        raise ValueError(
            f'Decoder: {of_keys} heads of keys and values must divide {decoder.heads} heads, '
            f'and these the width {decoder.width}'
        )
    if (decoder.head_width or decoder.width // decoder.heads) % 2:
        raise ValueError('Decoder: rotary positions turn pairs of numbers: the width of a head must be even')
    for name, value in (('window', decoder.window), ('cache', decoder.cache), ('softcap', decoder.softcap)):
        if value is not None and not value > 0:
            raise ValueError(f'Decoder: {name} must be positive, or None for none, got {value}')
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f'Decoder: tokens must be integers [batch, length], got {tokens.dtype} {tokens.shape}')
    if segments is not None and decoder.cache is not None:
        raise ValueError(f'Decoder: segments are for a decoder without a cache, this one has a cache of {decoder.cache}')
    for name, x in (('positions', positions), ('segments', segments)):
        if x is not None and (x.shape != tokens.shape or not jnp.issubdtype(x.dtype, jnp.integer)):
            raise ValueError(
                f'Decoder: {name} must be integers of the shape of the tokens, {tokens.shape}, got {x.dtype} {x.shape}'
            )


def _positions(tokens: jax.Array, segments: jax.Array | None) -> jax.Array:
    """From 0 in each segment."""
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    if segments is None:
        return index
    begins = jnp.concatenate([jnp.ones((len(tokens), 1), jnp.bool_), segments[:, 1:] != segments[:, :-1]], axis=1)
    return index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)


def _seen(tokens: jax.Array, segments: jax.Array | None, window: int | None) -> jax.Array:
    """Which keys each query sees, [batch or 1, 1, length, length]."""
    index = np.arange(tokens.shape[1])
    behind = index[:, None] - index[None, :]
    seen = jnp.asarray((behind >= 0) & (behind < (window or len(index) + 1)))[None, None]
    return seen if segments is None else seen & (segments[:, None, :, None] == segments[:, None, None, :])
