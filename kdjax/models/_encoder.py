"""Encoders of text of BERT's family."""

from collections.abc import Mapping
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from kdjax.models._attention import Attention
from kdjax.models._narrowing import within


class Encoder(nn.Module):
    """BERT: tokens at learned positions, and blocks of attention to all of them and an MLP, with norms behind them.

    Blocks are named `block0`, `block1`, ... and give hidden states [batch, length, width]; `norm` is what enters the first.
    What each block's attention computes is tapped as `block0/attention/scores` [batch, heads, length, length], before mask and
    softmax, and `block0/attention/values` [batch, heads, length, width / heads]: TinyBERT's and MiniLM's recipes look for them.
    `pooled` [batch, width] is what the head takes: the first token's hidden state, past the pooler where there is one. Norms
    and softmax are in float32, all else is in `dtype`; parameters are in float32.

    Attributes:
      vocabulary: number of tokens.
      depth: number of blocks.
      width: of the hidden states.
      heads: of the attention; they divide the width.
      hidden: width of the MLP, reduce(gelu(expand(x))), between its layers.
      length: how many positions have been learned: the longest text.
      types: of tokens, as of those of a first and a second text; 0 for an encoder that does not tell them apart, as DistilBERT.
      epsilon: of the norms.
      pooler: what follows the dense layer between the first token and the head, `'tanh'` as in BERT or `'relu'` as in
        DistilBERT's classifier; None for no such layer.
      classes: of the head; None for an encoder without, whose outputs are the hidden states.
      narrowed: hidden widths of MLPs that have fewer, by the path of their first layer, such as `block0/expand`; see
        `kdjax.models.narrow`.
      dtype: of the arithmetic between norms.

    >>> import jax, jax.numpy as jnp
    >>> from kdjax import networks
    >>> encoder = Encoder(vocabulary=32, depth=2, width=16, heads=4, hidden=24, length=8, classes=3)
    >>> network = networks.from_linen(encoder, features=('block1', 'block1/attention/values'))
    >>> inputs = {'tokens': jnp.array([[5, 7, 2]]), 'mask': jnp.array([[True, True, False]])}
    >>> outputs, _ = network.apply(network.init(jax.random.key(0), inputs), inputs)
    >>> outputs.logits.shape, outputs.features['block1'].shape, outputs.features['block1/attention/values'].shape
    ((1, 3), (1, 3, 16), (1, 4, 3, 4))

    References:
      Devlin, Chang, Lee, Toutanova. BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding. 2019.
      https://arxiv.org/abs/1810.04805
      Sanh, Debut, Chaumond, Wolf. DistilBERT, a Distilled Version of BERT. 2019. https://arxiv.org/abs/1910.01108
    """

    vocabulary: int
    depth: int
    width: int
    heads: int
    hidden: int
    length: int = 512
    types: int = 2
    epsilon: float = 1e-12
    pooler: Literal['tanh', 'relu'] | None = 'tanh'
    classes: int | None = None
    narrowed: Mapping[str, int] = FrozenDict()
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array | None = None, types: jax.Array | None = None) -> jax.Array:
        """Maps tokens [batch, length] to logits [batch, classes], or to hidden states [batch, length, width] without a head.

        Args:
          tokens: integers below the vocabulary; others make their row NaN.
          mask: [batch, length], boolean or 0 and 1: which tokens are text; the others are seen by none. None for all.
          types: integers [batch, length] below `types`, by default 0; others make their row NaN.

        Raises:
          ValueError: shapes or dtypes do not fit, a text is too long, or heads do not divide the width.
        """
        _check(self, tokens, mask, types)
        tokens = jnp.asarray(tokens, jnp.int32)
        x = self._embedded(tokens, self.vocabulary, 'tokens')
        places = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        x = x + self._embedded(places, self.length, 'positions')
        if self.types:
            types = jnp.zeros_like(tokens) if types is None else jnp.asarray(types, jnp.int32)
            x = x + self._embedded(types, self.types, 'types')
        x = normalized(x, self.epsilon, self.dtype, 'norm')
        mask = None if mask is None else jnp.asarray(mask, jnp.bool_)
        for i in range(self.depth):
            name = f'block{i}'
            block = _Block(self.heads, self.hidden, self.epsilon, self.dtype, within(self.narrowed, name), name=name)
            x = block(x, mask)
        first = x[:, 0]
        if self.pooler is not None:
            activation = {'tanh': jnp.tanh, 'relu': nn.relu}[self.pooler]
            first = activation(nn.Dense(self.width, dtype=self.dtype, name='pooler')(first))
        self.sow('intermediates', 'pooled', first)
        return x if self.classes is None else nn.Dense(self.classes, dtype=self.dtype, name='head')(first)

    def _embedded(self, numbers: jax.Array, count: int, name: str) -> jax.Array:
        """Rows of a table, NaN where there is none: what is traced can be no error, and must not become plausible."""
        known = (numbers >= 0) & (numbers < count)
        rows = nn.Embed(count, self.width, dtype=self.dtype, name=name)(jnp.where(known, numbers, 0))
        return jnp.where(known[..., None], rows, jnp.nan)


def normalized(x: jax.Array, epsilon: float, dtype: jnp.dtype, name: str) -> jax.Array:
    """A layer norm, in float32 up to its result, as a submodule of the module that calls it."""
    with jax.numpy_dtype_promotion('standard'):
        # The difference from the mean, squared: a mean of squares less a squared mean loses its digits.
        return nn.LayerNorm(epsilon, dtype=dtype, use_fast_variance=False, name=name)(x.astype(jnp.float32))


class _Block(nn.Module):
    """Attention and an MLP, each added to what enters it, with a norm behind."""

    heads: int
    hidden: int
    epsilon: float
    dtype: jnp.dtype
    narrowed: Mapping[str, int]

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        attended = Attention(self.heads, self.dtype, name='attention')(x, mask)
        x = normalized(x + attended, self.epsilon, self.dtype, 'attention_norm')
        hidden = self.narrowed.get('expand', self.hidden)
        y = nn.gelu(nn.Dense(hidden, dtype=self.dtype, name='expand')(x), approximate=False)
        y = nn.Dense(x.shape[-1], dtype=self.dtype, name='reduce')(y)
        return normalized(x + y, self.epsilon, self.dtype, 'mlp_norm')


def _check(encoder: Encoder, tokens: jax.Array, mask: jax.Array | None, types: jax.Array | None) -> None:
    if encoder.heads < 1 or encoder.width % encoder.heads:
        raise ValueError(f'Encoder: {encoder.heads} heads must divide the width {encoder.width}')
    if encoder.pooler not in ('tanh', 'relu', None):
        raise ValueError(f"Encoder: pooler must be 'tanh', 'relu' or None, got {encoder.pooler!r}")
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f'Encoder: tokens must be integers [batch, length], got {tokens.dtype} {tokens.shape}')
    if not 0 < tokens.shape[1] <= encoder.length:
        raise ValueError(f'Encoder: texts must have 1 to {encoder.length} tokens, got {tokens.shape[1]}')
    if types is not None and not encoder.types:
        raise ValueError('Encoder: this one does not tell types apart, and got types')
    for name, x in (('mask', mask), ('types', types)):
        integers = x is None or jnp.issubdtype(x.dtype, jnp.integer) or (name == 'mask' and x.dtype == jnp.bool_)
        if x is not None and (x.shape != tokens.shape or not integers):
            raise ValueError(
                f'Encoder: {name} must be integers of the shape of the tokens, {tokens.shape}, got {x.dtype} {x.shape}'
            )
