"""ICKD, inter-channel correlation: which channels of a layer are active together."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import numerics
from kdjax.losses._activations import as_positions, exact_einsum
from kdjax.meshes import on_any_mesh


@on_any_mesh
def inter_channel(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    variant: Literal['paper', 'normalized'] = 'paper',
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """ICKD, inter-channel correlation: squared difference of the products of all pairs of channels, per example.

    G = Σ_i f_i f_iᵀ, the channels' inner products [channels, channels] over the positions i. `variant='paper'`:
    Σ (G_t - G_s)² / C². `variant='normalized'`, the authors' code and the published tables: each row of G divided by its L2
    norm first, and Σ (G_t - G_s)² / C; the paper's formula has no norm, and grows with the number of positions and the fourth
    power of the activation. The weight of the tables, 2.5, is that of `'normalized'` on the last stage. Where sizes differ,
    which the products would allow, the larger activation is average-pooled to the smaller.

    Args:
      student: activations [batch, height, width, channels], floating point of any precision; arithmetic is in float32.
      teacher: activations of the same rank, batch size and channels.
      variant: `'paper'` or `'normalized'`.
      axis: the channel axis.
      where: boolean, broadcastable to the smaller activation with a channel axis of length 1: positions to keep.

    Returns:
      float32 [batch]; for `'paper'` in the fourth power of the activation's unit, for `'normalized'` without unit and at most
      4. A channel that is zero everywhere has products of zero. 0 where no position is kept.

    Raises:
      ValueError: shapes or dtypes do not fit, channels differ, or the variant is unknown.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([1., 1.]).reshape(1, 1, 1, 2), jnp.array([2., 0.]).reshape(1, 1, 1, 2)
    >>> print(inter_channel(student, teacher), inter_channel(student, teacher, variant='normalized'))
    [3.] [0.793]

    Reference:
      Liu, Huang, Lin, Xie, Wang, Chang, Liang. Exploring Inter-Channel Correlation for Diversity-preserved Knowledge
      Distillation. 2021. https://arxiv.org/abs/2202.03680
    """
    if variant not in ('paper', 'normalized'):
        raise ValueError(f"inter_channel: variant must be 'paper' or 'normalized', got {variant!r}")
    shapes = jnp.shape(student), jnp.shape(teacher)
    maps = as_positions('inter_channel', student, teacher, axis, where)
    channels = maps[0].shape[2]
    if maps[1].shape[2] != channels:
        raise ValueError(
            f'inter_channel: student {shapes[0]} and teacher {shapes[1]} must have the same channels; '
            'objectives.inter_channel trains a convolution to the same number'
        )

    def products(x: jax.Array) -> jax.Array:
        if variant == 'paper':
            return exact_einsum('bpc,bpd->bcd', x, x)
        x = numerics.unit_scale(x, axis=(1, 2))
        return numerics.l2_normalize(exact_einsum('bpc,bpd->bcd', x, x), axis=2)

    squares = jnp.sum(jnp.square(products(maps[0]) - products(maps[1])), axis=(1, 2))
    return squares / (channels**2 if variant == 'paper' else channels)
