"""CAT-KD, class attention transfer: where each network looks for each class, by its own head."""

from typing import Any

import jax
import jax.numpy as jnp

from kdjax import losses
from kdjax.batches import Batch
from kdjax.networks import Outputs
from kdjax.numerics import l2_normalize
from kdjax.objectives._arguments import feature_pair
from kdjax.objectives._objective import Objective, from_function
from kdjax.objectives._positions import feature_counts, pool_positions, zero_outside
from kdjax.pooling import average_pool


def cat_kd(
    student: str,
    teacher: str,
    student_kernel: str,
    teacher_kernel: str,
    *,
    resolution: int = 2,
    normalize: bool = False,
) -> Objective:
    """CAT-KD, class attention transfer: squared difference of the class activation maps, pooled to a few positions.

    A class activation map is the last map before the pooling, times the class's column of the head's kernel; its mean over
    positions is the logit without its bias. The maps of both networks are average-pooled to `resolution` x `resolution`, and
    the value is their mean squared difference over positions and classes. Nothing is trained but the student, its head's kernel
    too; the two layers may have any channels and sizes.

    With `normalize`, each class's map is divided by its L2 norm over the positions, so that the magnitude of logits does not
    matter. The authors' configurations do that for CAT, the attention alone with weight 50, and not for CAT-KD, the attention
    beside labels, whose weight depends on the pair: 15 for resnet32x4 to resnet8x4, 0.7 for resnet56 to resnet20. A public copy
    normalizes over the classes instead. The authors rebuild their networks so that the pooling comes last; for a linear head
    behind an average pooling, as here, it is the same. Windows are those of padded images, so images of one size are best
    padded alike in all batches.

    Args:
      student: path of the student's layer [batch, height, width, channels] that enters its average pooling.
      teacher: path of the teacher's.
      student_kernel: path of the student's head's kernel [channels, classes]; `networks.tap_parameters` makes it a feature.
      teacher_kernel: path of the teacher's.
      resolution: positions of the pooled maps along each axis.
      normalize: whether each map is divided by its norm.

    Raises:
      ValueError: `resolution` is less than 1, or from `init`: layers are no images, or a kernel does not fit.

    Reference:
      Guo, Yan, Li, Lin. Class Attention Transfer Based Knowledge Distillation. 2023. https://arxiv.org/abs/2304.12777
    """
    if resolution < 1:
        raise ValueError(f'cat_kd: resolution must be at least 1, got {resolution}')
    maps = feature_pair('cat_kd', student, teacher)
    kernels = feature_pair('cat_kd', student_kernel, teacher_kernel)
    size = (resolution, resolution)

    def attention(batch: Batch, x: jax.Array, kernel: jax.Array, where: jax.Array | None) -> jax.Array:
        # The product is linear in the positions, so that the fewer may be taken.
        pooled = pool_positions(batch, x, size)
        found = jnp.einsum('bhwc,ck->bhwk', pooled, kernel.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
        found = zero_outside(where, found)
        return l2_normalize(found, axis=(1, 2)) if normalize else found

    def loss(student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        layers, heads = maps(student, teacher), kernels(student, teacher)
        _check(layers, heads)
        where = None
        for x in layers:
            seen = feature_counts(batch, x.shape)
            if seen is not None:
                share = average_pool(jnp.broadcast_to(seen, (*x.shape[:3], 1)).astype(jnp.float32), size)
                where = (share > 0) if where is None else where & (share > 0)
        found, wanted = (attention(batch, x, kernel, where) for x, kernel in zip(layers, heads, strict=True))
        return losses.hint(found, wanted, where=where)

    return from_function('cat_kd', loss)


def _check(layers: tuple[Any, Any], kernels: tuple[Any, Any]) -> None:
    for x, kernel in zip(layers, kernels, strict=True):
        if len(x.shape) != 4:
            raise ValueError(f'cat_kd: layers must be images [batch, height, width, channels], got {x.shape}')
        if len(kernel.shape) != 2 or kernel.shape[0] != x.shape[-1]:
            raise ValueError(
                f'cat_kd: a kernel must be [channels, classes] with the channels of its layer {x.shape}, got {kernel.shape}'
            )
    if kernels[0].shape[1] != kernels[1].shape[1]:
        raise ValueError(
            f'cat_kd: the kernels must be of the same classes, got {kernels[0].shape} and {kernels[1].shape} (classes last)'
        )
