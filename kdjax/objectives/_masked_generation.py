"""MGD, masked generative distillation, with the generator that it trains."""

from typing import Any, Literal

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

SHARES = {'positions': 0.5, 'channels': 0.15}


def masked_generation(
    student: str, teacher: str, *, masked: Literal['positions', 'channels'] = 'positions', share: float | None = None
) -> Objective:
    """MGD: the student's feature, positions or channels masked at random, must still make the teacher's.

    The paper masks positions, all channels of them; so does its code for dense tasks, while its code for classification masks
    channels, at all positions. A convolution to the teacher's shape where shapes differ, the mask, then two 3x3 convolutions
    with a ReLU between, all trained; the loss is `losses.masked_generation`. Tokens have convolutions of 3 of them. The state
    is a random key, and what is masked depends on the shape of the layer too.

    Args:
      student: path of the student's layer.
      teacher: path of the teacher's layer.
      masked: what is masked, `'positions'` or `'channels'`.
      share: how much of it; the published 0.5 of the positions, or 0.15 of the channels, if not given.

    Raises:
      ValueError: the share is out of range, or nothing of that name can be masked.
    """
    if masked not in SHARES:
        raise ValueError(f"masked_generation: masked must be 'positions' or 'channels', got {masked!r}")
    share = SHARES[masked] if share is None else share
    if not 0 <= share < 1:
        raise ValueError(f'masked_generation: share must be at least 0 and below 1, got {share}')
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
        channels = (target.shape[0], *(1,) * (target.ndim - 2), target.shape[-1])
        shape = channels if masked == 'channels' else (*target.shape[:-1], 1)
        keep = jax.random.bernoulli(jax.random.fold_in(state['key'], step), 1 - share, shape)
        where = feature_counts(batch, target.shape)
        generated = apply_connector(generator(target), params['generator'], source * keep.astype(source.dtype), mask=where)
        return batch_mean(losses.masked_generation(generated, target, where=where), batch), {}, state

    return Objective((Term('masked_generation', init, apply),))
