"""VID, variational information distillation, with the regressor and the variances that it trains."""

from typing import Any

import jax
import jax.numpy as jnp

from kdjax import losses
from kdjax.batches import Batch
from kdjax.networks import Outputs
from kdjax.objectives._arguments import feature_pair
from kdjax.objectives._connectors import Convolutions, apply_connector, init_connector
from kdjax.objectives._objective import Objective, with_parameters
from kdjax.objectives._positions import feature_counts, pool_to_one_size

INITIAL_VARIANCE = 5.0
SMALLEST_VARIANCE = 1e-5


def vid(student: str, teacher: str) -> Objective:
    """VID: the student's layer predicts the teacher's, with a variance per channel that is trained.

    The mean comes from three 1x1 convolutions without bias, the variance is softplus(ρ) + 1e-5, begins at 5 and is trained; the
    loss is `losses.vid`. The larger of two images is average-pooled to the smaller; layers may be of tokens [batch, length,
    width] too. `kdjax.recipes.vid` has the published weight.

    Args:
      student: path of the student's layer.
      teacher: path of the teacher's layer.
    """
    features = feature_pair('vid', student, teacher)

    def model(target: Any) -> Convolutions:
        return Convolutions((target.shape[-1],) * 3, 1, use_bias=False)

    def init(key: jax.Array, student: Outputs, teacher: Outputs, batch: Batch) -> Any:
        del batch
        source, target = features(student, teacher)
        # The inverse of softplus.
        rho = jnp.full(target.shape[-1], jnp.log(jnp.expm1(INITIAL_VARIANCE - SMALLEST_VARIANCE)), jnp.float32)
        return {'mean': init_connector(model(target), key, source), 'rho': rho}

    def loss(params: Any, student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        source, target = pool_to_one_size(batch, *features(student, teacher))
        variance = jax.nn.softplus(params['rho']) + SMALLEST_VARIANCE
        predicted = apply_connector(model(target), params['mean'], source)
        return losses.vid(predicted, variance, target, where=feature_counts(batch, target.shape))

    return with_parameters('vid', init, loss)
