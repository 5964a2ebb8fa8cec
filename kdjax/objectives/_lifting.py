"""How a loss of two features becomes an objective, as it is or behind a trained connector."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from kdjax.batches import Batch
from kdjax.networks import Outputs
from kdjax.objectives._arguments import feature_pair
from kdjax.objectives._connectors import Regressor, apply_connector, init_connector
from kdjax.objectives._objective import Objective, from_function, with_parameters
from kdjax.objectives._positions import counted_features, feature_counts


def on_features(loss: Callable[..., jax.Array], student: str, teacher: str, **hyperparameters: Any) -> Objective:
    """`loss(student feature, teacher feature, where=..., **hyperparameters)` of images, at the size of the smaller."""
    features = feature_pair(loss.__name__, student, teacher)

    def function(student: Outputs, teacher: Outputs, batch: Batch, **resolved: Any) -> jax.Array:
        pair = counted_features(batch, *features(student, teacher))
        smaller = tuple(min(sizes) for sizes in zip(*(x.shape for x in pair), strict=False))
        return loss(*pair, where=feature_counts(batch, smaller), **resolved)

    return from_function(loss.__name__, function, **hyperparameters)


def connected(
    name: str,
    loss: Callable[..., jax.Array],
    student: str,
    teacher: str,
    connector: Callable[[Any, Any], nn.Module | None],
    **hyperparameters: Any,
) -> Objective:
    """`loss(regressed, target, where=..., **hyperparameters)` after `connector(source, target)`, a module or None, was applied.

    `where` says which positions of the target count: [batch, positions, 1], or None.
    """
    features = feature_pair(name, student, teacher)

    def init(key: jax.Array, student: Outputs, teacher: Outputs, batch: Batch) -> Any:
        del batch
        source, target = features(student, teacher)
        module = connector(source, target)
        return {} if module is None else init_connector(module, key, source)

    def function(params: Any, student: Outputs, teacher: Outputs, batch: Batch, **resolved: Any) -> jax.Array:
        source, target = counted_features(batch, *features(student, teacher))
        module = connector(source, target)
        where = feature_counts(batch, target.shape)
        regressed = source if module is None else apply_connector(module, params, source, mask=where)
        return loss(regressed, target, where=where, **resolved)

    return with_parameters(name, init, function, **hyperparameters)


def where_shapes_differ(source: Any, target: Any) -> Regressor | None:
    """The connector of methods that compare activations as they are if they can."""
    return None if source.shape == target.shape else Regressor(tuple(target.shape))
