"""Trained linear embeddings of a layer of each network."""

from typing import Any

import jax
import jax.numpy as jnp

from kdjax.batches import Batch
from kdjax.networks import Outputs
from kdjax.objectives._arguments import feature_pair
from kdjax.objectives._connectors import Embedding, apply_connector, init_connector
from kdjax.objectives._positions import positions_average


class Embeddings:
    """A trained linear map of each of two layers, after the mean over positions if there are any."""

    def __init__(self, term: str, student: str, teacher: str, width: int) -> None:
        self._features = feature_pair(term, student, teacher)
        self._module = Embedding(width)

    def init(self, key: jax.Array, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Any]:
        """Makes the parameters of both."""
        del batch
        layers = dict(zip(('student', 'teacher'), self._features(student, teacher), strict=True))
        pooled = {side: jax.ShapeDtypeStruct((x.shape[0], x.shape[-1]), jnp.float32) for side, x in layers.items()}
        return {
            side: init_connector(self._module, jax.random.fold_in(key, i), layer)
            for i, (side, layer) in enumerate(pooled.items())
        }

    def apply(self, params: dict[str, Any], student: Outputs, teacher: Outputs, batch: Batch) -> tuple[jax.Array, ...]:
        """The embeddings of student and teacher, float32 [batch, width]."""
        layers = zip(('student', 'teacher'), self._features(student, teacher), strict=True)
        return tuple(apply_connector(self._module, params[side], positions_average(batch, layer)) for side, layer in layers)
