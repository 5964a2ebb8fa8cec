"""An adversary that keeps the student's features alike over domains."""

from typing import Any

import flax.linen as nn
import jax

from kdjax import losses
from kdjax.batches import Batch
from kdjax.metrics import Average
from kdjax.networks import Outputs
from kdjax.objectives.arguments import batch_mean, require_entry, require_feature
from kdjax.objectives.connectors import apply_connector, init_connector
from kdjax.objectives.objective import Objective, Weight, with_parameters


class _Discriminator(nn.Module):
    domains: int
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Dense(self.hidden)(x.reshape(x.shape[0], -1)))
        return nn.Dense(self.domains)(x)


def domain_discrimination(student: str, *, domains: int = 2, hidden: int = 128, reversal: Weight = 1.0) -> Objective:
    """A discriminator learns to tell domains by a layer of the student, which learns to leave it nothing to tell by.

    `losses.domain_discrimination` of a trained discriminator with one hidden layer, behind `losses.gradient_reversal`. The
    domain of an example is `batch['domains']`, an integer; a negative one is unknown and does not count.

    Args:
      student: path of the student's layer.
      domains: how many domains there are.
      hidden: width of the discriminator's hidden layer.
      reversal: factor of the reversed gradient; a number or a schedule, `losses.reversal_schedule` say.
    """
    module = _Discriminator(domains, hidden)

    def init(key: jax.Array, student_outputs: Outputs, teacher: Outputs, batch: Batch) -> Any:
        del teacher, batch
        return init_connector(module, key, require_feature('domain_discrimination', 'student', student_outputs, student))

    def loss(params: Any, student_outputs: Outputs, teacher: Outputs, batch: Batch, *, reversal: jax.Array) -> Average:
        del teacher
        feature = require_feature('domain_discrimination', 'student', student_outputs, student)
        labels = require_entry('domain_discrimination', batch, 'domains')
        logits = apply_connector(module, params, losses.gradient_reversal(feature, reversal))
        return batch_mean(losses.domain_discrimination(logits, labels), batch, labels >= 0)

    return with_parameters('domain_discrimination', init, loss, reversal=reversal)
