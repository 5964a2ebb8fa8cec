"""NST, neuron selectivity transfer: a maximum mean discrepancy between the patterns of channels.

It sees neither how many channels there are, nor their order, nor the scale of an example.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import numerics
from kdjax.losses._activations import as_positions, exact_einsum
from kdjax.meshes import on_any_mesh


@on_any_mesh
def nst(student: ArrayLike, teacher: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None) -> jax.Array:
    """NST: maximum mean discrepancy of two sets of channels, each a map of where it is active, per example.

    mean K(t, t) + mean K(s, s) - 2 mean K(s, t) over pairs of channels, with K(a, b) = (a · b)² of maps that are L2-normalised
    over positions. It is the squared distance of the two means of a aᵀ. Where sizes differ, the larger is average-pooled to
    the smaller. Published code stops the gradient of K(t, t) or leaves it out; here it is there, as for all losses.

    Args:
      student: activations [batch, height, width, channels], floating point of any precision; arithmetic is in float32.
      teacher: activations of the same rank and batch size.
      axis: the channel axis.
      where: boolean, broadcastable to the smaller activation with a channel axis of length 1: positions to keep.

    Returns:
      float32 [batch], without unit, at most 2, and not negative but for rounding; 0 where no position is kept.

    Raises:
      ValueError: shapes or dtypes do not fit.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([1., 0.]).reshape(1, 1, 2, 1), jnp.array([0., 3.]).reshape(1, 1, 2, 1)
    >>> print(nst(student, teacher))
    [2.]

    Reference:
      Huang, Wang. Like What You Like: Knowledge Distill via Neuron Selectivity Transfer. 2017. https://arxiv.org/abs/1707.01219
    """
    maps = [numerics.l2_normalize(x, axis=1) for x in as_positions('nst', student, teacher, axis, where)]
    positions, channels = maps[0].shape[1], [x.shape[2] for x in maps]
    if positions <= sum(channels):
        of_student, of_teacher = (exact_einsum('bpc,bqc->bpq', x, x) / count for x, count in zip(maps, channels, strict=True))
        return jnp.sum(jnp.square(of_student - of_teacher), axis=(1, 2))
    # The same from products of channels, of which there are fewer.
    both = jnp.concatenate(maps, axis=2)
    weights = jnp.concatenate([jnp.full(channels[0], 1 / channels[0]), jnp.full(channels[1], -1 / channels[1])])
    kernel = jnp.square(exact_einsum('bpc,bpd->bcd', both, both))
    return exact_einsum('c,bcd,d->b', weights, kernel, weights)
