"""Decoders of the Llama family: what most language models of today are, with a cache that a network carries as its state."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


class Decoder(nn.Module):
    """Llama's decoder: RMS norms, rotary positions, grouped queries and a gated MLP, from tokens to the next one's logits.

    Blocks are named `block0`, `block1`, ... and give hidden states [batch, length, width]; `hidden` is the normalised state
    that enters the head, whose kernel is `head/kernel` [width, vocabulary], or `tokens/embedding` [vocabulary, width] where
    `tied`. Norms, softmax and logits are in float32, all else in `dtype`.

    With `cache`, keys and values are kept in the collection `'cache'`, each at its position, so that a call with the tokens of
    a few positions sees all before them: `networks.from_linen(decoder, mutable=('cache',))` carries it, and
    `kdjax.generation.sample` fills it. To go back is to go on from an earlier position. Parameters are the same with and
    without, and so are the logits, up to rounding; beyond the cache they are NaN.

    Attributes:
      vocabulary: number of tokens.
      depth: number of blocks.
      width: of the hidden states.
      heads: of the queries.
      hidden: width of the MLP, between its two layers.
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
      dtype: of the arithmetic between norms.

    >>> import jax, jax.numpy as jnp
    >>> from kdjax import networks
    >>> decoder = Decoder(vocabulary=32, depth=2, width=16, heads=4, hidden=24, key_value_heads=2)
    >>> network = networks.from_linen(decoder, features='block1')
    >>> tokens = jnp.array([[5, 7, 2]])
    >>> outputs, _ = network.apply(network.init(jax.random.key(0), tokens), tokens)
    >>> outputs.logits.shape, outputs.features['block1'].shape
    ((1, 3, 32), (1, 3, 16))

    Reference:
      Touvron et al. LLaMA: Open and Efficient Foundation Language Models. 2023. https://arxiv.org/abs/2302.13971
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
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array, positions: jax.Array | None = None, segments: jax.Array | None = None) -> jax.Array:
        """Maps tokens [batch, length] to logits [batch, length, vocabulary] of the token after each.

        Args:
          tokens: integers below the vocabulary; others make all logits of their row NaN.
          positions: integers [batch, length]; by default from 0, anew in each segment.
          segments: integers [batch, length] that say which text each token is of, in a row that packs several; a token sees its
            own alone, and what has the same number without being beside it is the same text.

        Raises:
          ValueError: shapes or dtypes do not fit, or heads.
        """
        _check(self, tokens, segments)
        if positions is None:
            positions = _positions(tokens, segments)
        seen = None if self.cache is not None else _seen(tokens, segments, self.window)
        angles = _angles(positions, self.head_width or self.width // self.heads, self.theta)
        known = (tokens >= 0) & (tokens < self.vocabulary)
        embedding = nn.Embed(self.vocabulary, self.width, dtype=self.dtype, name='tokens')
        # Traced tokens can be no error, and must not become plausible numbers: not their own, nor of what sees them.
        x = jnp.where(known[..., None], embedding(jnp.where(known, tokens, 0)), jnp.nan)
        options = (
            *(self.width, self.heads, self.key_value_heads or self.heads, self.head_width or self.width // self.heads),
            *(self.hidden, self.epsilon, self.attention_bias, self.window, self.cache, self.dtype),
        )
        if self.scan:
            lifted: Any = nn.scan  # whose types know axes alone
            stacked = lifted(
                _ScannedBlock,
                variable_axes={'params': 0, 'cache': 0},
                split_rngs={'params': True},
                in_axes=(nn.broadcast, nn.broadcast, nn.broadcast),
                length=self.depth,
            )
            x, _ = stacked(options, name='blocks')(x, positions, angles, seen)
        else:
            for i in range(self.depth):
                x = _Block(*options, name=f'block{i}')(x, positions, angles, seen)
        x = _normalized(x, self.epsilon, self.dtype, 'hidden')
        if self.tied:
            logits = embedding.attend(x).astype(jnp.float32)
        else:
            logits = nn.Dense(self.vocabulary, use_bias=False, dtype=self.dtype, name='head')(x).astype(jnp.float32)
        if self.softcap is not None:
            logits = self.softcap * jnp.tanh(logits / self.softcap)
        if self.cache is None:
            return logits
        return jnp.where(((positions >= 0) & (positions < self.cache))[..., None], logits, jnp.nan)


def _check(decoder: Decoder, tokens: jax.Array, segments: jax.Array | None) -> None:
    of_keys = decoder.key_value_heads or decoder.heads
    if decoder.heads % of_keys or (decoder.head_width is None and decoder.width % decoder.heads):
        raise ValueError(
            f'Decoder: {of_keys} heads of keys and values must divide {decoder.heads} heads, '
            f'and these the width {decoder.width}'
        )
    if (decoder.head_width or decoder.width // decoder.heads) % 2:
        raise ValueError('Decoder: rotary positions turn pairs of numbers: the width of a head must be even')
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f'Decoder: tokens must be integers [batch, length], got {tokens.dtype} {tokens.shape}')
    if segments is not None and (decoder.cache is not None or segments.shape != tokens.shape):
        raise ValueError(
            f'Decoder: segments must have the shape of the tokens, {tokens.shape}, and no cache, got {segments.shape} and '
            f'a cache of {decoder.cache}'
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


def _angles(positions: jax.Array, width: int, theta: float) -> jax.Array:
    """Rotary angles [batch, length, 1, width / 2]."""
    frequencies = np.float32(theta) ** (-np.arange(0, width, 2, dtype=np.float32) / width)
    return positions.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None]


def _rotated(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Turns the pairs (x_i, x_(i + width / 2)), as the checkpoints of Hugging Face have them."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cosine, sine = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1).astype(x.dtype)


def _normalized(x: jax.Array, epsilon: float, dtype: jnp.dtype, name: str) -> jax.Array:
    """An RMS norm, in float32, as a submodule of the module that calls it."""
    return nn.RMSNorm(epsilon, dtype=jnp.float32, name=name)(x.astype(jnp.float32)).astype(dtype)


class _Block(nn.Module):
    width: int
    heads: int
    key_value_heads: int
    head_width: int
    hidden: int
    epsilon: float
    attention_bias: bool
    window: int | None
    cache: int | None
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array, angles: jax.Array, seen: jax.Array | None) -> jax.Array:
        normalized = _normalized(x, self.epsilon, self.dtype, 'attention_norm')
        attention = _Attention(
            *(self.width, self.heads, self.key_value_heads, self.head_width, self.attention_bias),
            *(self.window, self.cache, self.dtype),
            name='attention',
        )
        x = x + attention(normalized, positions, angles, seen)
        normalized = _normalized(x, self.epsilon, self.dtype, 'mlp_norm')
        gate, up = (nn.Dense(self.hidden, use_bias=False, dtype=self.dtype, name=name)(normalized) for name in ('gate', 'up'))
        return x + nn.Dense(self.width, use_bias=False, dtype=self.dtype, name='down')(nn.silu(gate) * up)


class _ScannedBlock(nn.Module):
    options: tuple

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array, angles: jax.Array, seen: jax.Array | None) -> tuple[jax.Array, None]:
        return _Block(*self.options, name='block')(x, positions, angles, seen), None


class _Attention(nn.Module):
    width: int
    heads: int
    key_value_heads: int
    head_width: int
    bias: bool
    window: int | None
    cache: int | None
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array, angles: jax.Array, seen: jax.Array | None) -> jax.Array:
        def project(heads: int, name: str) -> jax.Array:
            features = heads * self.head_width
            flat = nn.Dense(features, use_bias=self.bias, dtype=self.dtype, name=name)(x)
            return flat.reshape(*x.shape[:-1], heads, self.head_width)

        queries = _rotated(project(self.heads, 'query'), angles)
        keys = _rotated(project(self.key_value_heads, 'key'), angles)
        values = project(self.key_value_heads, 'value')
        if self.cache is not None:
            keys, values = self._remembered('keys', keys, positions), self._remembered('values', values, positions)
            slot = jnp.arange(self.cache, dtype=jnp.int32)[None, None, None]
            behind = positions[:, None, :, None] - slot
            seen = (behind >= 0) & (behind < (self.window or self.cache + 1))
        # jax's own function promotes half precision to the float32 of its softmax.
        with jax.numpy_dtype_promotion('standard'):
            attended = jax.nn.dot_product_attention(queries, keys, values, mask=seen)
        flat = attended.reshape(*x.shape[:-1], self.heads * self.head_width)
        return nn.Dense(self.width, use_bias=False, dtype=self.dtype, name='output')(flat)

    def _remembered(self, name: str, new: jax.Array, positions: jax.Array) -> jax.Array:
        """What the cache holds, each token in the slot of its position; what is beyond it is lost."""
        shape = (new.shape[0], self.cache, *new.shape[2:])
        slots = self.variable('cache', name, jnp.zeros, shape, new.dtype)
        if self.is_initializing():
            return slots.value
        rows = jnp.arange(len(new))[:, None]
        slots.value = slots.value.at[rows, positions].set(new, mode='drop')
        return slots.value
