"""Attention of every token to every other, whose scores and values can be tapped."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class Attention(nn.Module):
    """Softmax attention with biases, tapped as `scores` [batch, heads, queries, keys], before mask and softmax, and `values`.

    Attributes:
      heads: how many; they divide the width.
      dtype: of the arithmetic but for the softmax, which is in float32 at least; None for that of inputs and parameters.
    """

    heads: int
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Maps tokens [batch, tokens, width] to as many; `mask` [batch, tokens] says which of them are seen."""
        width = x.shape[-1] // self.heads
        query, key, value = (
            nn.DenseGeneral((self.heads, width), dtype=self.dtype, name=name)(x).swapaxes(1, 2)
            for name in ('query', 'key', 'value')
        )
        scores = jnp.einsum('bhqd,bhkd->bhqk', query, key) / jnp.sqrt(jnp.float32(width)).astype(query.dtype)
        self.sow('intermediates', 'scores', scores)
        self.sow('intermediates', 'values', value)
        if mask is not None:
            # Finite, so that a row of padding alone is no NaN.
            scores = jnp.where(mask[:, None, None], scores, jnp.finfo(scores.dtype).min)
        wide = scores.astype(jnp.float32) if jnp.finfo(scores.dtype).bits < 32 else scores
        weights = nn.softmax(wide).astype(scores.dtype)
        mixed = jnp.einsum('bhqk,bhkd->bqhd', weights, value)
        return nn.DenseGeneral(x.shape[-1], axis=(-2, -1), dtype=self.dtype, name='out')(mixed)
