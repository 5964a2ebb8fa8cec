"""MGD, masked generative distillation, with the generator that it trains."""

from typing import Any

import jax

from kdjax import losses
from kdjax.batches import Batch
from kdjax.metrics import Average
from kdjax.networks import Outputs
from kdjax.objectives._arguments import batch_mean, feature_pair
from kdjax.objectives._connectors import Convolutions, apply_connector, init_connector
from kdjax.objectives._lifting import where_shapes_differ
from kdjax.objectives._objective import Objective, Term
from kdjax.objectives._positions import counted_features, feature_counts


def masked_generation(student: str, teacher: str, *, masked: float = 0.5) -> Objective:
    """MGD: the student's feature, positions masked at random, must still make the teacher's.

    A convolution to the teacher's shape where shapes differ, the mask, then two 3x3 convolutions with a ReLU between, all
    trained; the loss is `losses.masked_generation`. Tokens have convolutions of 3 of them. The state is a random key, and what
    is masked depends on the shape of the layer too.

    Args:
      student: path of the student's layer.
      teacher: path of the teacher's layer.
      masked: the share of positions that are masked.
    """
    if not 0 <= masked < 1:
        raise ValueError(f'masked_generation: masked must be at least 0 and below 1, got {masked}')
    features = feature_pair('masked_generation', student, teacher)

    def generator(target: Any) -> Convolutions:
        return Convolutions((target.shape[-1], target.shape[-1]), 3)

    def init(key: jax.Array, student: Outputs, teacher: Outputs, batch: Batch) -> tuple[Any, Any]:
        del batch
        source, target = features(student, teacher)
        keys = jax.random.split(key, 3)
        align = where_shapes_differ(source, target)
        aligned = {} if align is None else {'align': init_connector(align, keys[0], source)}
        return {'generator': init_connector(generator(target), keys[1], target), **aligned}, {'key': keys[2]}

    def apply(
        params: Any, state: Any, student: Outputs, teacher: Outputs, batch: Batch, *, step: jax.Array
    ) -> tuple[Average, dict[str, Average], Any]:
        source, target = counted_features(batch, *features(student, jax.lax.stop_gradient(teacher)))
        align = where_shapes_differ(source, target)
        if align is not None:
            source = apply_connector(align, params['align'], source)
        keep = jax.random.bernoulli(jax.random.fold_in(state['key'], step), 1 - masked, (*target.shape[:-1], 1))
        where = feature_counts(batch, target.shape)
        generated = apply_connector(generator(target), params['generator'], source * keep.astype(source.dtype), mask=where)
        return batch_mean(losses.masked_generation(generated, target, where=where), batch), {}, state

    return Objective((Term('masked_generation', init, apply),))
