"""SRD, the simple recipe, with the projector that it trains."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdjax import losses
from kdjax.batches import Batch, counted_examples
from kdjax.networks import Outputs
from kdjax.objectives._arguments import feature_pair
from kdjax.objectives._connectors import apply_connector, init_connector
from kdjax.objectives._objective import Objective, Weight, with_parameters
from kdjax.objectives._positions import positions_average


def srd(student: str, teacher: str, *, exponent: Weight = 4.0) -> Objective:
    """SRD: `losses.srd` of two embeddings, each standardized over the batch, the student's behind a trained projector.

    The projector is linear; a batch norm without scale and shift, ε = 1e-4, follows on both sides. Images and tokens are
    averaged over positions first. The projector has no bias, which the norm would take away. `kdjax.recipes.srd` has the
    published weight.

    Args:
      student: path of the student's layer, the one before the logits in the paper.
      teacher: path of the teacher's.
      exponent: as in the loss; a number or a schedule.
    """
    features = feature_pair('srd', student, teacher)

    def init(key: jax.Array, student: Outputs, teacher: Outputs, batch: Batch) -> Any:
        del batch
        source, target = features(student, teacher)
        pooled = jax.ShapeDtypeStruct((source.shape[0], source.shape[-1]), jnp.float32)
        return init_connector(_Projector(target.shape[-1]), key, pooled)

    def loss(params: Any, student: Outputs, teacher: Outputs, batch: Batch, **hyperparameters: Any) -> jax.Array:
        source, target = (positions_average(batch, x) for x in features(student, teacher))
        where = counted_examples(batch)
        where = None if where is None else where[:, None]
        projected = apply_connector(_Projector(target.shape[-1]), params, source, mask=where)
        wanted = apply_connector(_Projector(None), {}, target, mask=where)
        return losses.srd(projected, wanted, where=where, **hyperparameters)

    return with_parameters('srd', init, loss, exponent=exponent)


class _Projector(nn.Module):
    """A linear map, if any, and batch norm without parameters.

    Attributes:
      width: of the linear map, or None.
    """

    width: int | None

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Maps [batch, channels] to [batch, width]."""
        if self.width is not None:
            x = nn.Dense(self.width, use_bias=False)(x)
        return nn.BatchNorm(use_running_average=False, epsilon=1e-4, use_scale=False, use_bias=False)(x, mask=mask)
