"""Losses on the inside of transformers: hidden states, attention and the relations between values, token by token.

All return one value per example. `where` [batch, tokens] is true where a token is real: value and gradients are those of the
sequence without its padding, which neither attends nor is attended to and may hold anything, NaN too. An example that is all
padding costs 0, one with NaN or an infinity among its real tokens costs NaN. Logits [batch, tokens, classes] need nothing of
their own: the losses of `kdjax.losses._logits` return [batch, tokens] for them.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kdjax import numerics
from kdjax.meshes import on_any_mesh


@on_any_mesh
def hidden_cosine(student: ArrayLike, teacher: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None) -> jax.Array:
    """DistilBERT, and PKD: cosine distance between the hidden states of the same tokens, per example.

    mean over tokens of 1 - cos(h_s, h_t), computed as ½ ||h_s / ||h_s|| - h_t / ||h_t||||², which keeps its digits where both
    agree. DistilBERT takes the cosine, over the tokens of all the batch at once; PKD takes the squared distance of the
    normalised states, twice this, of the first token alone (pass `[:, :1]`) in chosen layers.

    Args:
      student: hidden states [batch, tokens, width], floating point of any precision; arithmetic is in float32.
      teacher: hidden states of the same shape.
      axis: the axis of the width.
      where: boolean [batch, tokens]: tokens to keep.

    Returns:
      float32 [batch], without unit, between 0 and 2; 0 where no token is kept. A state of zeros is at distance ½ from others,
      at 0 from another state of zeros, and has a gradient of zeros.

    Raises:
      ValueError: shapes or dtypes do not fit.

    >>> import jax.numpy as jnp
    >>> print(hidden_cosine(jnp.array([[[1., 0.], [2., 0.]]]), jnp.array([[[0., 3.], [1., 0.]]])))
    [0.5]

    Reference:
      Sanh, Debut, Chaumond, Wolf. DistilBERT, a distilled version of BERT: smaller, faster, cheaper and lighter. 2019.
      https://arxiv.org/abs/1910.01108
      Sun, Cheng, Gan, Liu. Patient Knowledge Distillation for BERT Model Compression. 2019. https://arxiv.org/abs/1908.09355
    """
    student, teacher = numerics.pair('hidden_cosine', student, teacher, axis)
    if student.ndim != 3:
        raise ValueError(f'hidden_cosine: hidden states must be [batch, tokens, width], got {student.shape}')
    where = numerics.mask('hidden_cosine', True if where is None else where, student.shape[:2], -1)
    student, teacher = (jnp.where(where[:, :, None], numerics.finite_or_nan(x), 0.0) for x in (student, teacher))
    difference = numerics.l2_normalize(student, axis=-1) - numerics.l2_normalize(teacher, axis=-1)
    return numerics.masked_mean(0.5 * jnp.sum(jnp.square(difference), axis=-1), -1, where)


@on_any_mesh
def attention_maps(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    variant: Literal['mean_square', 'kl'] = 'mean_square',
    where: ArrayLike | None = None,
) -> jax.Array:
    """TinyBERT's and MiniLM's attention: difference of what each token attends to, head by head, per example.

    `variant='mean_square'`, TinyBERT's: the mean over heads, queries and keys of (A_s - A_t)². TinyBERT passes the scores
    Q Kᵀ / √d before the softmax, which it found better than the probabilities; either can be passed. `variant='kl'`,
    MiniLM's: the mean over heads and queries of KL(p_t || p_s), where p = softmax(A) over the keys: pass the scores.

    A score of -inf is no score, as under a causal mask: the mean square leaves out what either network has at -inf, and its
    probability is 0.

    Args:
      student: scores [batch, heads, tokens, tokens], queries before keys, floating point of any precision; arithmetic is in
        float32.
      teacher: scores of the same shape.
      variant: `'mean_square'` or `'kl'`.
      where: boolean [batch, tokens]: tokens to keep, as queries and as keys.

    Returns:
      float32 [batch], in squared units of the scores or in nats; 0 where no token is kept.

    Raises:
      ValueError: shapes or dtypes do not fit, or the variant is unknown.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.zeros([1, 1, 2, 2]), jnp.array([[[[0., 2.], [0., 0.]]]])
    >>> print(attention_maps(student, teacher), attention_maps(student, teacher, variant='kl'))
    [1.] [0.164]

    Reference:
      Jiao, Yin, Shang, Jiang, Chen, Li, Wang, Liu. TinyBERT: Distilling BERT for Natural Language Understanding. 2020.
      https://arxiv.org/abs/1909.10351
      Wang, Wei, Dong, Bao, Yang, Zhou. MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained
      Transformers. 2020. https://arxiv.org/abs/2002.10957
    """
    if variant not in ('mean_square', 'kl'):
        raise ValueError(f"attention_maps: variant must be 'mean_square' or 'kl', got {variant!r}")
    zero = numerics.log_zero(student, teacher)
    student, teacher = numerics.pair('attention_maps', student, teacher, -1)
    if student.ndim != 4 or student.shape[2] != student.shape[3]:
        raise ValueError(f'attention_maps: scores must be [batch, heads, tokens, tokens], got {student.shape}')
    where = _kept('attention_maps', where, student.shape)
    keep = where[:, None, :, None] & where[:, None, None, :]
    if variant == 'kl':
        return _divergence(jnp.where(keep, student, 0.0), jnp.where(keep, teacher, 0.0), where, zero)
    keep &= ~jnp.isneginf(student) & ~jnp.isneginf(teacher)
    difference = jnp.where(keep, student, 0.0) - jnp.where(keep, teacher, 0.0)
    return numerics.masked_mean(jnp.square(difference), (1, 2, 3), keep)


@on_any_mesh
def value_relations(student: ArrayLike, teacher: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
    """MiniLM's value relations: divergence of the relations between an attention layer's values, per example.

    mean over heads and tokens of KL(R_t || R_s), with R = softmax(V Vᵀ / √width) over the tokens. The widths of the heads may
    differ, their number may not. MiniLM adds this to `attention_maps(..., variant='kl')` of the last layer; MiniLMv2 takes
    it of queries, keys and values, all reshaped to the same number of heads.

    Args:
      student: values [batch, heads, tokens, width], floating point of any precision; arithmetic is in float32.
      teacher: values with the same batch, heads and tokens.
      where: boolean [batch, tokens]: tokens to keep.

    Returns:
      float32 [batch], in nats, never negative; 0 where no token is kept.

    Raises:
      ValueError: shapes or dtypes do not fit.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.zeros([1, 1, 2, 1]), jnp.eye(2)[None, None]
    >>> print(value_relations(student, teacher))
    [0.0588]

    Reference:
      Wang, Wei, Dong, Bao, Yang, Zhou. MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained
      Transformers. 2020. https://arxiv.org/abs/2002.10957
      Wang, Bao, Huang, Dong, Wei. MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing Pretrained
      Transformers. 2021. https://arxiv.org/abs/2012.15828
    """
    student, teacher = numerics.pair('value_relations', student, teacher, -1, same_shape=False)
    if student.ndim != 4 or student.shape[:3] != teacher.shape[:3]:
        raise ValueError(
            'value_relations: student and teacher must be [batch, heads, tokens, width] with the same batch, heads and '
            f'tokens, got {student.shape} and {teacher.shape}'
        )
    where = _kept('value_relations', where, student.shape)

    def relations(values: jax.Array) -> jax.Array:
        values = jnp.where(where[:, None, :, None], numerics.finite_or_nan(values), 0.0)
        products = jnp.einsum('bhqd,bhkd->bhqk', values, values, precision=jax.lax.Precision.HIGHEST)
        return products / np.float32(np.sqrt(values.shape[-1]))

    return _divergence(relations(student), relations(teacher), where)


def _kept(loss: str, where: ArrayLike | None, shape: tuple[int, ...]) -> jax.Array:
    """The mask [batch, tokens] for an array [batch, heads, tokens, ...]."""
    return numerics.mask(loss, True if where is None else where, (shape[0], shape[2]), -1)


def _divergence(student: jax.Array, teacher: jax.Array, where: jax.Array, zero: float = numerics.LOG_ZERO) -> jax.Array:
    """The mean over heads and kept queries of KL(t || s), from scores [batch, heads, queries, keys]."""
    keys = where[:, None, None, :]
    log_s, log_t = (numerics.log_softmax(scores, where=keys, zero=zero) for scores in (student, teacher))
    return numerics.masked_mean(numerics.divergence(log_t, log_s), (1, 2), where[:, None, :])
