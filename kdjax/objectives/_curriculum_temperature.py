"""CTKD: soft targets whose temperature is trained to make them hard."""

import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdjax import losses
from kdjax.batches import Batch
from kdjax.metrics import Average
from kdjax.networks import Outputs
from kdjax.objectives._arguments import batch_mean, require_logits
from kdjax.objectives._connectors import apply_connector, init_connector
from kdjax.objectives._labels import check_classes
from kdjax.objectives._logits import both_logits
from kdjax.objectives._objective import Objective, Term


class _Predictor(nn.Module):
    """Two layers from both networks' logits to one number for each example."""

    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(1)(nn.relu(nn.Dense(self.hidden)(x)))


def curriculum_temperature(
    steps: int,
    *,
    variant: Literal['global', 'example'] = 'global',
    least: float = 1.0,
    spread: float = 20.0,
    hidden: int = 128,
) -> Objective:
    """CTKD, curriculum temperature: `losses.soft_targets` at a temperature that is trained to make them hard to reach.

    T = least + spread · sigmoid(θ). The student lowers T² · KL, and θ climbs it: its gradient comes through
    `losses.gradient_reversal`, whose scale rises from 0 to 1 as (1 - cos(π · step / steps)) / 2, so that the task begins easy.
    The mean temperature is the metric `'temperature'`; `kdjax.recipes.curriculum_temperature` has the published weights.

    Args:
      steps: until the reversal has its full scale; the authors take 10 epochs of 240.
      variant: `'global'`: θ is one number, which begins at 1, as in the authors' code. `'example'`: two dense layers make θ
        of each example, or position, from the logits of both networks, which they take as numbers.
      least: the lowest temperature, positive.
      spread: how far it may rise above that, positive.
      hidden: width of the layers of `'example'`.

    Raises:
      ValueError: an argument is out of range.

    Reference:
      Li, Li, Yang, Zhao, Song, Luo, Li, Yang. Curriculum Temperature for Knowledge Distillation. 2023.
      https://arxiv.org/abs/2211.16231
    """
    name = 'curriculum_temperature'
    if steps < 1 or not (0 < least < math.inf and 0 < spread < math.inf) or hidden < 1:
        raise ValueError(
            f'{name}: steps and hidden must be at least 1, least and spread positive, '
            f'got {steps}, {hidden}, {least} and {spread}'
        )
    if variant not in ('global', 'example'):
        raise ValueError(f"{name}: variant must be 'global' or 'example', got {variant!r}")
    module = _Predictor(hidden)

    def predicted(logits: tuple[jax.Array, jax.Array]) -> jax.Array:
        # A class that is ruled out would make infinities of all layers.
        finite = (jnp.where(jnp.isfinite(x), x, 0.0).astype(jnp.float32) for x in logits)
        return jax.lax.stop_gradient(jnp.concatenate(list(finite), axis=-1))

    def init(key: jax.Array, student: Outputs, teacher: Outputs, batch: Batch) -> tuple[Any, Any]:
        pair = require_logits(name, 'student', student), require_logits(name, 'teacher', teacher)
        for logits in pair:
            check_classes(name, logits)
        if variant == 'global':
            return jnp.float32(1.0), {}
        width = sum(logits.shape[-1] for logits in pair)
        return init_connector(module, key, jax.ShapeDtypeStruct((*pair[0].shape[:-1], width), jnp.float32)), {}

    def apply(
        params: Any, state: Any, student: Outputs, teacher: Outputs, batch: Batch, *, step: jax.Array
    ) -> tuple[Average, dict[str, Average], Any]:
        logits = both_logits(name, student, jax.lax.stop_gradient(teacher), batch)
        theta = params if variant == 'global' else apply_connector(module, params, predicted(logits))[..., 0]
        progress = jnp.clip(jnp.asarray(step, jnp.float32) / steps, 0.0, 1.0)
        reversed_theta = losses.gradient_reversal(theta, (1 - jnp.cos(jnp.pi * progress)) / 2)
        temperature = jnp.broadcast_to(least + spread * jax.nn.sigmoid(reversed_theta), logits[0].shape[:-1])
        # A loss has one temperature for all examples: here each example is divided by its own first.
        softened = (x.astype(jnp.float32) / temperature[..., None] for x in logits)
        values = jnp.square(temperature) * losses.soft_targets(*softened, temperature=1.0)
        return batch_mean(values, batch), {'temperature': batch_mean(temperature, batch)}, state

    return Objective((Term(name, init, apply, by_position=True),))
