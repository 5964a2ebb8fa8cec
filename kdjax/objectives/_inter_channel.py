"""ICKD, inter-channel correlation, with the convolution that it trains."""

from typing import Any, Literal

import jax

from kdjax import losses
from kdjax.batches import Batch
from kdjax.networks import Outputs
from kdjax.objectives._arguments import feature_pair
from kdjax.objectives._connectors import Convolutions, apply_connector, init_connector
from kdjax.objectives._objective import Objective, with_parameters
from kdjax.objectives._positions import feature_counts, pool_to_one_size


def inter_channel(student: str, teacher: str, *, variant: Literal['paper', 'normalized'] = 'paper') -> Objective:
    """ICKD: `losses.inter_channel` between a layer of the teacher and a trained map of one of the student.

    The map is a 1x1 convolution without bias to the teacher's channels and batch norm, without an activation, as in the paper;
    some codes leave it out where the channels are as many. The larger of two images is average-pooled to the smaller.
    `kdjax.recipes.inter_channel` has the published weight, which belongs to `variant='normalized'`.

    Args:
      student: path of the student's layer.
      teacher: path of the teacher's layer.
      variant: as in the loss.
    """
    features = feature_pair('inter_channel', student, teacher)

    def model(target: Any) -> Convolutions:
        return Convolutions((target.shape[-1],), 1, _identity, use_bias=False, normalize=True, activate_last=True)

    def init(key: jax.Array, student: Outputs, teacher: Outputs, batch: Batch) -> Any:
        del batch
        source, target = features(student, teacher)
        return init_connector(model(target), key, source)

    def loss(params: Any, student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        source, target = pool_to_one_size(batch, *features(student, teacher))
        where = feature_counts(batch, target.shape)
        mapped = apply_connector(model(target), params, source, mask=where)
        return losses.inter_channel(mapped, target, where=where, variant=variant)

    return with_parameters('inter_channel', init, loss)


def _identity(x: jax.Array) -> jax.Array:
    return x
