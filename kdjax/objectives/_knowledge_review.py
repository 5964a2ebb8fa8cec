"""ReviewKD, knowledge review, with the fusion of the student's stages that it trains."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdjax import losses
from kdjax.batches import Batch
from kdjax.networks import Outputs
from kdjax.objectives._arguments import feature_pairs
from kdjax.objectives._connectors import apply_connector, init_connector
from kdjax.objectives._objective import Objective, with_parameters
from kdjax.objectives._positions import counted_features, feature_counts, zero_outside


def hierarchical_context(student: Sequence[str], teacher: Sequence[str]) -> Objective:
    """ReviewKD: every stage of the student, fused with those behind it, learns from the teacher's stage.

    From the last stage to the first, a stage goes through a 1x1 convolution with batch norm, is mixed with what came of the
    stage behind it (enlarged to its size) by a pair of attention maps that both decide, and leads through a 3x3 convolution
    with batch norm to the teacher's channels. A last stage may be an embedding [batch, channels], as published code adds the
    pooled one: it is an image of one position. Each is compared by `losses.hierarchical_context`, and the values are summed.
    The authors warm the weight up over 20 epochs. The windows of the loss's pools are those of the padded images, so images of
    one size are best padded alike in all batches.

    Args:
      student: paths of the student's stages, from input to output.
      teacher: paths of as many of the teacher's, of the same sizes.

    Raises:
      ValueError: not as many stages are named of both; from `init` and `apply`: a stage is neither an image nor an embedding.
    """
    features = feature_pairs('hierarchical_context', student, teacher)

    def model(targets: Sequence[Any], sources: Sequence[Any]) -> _Review:
        return _Review(tuple(target.shape[-1] for target in targets), min(512, sources[-1].shape[-1]))

    def init(key: jax.Array, student: Outputs, teacher: Outputs, batch: Batch) -> Any:
        del batch
        sources, targets = (jax.eval_shape(_as_images, layers) for layers in features(student, teacher))
        return init_connector(model(targets, sources), key, *sources)

    def loss(params: Any, student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        sources, targets = (counted_features(batch, *_as_images(layers)) for layers in features(student, teacher))
        masks = [feature_counts(batch, target.shape) for target in targets]
        # Either all stages have a mask or none has.
        fused = apply_connector(model(targets, sources), params, *sources, mask=None if masks[0] is None else masks)
        values = [losses.hierarchical_context(*pair, where=where) for *pair, where in zip(fused, targets, masks, strict=True)]
        return sum(values, jnp.float32(0.0))

    return with_parameters('hierarchical_context', init, loss)


def _as_images(layers: Sequence[jax.Array]) -> list[jax.Array]:
    wrong = [x.shape for x in layers if x.ndim not in (2, 4)]
    if wrong:
        raise ValueError(
            'hierarchical_context: stages must be images [batch, height, width, channels] or embeddings [batch, channels], '
            f'got {wrong[0]}'
        )
    return [x[:, None, None] if x.ndim == 2 else x for x in layers]


class _Review(nn.Module):
    """The student's stages, fused from the last to the first.

    Attributes:
      channels: of the teacher's stages.
      width: channels within the fusion.
    """

    channels: tuple[int, ...]
    width: int

    @nn.compact
    def __call__(self, *stages: jax.Array, mask: Sequence[jax.Array] | None = None) -> tuple[jax.Array, ...]:
        fused, behind = [], None
        masks = [None] * len(stages) if mask is None else mask
        for i, (x, channels) in reversed(list(enumerate(zip(stages, self.channels, strict=True)))):
            x = nn.Conv(self.width, (1, 1), use_bias=False, name=f'reduce{i}')(x)
            x = nn.BatchNorm(use_running_average=False, name=f'reduce_norm{i}')(x, mask=masks[i])
            if behind is not None:
                behind = jax.image.resize(behind, x.shape, 'nearest')
                attention = nn.sigmoid(nn.Conv(2, (1, 1), name=f'attention{i}')(jnp.concatenate([x, behind], axis=-1)))
                x = x * attention[..., :1] + behind * attention[..., 1:]
            behind = x
            y = nn.Conv(channels, (3, 3), use_bias=False, name=f'expand{i}')(zero_outside(masks[i], x))
            fused.append(nn.BatchNorm(use_running_average=False, name=f'expand_norm{i}')(y, mask=masks[i]))
        return tuple(reversed(fused))
