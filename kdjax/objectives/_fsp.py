"""FSP, the flow of a solution procedure, with the convolutions that it trains where channels differ."""

from typing import Any

import jax
import jax.numpy as jnp

from kdjax import losses
from kdjax.batches import Batch
from kdjax.networks import Outputs
from kdjax.objectives._arguments import feature_pairs
from kdjax.objectives._connectors import Regressor, apply_connector, init_connector
from kdjax.objectives._objective import Objective, with_parameters
from kdjax.objectives._positions import counted_features, feature_counts


def fsp(student: tuple[str, str], teacher: tuple[str, str]) -> Objective:
    """FSP, the flow between two layers: `losses.fsp`.

    `kdjax.recipes.fsp` has the published weight.

    Where student and teacher differ in channels, a 1x1 convolution is trained on each of the student's two layers.

    Args:
      student: paths of the layer where the flow begins and of that where it ends.
      teacher: the same of the teacher.

    Raises:
      ValueError: not two paths are named.
    """
    features = feature_pairs('fsp', student, teacher)
    if len(student) != 2:
        raise ValueError(f'fsp: a flow has two layers, where it begins and where it ends; got {student}')

    def pairs(student: Outputs, teacher: Outputs) -> dict[str, tuple[Any, Any]]:
        return dict(zip(('begin', 'end'), zip(*features(student, teacher), strict=True), strict=True))

    def widen(source: Any, target: Any) -> Regressor:
        return Regressor((*source.shape[:-1], target.shape[-1]))

    def init(key: jax.Array, student: Outputs, teacher: Outputs, batch: Batch) -> Any:
        del batch
        return {
            name: init_connector(widen(source, target), jax.random.fold_in(key, i), source)
            for i, (name, (source, target)) in enumerate(pairs(student, teacher).items())
            if source.shape[-1] != target.shape[-1]
        }

    def loss(params: Any, student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        layers = {name: counted_features(batch, *pair) for name, pair in pairs(student, teacher).items()}
        sources = [
            apply_connector(widen(source, target), params[name], source) if name in params else source
            for name, (source, target) in layers.items()
        ]
        return losses.fsp(*_as_counted(batch, *sources), *_as_counted(batch, *(target for _, target in layers.values())))

    return with_parameters('fsp', init, loss)


def _as_counted(batch: Batch, begin: jax.Array, end: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both ends of a flow such that the mean of their products over all positions is that over those that count.

    The two networks' flows may be of two sizes, for which a loss would need two masks.
    """
    smaller = tuple(min(sizes) for sizes in zip(begin.shape, end.shape, strict=False))
    where = feature_counts(batch, smaller)
    if where is None:
        return begin, end
    share = jnp.mean(jnp.broadcast_to(where, (*smaller[:3], 1)), axis=(1, 2), keepdims=True, dtype=jnp.float32)
    # A connector's bias stands where nothing counts.
    begin, end = counted_features(batch, begin, end)
    return begin.astype(jnp.float32) / jnp.where(share > 0, share, 1.0), end
