"""Objectives whose connector is a model of its own: of a variance, of factors, of what a teacher leaves out, of all stages."""

from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdjax import losses
from kdjax.batches import Batch
from kdjax.metrics import Average
from kdjax.networks import Outputs
from kdjax.objectives._arguments import batch_mean, feature_pair, feature_pairs, require_feature
from kdjax.objectives._connectors import Convolutions, Regressor, apply_connector, init_connector
from kdjax.objectives._objective import Objective, Term, with_parameters
from kdjax.objectives._positions import counted_features, feature_counts, pool_positions, zero_outside

INITIAL_VARIANCE = 5.0
SMALLEST_VARIANCE = 1e-5


def vid(student: str, teacher: str) -> Objective:
    """Variational information distillation: the student's layer predicts the teacher's, with a variance per channel.

    The mean comes from three 1x1 convolutions, the variance is softplus(ρ) + 1e-5, begins at 5 and is trained; the loss is
    `losses.vid`. The larger of two images is average-pooled to the smaller; layers may be of tokens [batch, length, width] too.
    Published weight: 1.

    Args:
      student: path of the student's layer.
      teacher: path of the teacher's layer.
    """
    features = feature_pair('vid', student, teacher)

    def model(target: Any) -> Convolutions:
        return Convolutions((target.shape[-1],) * 3, 1)

    def init(key: jax.Array, student: Outputs, teacher: Outputs, batch: Batch) -> Any:
        del batch
        source, target = features(student, teacher)
        # The inverse of softplus.
        rho = jnp.full(target.shape[-1], jnp.log(jnp.expm1(INITIAL_VARIANCE - SMALLEST_VARIANCE)), jnp.float32)
        return {'mean': init_connector(model(target), key, source), 'rho': rho}

    def loss(params: Any, student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        source, target = _to_one_size(batch, *features(student, teacher))
        variance = jax.nn.softplus(params['rho']) + SMALLEST_VARIANCE
        predicted = apply_connector(model(target), params['mean'], source)
        return losses.vid(predicted, variance, target, where=feature_counts(batch, target.shape))

    return with_parameters('vid', init, loss)


def factor_transfer(
    student: str, teacher: str, *, rate: float = 0.5, pretraining: int = 0, variant: Literal['paper', 'attention'] = 'paper'
) -> Objective:
    """The student's translator follows the factors that a paraphraser, an autoencoder, finds in the teacher's layer.

    Paraphraser and translator are three 3x3 convolutions with leaky ReLUs, of which the last two have `rate` times the
    teacher's channels; the paraphraser's decoder mirrors it. The value is the autoencoder's mean squared error for the first
    `pretraining` steps, when nothing else should be trained (see `in_stages`); the paraphraser then stays as it is, and the
    value is `losses.factor_transfer`. With `pretraining=0` both are trained at once, and the value is their sum. The larger
    image is average-pooled to the smaller. Published weight: 200.

    Args:
      student: path of the student's layer.
      teacher: path of the teacher's layer.
      rate: channels of the factors, relative to the teacher's.
      pretraining: steps that train the paraphraser alone.
      variant: as in the loss.
    """
    features = feature_pair('factor_transfer', student, teacher)

    def models(target: Any) -> tuple[nn.Module, nn.Module]:
        channels, factors = target.shape[-1], max(1, round(rate * target.shape[-1]))
        encoder = Convolutions((channels, factors, factors), 3, _leaky_relu)
        return encoder, Convolutions((factors, channels, channels), 3, _leaky_relu, transposed=True)

    def init(key: jax.Array, student: Outputs, teacher: Outputs, batch: Batch) -> tuple[Any, Any]:
        del batch
        source, target = features(student, teacher)
        encoder, decoder = models(target)
        keys = jax.random.split(key, 3)
        encoded = jax.ShapeDtypeStruct((*target.shape[:-1], encoder.channels[-1]), jnp.float32)
        params = {
            'encoder': init_connector(encoder, keys[0], target),
            'decoder': init_connector(decoder, keys[1], encoded),
            'translator': init_connector(encoder, keys[2], source),
        }
        return params, params['encoder'] if pretraining else {}

    def apply(
        params: Any, state: Any, student: Outputs, teacher: Outputs, batch: Batch, *, step: jax.Array
    ) -> tuple[Average, dict[str, Average], Any]:
        source, target = _to_one_size(batch, *features(student, jax.lax.stop_gradient(teacher)))
        where = feature_counts(batch, target.shape)
        encoder, decoder = models(target)
        # Adam's momentum goes on moving the encoder where its gradient is zero: after pretraining, what counts is the copy.
        if pretraining:
            pretrained = step > pretraining
            state = jax.tree.map(lambda new, old: jnp.where(pretrained, old, new), params['encoder'], state)
        fixed = jax.lax.stop_gradient(state if pretraining else params['encoder'])
        factor = apply_connector(encoder, params['encoder'], target, mask=where)
        decoded = apply_connector(decoder, params['decoder'], factor, mask=where)
        autoencoder = losses.hint(decoded, target, where=where)
        factors = ((params['translator'], source), (fixed, target))
        pair = (apply_connector(encoder, weights, x, mask=where) for weights, x in factors)
        transfer = losses.factor_transfer(*pair, where=where, variant=variant)
        values = jnp.where(step < pretraining, autoencoder, transfer) if pretraining else autoencoder + transfer
        extra = {'autoencoder': batch_mean(autoencoder, batch)}
        return batch_mean(values, batch), extra, state

    return Objective((Term('factor_transfer', init, apply),))


def overhaul(student: str, teacher: str, *, norm: str | None = None) -> Objective:
    """Comprehensive overhaul: a trained 1x1 convolution with batch norm on the student's layer, and `losses.overhaul`.

    The layers are pre-activations. The margin of each channel is what the teacher's batch norm says of its negative values,
    `losses.overhaul_margin`. Published weight: 1e-3, and half as much for every stage before the last.

    Args:
      student: path of the student's layer, before its ReLU.
      teacher: path of the teacher's layer, the output of a batch norm.
      norm: path of that batch norm's parameters, if it is not `teacher`: `networks.tap_parameters` makes its `scale` and `bias`
        features of the teacher.
    """
    features = feature_pair('overhaul', student, teacher)
    norm = teacher if norm is None else norm

    def model(target: Any) -> Regressor:
        return Regressor(tuple(target.shape), normalize=True)

    def init(key: jax.Array, student: Outputs, teacher: Outputs, batch: Batch) -> Any:
        del batch
        source, target = features(student, teacher)
        return init_connector(model(target), key, source)

    def loss(params: Any, student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        source, target = counted_features(batch, *features(student, teacher))
        scale, bias = (require_feature('overhaul', 'teacher', teacher, f'{norm}/{name}') for name in ('scale', 'bias'))
        where = feature_counts(batch, target.shape)
        regressed = apply_connector(model(target), params, source, mask=where)
        return losses.overhaul(regressed, target, losses.overhaul_margin(bias, jnp.abs(scale)), where=where)

    return with_parameters('overhaul', init, loss)


def hierarchical_context(student: Sequence[str], teacher: Sequence[str]) -> Objective:
    """Knowledge review: every stage of the student, fused with those behind it, learns from the teacher's stage.

    From the last stage to the first, a stage goes through a 1x1 convolution with batch norm, is mixed with what came of the
    stage behind it (enlarged to its size) by a pair of attention maps that both decide, and leads through a 3x3 convolution
    with batch norm to the teacher's channels; each is compared by `losses.hierarchical_context`, and the values are summed. The
    authors warm the weight up over 20 epochs. The windows of the loss's pools are those of the padded images, so images of one
    size are best padded alike in all batches.

    Args:
      student: paths of the student's stages, from input to output.
      teacher: paths of as many of the teacher's, of the same sizes.
    """
    features = feature_pairs('hierarchical_context', student, teacher)

    def model(targets: Sequence[Any], sources: Sequence[Any]) -> _Review:
        return _Review(tuple(target.shape[-1] for target in targets), min(512, sources[-1].shape[-1]))

    def init(key: jax.Array, student: Outputs, teacher: Outputs, batch: Batch) -> Any:
        del batch
        sources, targets = features(student, teacher)
        return init_connector(model(targets, sources), key, *sources)

    def loss(params: Any, student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        sources, targets = (counted_features(batch, *layers) for layers in features(student, teacher))
        masks = [feature_counts(batch, target.shape) for target in targets]
        # Either all stages have a mask or none has.
        fused = apply_connector(model(targets, sources), params, *sources, mask=None if masks[0] is None else masks)
        values = [losses.hierarchical_context(*pair, where=where) for *pair, where in zip(fused, targets, masks, strict=True)]
        return sum(values, jnp.float32(0.0))

    return with_parameters('hierarchical_context', init, loss)


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


def _to_one_size(batch: Batch, source: jax.Array, target: jax.Array) -> tuple[jax.Array, ...]:
    """Both in float32 with zeros where they do not count, the larger of two images pooled to the smaller."""
    if source.ndim == target.ndim == 4:
        size = min(source.shape[1], target.shape[1]), min(source.shape[2], target.shape[2])
        return tuple(pool_positions(batch, x, size) for x in (source, target))
    return tuple(x.astype(jnp.float32) for x in counted_features(batch, source, target))


def _leaky_relu(x: jax.Array) -> jax.Array:
    return nn.leaky_relu(x, 0.1)
