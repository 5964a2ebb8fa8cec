"""PKD, distillation by Pearson correlation, with the convolution that it trains where channels differ."""

from typing import Any

import flax.linen as nn
import jax

from kdjax import losses
from kdjax.batches import Batch
from kdjax.networks import Outputs
from kdjax.objectives._arguments import feature_pair
from kdjax.objectives._connectors import apply_connector, init_connector
from kdjax.objectives._objective import Objective, with_parameters
from kdjax.objectives._positions import feature_counts, pool_to_one_size


def pearson_features(student: str, teacher: str) -> Objective:
    """PKD: `losses.pearson_features` between a layer of each network.

    Nothing is trained where the layers have the same number of channels, as those of two feature pyramids have; elsewhere a
    linear map of each position, a 1x1 convolution, leads from the student's to the teacher's. The larger of two images is
    average-pooled to the smaller, where published code enlarges the student's bilinearly. Means and deviations are those of
    the whole batch. `kdjax.recipes.pearson_features` has the published weight.

    Args:
      student: path of the student's layer.
      teacher: path of the teacher's layer.
    """
    features = feature_pair('pearson_features', student, teacher)

    def widen(source: Any, target: Any) -> nn.Dense | None:
        # A bias would be taken away with the mean.
        channels = target.shape[-1]
        return None if source.shape[-1] == channels else nn.Dense(channels, use_bias=False)

    def init(key: jax.Array, student: Outputs, teacher: Outputs, batch: Batch) -> Any:
        del batch
        source, target = features(student, teacher)
        module = widen(source, target)
        return {} if module is None else init_connector(module, key, source)

    def loss(params: Any, student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        source, target = pool_to_one_size(batch, *features(student, teacher))
        module = widen(source, target)
        widened = source if module is None else apply_connector(module, params, source)
        return losses.pearson_features(widened, target, where=feature_counts(batch, target.shape))

    return with_parameters('pearson_features', init, loss)
