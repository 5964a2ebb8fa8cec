"""The blocks of decoders: rotary positions, norms, grouped queries with or without a cache, and the gated MLP."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


def angles_of(positions: jax.Array, width: int, theta: float) -> jax.Array:
    """Rotary angles [batch, length, 1, width / 2]."""
    frequencies = np.float32(theta) ** (-np.arange(0, width, 2, dtype=np.float32) / width)
    return positions.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None]


def _rotated(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Turns the pairs (x_i, x_(i + width / 2)), as the checkpoints of Hugging Face have them."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cosine, sine = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1).astype(x.dtype)


def normalized(x: jax.Array, epsilon: float, dtype: jnp.dtype, name: str) -> jax.Array:
    """An RMS norm, in float32 up to its result, as a submodule of the module that calls it."""
    # Flax asks what its dtype and float32 promote to.
    with jax.numpy_dtype_promotion('standard'):
        return nn.RMSNorm(epsilon, dtype=dtype, name=name)(x.astype(jnp.float32))


def product_in_float32(x: jax.Array, y: jax.Array, axes: Any, precision: Any = None) -> jax.Array:
    """`jax.lax.dot_general`, summed in float32 and left there."""
    return jax.lax.dot_general(x, y, axes, precision=precision, preferred_element_type=jnp.float32)


class Block(nn.Module):
    """Attention and a gated MLP, each with a norm before it and added to what enters it."""

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
    narrowed: Mapping[str, int]

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array, angles: jax.Array, seen: jax.Array | None) -> jax.Array:
        """Maps hidden states [batch, length, width] to those after the block; `seen` is None where the cache says it."""
        y = normalized(x, self.epsilon, self.dtype, 'attention_norm')
        attention = _Attention(
            *(self.width, self.heads, self.key_value_heads, self.head_width, self.attention_bias),
            *(self.window, self.cache, self.dtype),
            name='attention',
        )
        x = x + attention(y, positions, angles, seen)
        y = normalized(x, self.epsilon, self.dtype, 'mlp_norm')
        gate, up = (
            nn.Dense(self.narrowed.get(name, self.hidden), use_bias=False, dtype=self.dtype, name=name)(y)
            for name in ('gate', 'up')
        )
        return x + nn.Dense(self.width, use_bias=False, dtype=self.dtype, name='down')(nn.silu(gate) * up)


class ScannedBlock(nn.Module):
    """A block with the signature that `nn.scan` calls; its options are those of `Block` in order."""

    options: tuple
    narrowed: Mapping[str, int]

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array, angles: jax.Array, seen: jax.Array | None) -> tuple[jax.Array, None]:
        """As `Block`, with nothing beside, as `nn.scan` wants it."""
        return Block(*self.options, narrowed=self.narrowed, name='block')(x, positions, angles, seen), None


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
        if slots.value.shape != shape:
            raise ValueError(f'Decoder: the cache must have the shape {shape} beside these tokens, got {slots.value.shape}')
        rows = jnp.arange(len(new))[:, None]
        slots.value = slots.value.at[rows, positions].set(new, mode='drop')
        return slots.value
