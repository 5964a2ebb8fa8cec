"""Objectives on layers before their ReLU: AB, activation boundaries, and OFD, the overhaul of feature distillation."""

from typing import Any

import jax
import jax.numpy as jnp

from kdjax import losses
from kdjax.batches import Batch
from kdjax.networks import Outputs
from kdjax.objectives._arguments import feature_pair, require_feature
from kdjax.objectives._connectors import Regressor, apply_connector, init_connector
from kdjax.objectives._lifting import connected
from kdjax.objectives._objective import Objective, Weight, with_parameters
from kdjax.objectives._positions import counted_features, feature_counts, pool_positions


def overhaul(student: str, teacher: str, *, norm: str | None = None) -> Objective:
    """OFD: `losses.overhaul` from a trained 1x1 convolution with batch norm on the student's layer.

    The layers are pre-activations, of `kdjax.models` those tapped as `stage3/preact`. The margin of each channel is what the
    teacher's batch norm says of its negative values, `losses.overhaul_margin`; in residual networks that is the last norm of
    the branch, though the shortcut is added after it. A teacher's image that is larger than the student's is average-pooled to
    its size and then cut off at the margin, as in the code behind published tables; other code cuts it off first. A smaller
    teacher is reached by a strided convolution. `kdjax.recipes.overhaul` has the published weight.

    Args:
      student: path of the student's layer, before its ReLU.
      teacher: path of the teacher's layer, before its ReLU.
      norm: path of that batch norm's parameters, if it is not `teacher`: `networks.tap_parameters` makes its `scale` and `bias`
        features of the teacher.
    """
    features = feature_pair('overhaul', student, teacher)
    norm = teacher if norm is None else norm

    def model(target: Any) -> Regressor:
        return Regressor(tuple(target.shape), normalize=True)

    def size(source: Any, target: Any) -> tuple[int, int] | None:
        """That of the target, no larger than the source, if both are images."""
        if source.ndim != 4 or target.ndim != 4:
            return None
        return min(source.shape[1], target.shape[1]), min(source.shape[2], target.shape[2])

    def init(key: jax.Array, student: Outputs, teacher: Outputs, batch: Batch) -> Any:
        del batch
        source, target = features(student, teacher)
        smaller = size(source, target)
        shape = target.shape if smaller is None else (target.shape[0], *smaller, target.shape[-1])
        return init_connector(model(jax.ShapeDtypeStruct(shape, jnp.float32)), key, source)

    def loss(params: Any, student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        source, target = features(student, teacher)
        smaller = size(source, target)
        target = target if smaller is None else pool_positions(batch, target, smaller)
        source, target = counted_features(batch, source, target)
        scale, bias = (require_feature('overhaul', 'teacher', teacher, f'{norm}/{name}') for name in ('scale', 'bias'))
        where = feature_counts(batch, target.shape)
        regressed = apply_connector(model(target), params, source, mask=where)
        return losses.overhaul(regressed, target, losses.overhaul_margin(bias, jnp.abs(scale)), where=where)

    return with_parameters('overhaul', init, loss)


def activation_boundary(student: str, teacher: str, *, margin: Weight = 1.0) -> Objective:
    """AB: `losses.activation_boundary` from a trained 1x1 convolution with batch norm on the student's layer.

    The layers are pre-activations, of `kdjax.models` those tapped as `stage3/preact`. The paper trains with this alone first,
    and then with the task: `in_stages([activation_boundary(...), hard_labels()], [steps])`.

    Args:
      student: path of the student's layer.
      teacher: path of the teacher's layer.
      margin: as in the loss; a number or a schedule.
    """
    return connected(
        'activation_boundary',
        losses.activation_boundary,
        student,
        teacher,
        lambda source, target: Regressor(target.shape, normalize=True),
        margin=margin,
    )
