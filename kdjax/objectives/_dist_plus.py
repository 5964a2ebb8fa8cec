"""DIST+, with the linear map that it trains where channels differ."""

from typing import Any

import flax.linen as nn
import jax

from kdjax import losses
from kdjax.batches import Batch
from kdjax.networks import Outputs
from kdjax.objectives._arguments import feature_pair
from kdjax.objectives._connectors import apply_connector, init_connector
from kdjax.objectives._logits import both_logits
from kdjax.objectives._objective import Objective, Weight, with_parameters
from kdjax.objectives._positions import logit_counts, pool_to_one_size


def dist_plus(
    student: str,
    teacher: str,
    *,
    beta: Weight = 1.0,
    gamma: Weight = 1.0,
    feature: Weight = 1.0,
    temperature: Weight = 1.0,
) -> Objective:
    """DIST+, linear relations of predictions and of a layer: `losses.dist_plus`.

    A scalar: of the batch's weights it matters only which are 0. Where the layers differ in channels, a linear map leads from
    the student's to the teacher's; the larger of two images is average-pooled to the smaller.

    Args:
      student: path of the student's layer, such as `'pooled'`.
      teacher: path of the teacher's layer.
      beta: weight of the correlation within an example; a number or a schedule.
      gamma: weight of the correlation of examples; a number or a schedule.
      feature: weight of the layer's relations; a number or a schedule.
      temperature: of the predictions; a number or a schedule.
    """
    features = feature_pair('dist_plus', student, teacher)

    def widen(source: Any, target: Any) -> nn.Dense | None:
        channels = target.shape[-1]
        return None if source.shape[-1] == channels else nn.Dense(channels)

    def init(key: jax.Array, student: Outputs, teacher: Outputs, batch: Batch) -> Any:
        del batch
        source, target = features(student, teacher)
        module = widen(source, target)
        return {} if module is None else init_connector(module, key, source)

    def loss(params: Any, student: Outputs, teacher: Outputs, batch: Batch, **hyperparameters: Any) -> jax.Array:
        logits = both_logits('dist_plus', student, teacher, batch)
        source, target = pool_to_one_size(batch, *features(student, teacher))
        module = widen(source, target)
        widened = source if module is None else apply_connector(module, params, source)
        return losses.dist_plus(*logits, widened, target, where=logit_counts(batch, logits[0].shape), **hyperparameters)

    return with_parameters('dist_plus', init, loss, beta=beta, gamma=gamma, feature=feature, temperature=temperature)
