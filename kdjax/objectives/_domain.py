"""An adversary that keeps the student's features alike over domains."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdjax import losses
from kdjax.batches import Batch
from kdjax.metrics import Average
from kdjax.networks import Outputs
from kdjax.objectives._arguments import batch_mean, require_entry, require_feature
from kdjax.objectives._connectors import apply_connector, init_connector
from kdjax.objectives._labels import indices_that_count, nan_outside
from kdjax.objectives._objective import Objective, Weight, with_check, with_parameters
from kdjax.objectives._positions import positions_average


class _Discriminator(nn.Module):
    domains: int
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Dense(self.hidden)(x))
        return nn.Dense(self.domains)(x)


def domain_discrimination(student: str, *, domains: int = 2, hidden: int = 128, reversal: Weight = 1.0) -> Objective:
    """A discriminator learns to tell domains by a layer of the student, which learns to leave it nothing to tell by.

    `losses.domain_discrimination` of a trained discriminator with one hidden layer, behind `losses.gradient_reversal`. The
    domain of an example is `batch['domains']`, an integer; a negative one is unknown and does not count. The discriminator sees
    the mean over the positions of the layer that count. A domain that there is not is an error where its value is at hand, and
    makes the value NaN where it is traced.

    Args:
      student: path of the student's layer.
      domains: how many domains there are.
      hidden: width of the discriminator's hidden layer.
      reversal: factor of the reversed gradient; a number or a schedule, such as `losses.reversal_schedule`.
    """
    name, module = 'domain_discrimination', _Discriminator(domains, hidden)

    def known_domains(batch: Batch) -> tuple[jax.Array, jax.Array]:
        found = require_entry(name, batch, 'domains')
        kept = indices_that_count(name, batch, 'domains', found, domains)
        return jnp.where(kept, jnp.asarray(found).astype(jnp.int32), -1), kept

    def check(student_outputs: Outputs, teacher: Outputs, batch: Batch) -> None:
        del student_outputs, teacher
        known_domains(batch)

    def init(key: jax.Array, student_outputs: Outputs, teacher: Outputs, batch: Batch) -> Any:
        del teacher, batch
        feature = require_feature(name, 'student', student_outputs, student)
        return init_connector(module, key, jax.ShapeDtypeStruct((feature.shape[0], feature.shape[-1]), jnp.float32))

    def loss(params: Any, student_outputs: Outputs, teacher: Outputs, batch: Batch, *, reversal: jax.Array) -> Average:
        del teacher
        feature = positions_average(batch, require_feature(name, 'student', student_outputs, student))
        found, kept = known_domains(batch)
        logits = apply_connector(module, params, losses.gradient_reversal(feature, reversal))
        return batch_mean(nan_outside(losses.domain_discrimination(logits, found), found, domains), batch, kept)

    return with_check(with_parameters(name, init, loss, reversal=reversal), check)
