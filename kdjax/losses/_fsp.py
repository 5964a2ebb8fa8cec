"""FSP, the flow of a solution procedure: how the channels of two layers go together.

It relates channels to channels and does not see where things are.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import numerics
from kdjax.losses._activations import exact_einsum, flatten_positions, masked_images, position_mask, smaller_size
from kdjax.meshes import on_any_mesh


@on_any_mesh
def fsp(
    student_in: ArrayLike,
    student_out: ArrayLike,
    teacher_in: ArrayLike,
    teacher_out: ArrayLike,
    *,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """FSP: mean squared difference of how the channels before and after a part of each network go together, per example.

    mean over [channels_in, channels_out] of (G_s - G_t)², with G = mean over positions of the outer products of the
    activations `in` and `out`; the larger of the two is average-pooled to the smaller. There is one term for
    each pair of neighbouring layers.

    Args:
      student_in: activations [batch, height, width, channels_in], floating point of any precision; arithmetic is in float32.
      student_out: activations [batch, height, width, channels_out].
      teacher_in: activations with as many channels as `student_in`, of any size.
      teacher_out: activations with as many channels as `student_out`, of any size.
      axis: the channel axis.
      where: boolean, broadcastable to the smaller of `in` and `out` of each network, with a channel axis of length 1: positions
        to keep.

    Returns:
      float32 [batch], in the fourth power of the activation's unit; 0 where no position is kept.

    Raises:
      ValueError: shapes or dtypes do not fit.

    >>> import jax.numpy as jnp
    >>> one, two = jnp.ones((1, 2, 2, 1)), 2 * jnp.ones((1, 4, 4, 1))
    >>> print(fsp(one, two, one, one))
    [1.]

    Reference:
      Yim, Joo, Bae, Kim. A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer Learning.
      2017. https://openaccess.thecvf.com/content_cvpr_2017/html/Yim_A_Gift_From_CVPR_2017_paper.html
    """
    student_in, teacher_in = numerics.pair('fsp', student_in, teacher_in, axis, same_shape=False)
    student_out, teacher_out = numerics.pair('fsp', student_out, teacher_out, axis, same_shape=False)
    for student, teacher in ((student_in, teacher_in), (student_out, teacher_out)):
        if student.ndim != 4 or student.shape[::3] != teacher.shape[::3]:
            raise ValueError(
                'fsp: student and teacher must be [batch, height, width, channels] with the same batch and the same channels '
                f'(or go through the connectors of kdjax.objectives), got {student.shape} and {teacher.shape} (channels last)'
            )
    if student_in.shape[0] != student_out.shape[0]:
        raise ValueError(
            f'fsp: {student_in.shape} before and {student_out.shape} after must have the same batch (channels last)'
        )

    def flow(before: jax.Array, after: jax.Array) -> jax.Array:
        size = smaller_size(before, after)
        keep = position_mask('fsp', where, (before.shape[0], *size), axis)
        before, after = (flatten_positions(masked_images(x, keep), size, keep) for x in (before, after))
        kept = jnp.float32(size[0] * size[1]) if keep is None else jnp.sum(keep, axis=(1, 2), dtype=jnp.float32)[:, None, None]
        return exact_einsum('bpi,bpo->bio', before, after) / jnp.maximum(kept, 1.0)

    difference = flow(student_in, student_out) - flow(teacher_in, teacher_out)
    return jnp.mean(jnp.square(difference), axis=(1, 2))
