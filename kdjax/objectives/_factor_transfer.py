"""FT, factor transfer, with the paraphraser and the translator that it trains."""

import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdjax import losses
from kdjax.batches import Batch
from kdjax.metrics import Average
from kdjax.networks import Outputs
from kdjax.objectives._arguments import batch_mean, feature_pair
from kdjax.objectives._connectors import Convolutions, apply_connector, init_connector
from kdjax.objectives._objective import Objective, Term
from kdjax.objectives._positions import feature_counts, pool_to_one_size


def factor_transfer(
    student: str, teacher: str, *, rate: float = 0.5, pretraining: int = 0, variant: Literal['paper', 'attention'] = 'paper'
) -> Objective:
    """FT, factor transfer: the student learns the factors that a paraphraser, an autoencoder, finds in the teacher's layer.

    Paraphraser and translator are three 3x3 convolutions, each with a leaky ReLU, of which the last two have `rate` times the
    teacher's channels; the paraphraser's decoder mirrors it. The code behind published tables compares attention maps of the
    factors, `variant='attention'`, and its translator has batch norm; the authors' own compares the factors, without it. The
    value is the autoencoder's mean squared error for the first `pretraining` steps, when nothing else should be trained (see
    `in_stages`); the paraphraser then stays as it is, and the value is `losses.factor_transfer`. With `pretraining=0` both are
    trained at once, and the value is their sum. The larger image is average-pooled to the smaller.
    `kdjax.recipes.factor_transfer` has the published weight.

    Args:
      student: path of the student's layer.
      teacher: path of the teacher's layer.
      rate: channels of the factors, relative to the teacher's.
      pretraining: steps that train the paraphraser alone.
      variant: as in the loss.
    """
    features = feature_pair('factor_transfer', student, teacher)

    def models(target: Any) -> tuple[Convolutions, Convolutions, Convolutions]:
        channels, factors = target.shape[-1], max(1, round(rate * target.shape[-1]))
        make = functools.partial(Convolutions, size=3, activation=_leaky_relu, activate_last=True)
        encoder, decoder = make((channels, factors, factors)), make((factors, channels, channels), transposed=True)
        return encoder, decoder, make(encoder.channels, normalize=variant == 'attention')

    def init(key: jax.Array, student: Outputs, teacher: Outputs, batch: Batch) -> tuple[Any, Any]:
        del batch
        source, target = features(student, teacher)
        encoder, decoder, translator = models(target)
        keys = jax.random.split(key, 3)
        encoded = jax.ShapeDtypeStruct((*target.shape[:-1], encoder.channels[-1]), jnp.float32)
        params = {
            'encoder': init_connector(encoder, keys[0], target),
            'decoder': init_connector(decoder, keys[1], encoded),
            'translator': init_connector(translator, keys[2], source),
        }
        return params, params['encoder'] if pretraining else {}

    def apply(
        params: Any, state: Any, student: Outputs, teacher: Outputs, batch: Batch, *, step: jax.Array
    ) -> tuple[Average, dict[str, Average], Any]:
        source, target = pool_to_one_size(batch, *features(student, jax.lax.stop_gradient(teacher)))
        where = feature_counts(batch, target.shape)
        encoder, decoder, translator = models(target)
        # Adam's momentum goes on moving the encoder where its gradient is zero: after pretraining, what counts is the copy.
        if pretraining:
            pretrained = step > pretraining
            state = jax.tree.map(lambda new, old: jnp.where(pretrained, old, new), params['encoder'], state)
        fixed = jax.lax.stop_gradient(state if pretraining else params['encoder'])
        factor = apply_connector(encoder, params['encoder'], target, mask=where)
        decoded = apply_connector(decoder, params['decoder'], factor, mask=where)
        autoencoder = losses.hint(decoded, target, where=where)
        translated = apply_connector(translator, params['translator'], source, mask=where)
        wanted = apply_connector(encoder, fixed, target, mask=where)
        transfer = losses.factor_transfer(translated, wanted, where=where, variant=variant)
        values = jnp.where(step < pretraining, autoencoder, transfer) if pretraining else autoencoder + transfer
        extra = {'autoencoder': batch_mean(autoencoder, batch)}
        return batch_mean(values, batch), extra, state

    return Objective((Term('factor_transfer', init, apply),))


def _leaky_relu(x: jax.Array) -> jax.Array:
    return nn.leaky_relu(x, 0.1)
