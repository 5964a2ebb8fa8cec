"""Objectives: losses lifted to networks' outputs, with connectors, weights and schedules, and the arithmetic that joins them.

objective = combine(
    hard=0.1 * hard_labels(),
    soft=0.9 * soft_targets(temperature=4.0),
    hint=optax.cosine_decay_schedule(100.0, 5_000) * hint(student='stage3', teacher='stage3'),
)
"""

from kdjax.batches import Batch as Batch
from kdjax.objectives.features import attention_transfer as attention_transfer
from kdjax.objectives.features import hint as hint
from kdjax.objectives.features import similarity_preserving as similarity_preserving
from kdjax.objectives.logits import decoupled_kd as decoupled_kd
from kdjax.objectives.logits import hard_labels as hard_labels
from kdjax.objectives.logits import jensen_shannon as jensen_shannon
from kdjax.objectives.logits import logit_mse as logit_mse
from kdjax.objectives.logits import reverse_kl as reverse_kl
from kdjax.objectives.logits import skewed_kl as skewed_kl
from kdjax.objectives.logits import soft_targets as soft_targets
from kdjax.objectives.objective import Objective as Objective
from kdjax.objectives.objective import Term as Term
from kdjax.objectives.objective import batch_mean as batch_mean
from kdjax.objectives.objective import combine as combine
from kdjax.objectives.objective import from_function as from_function
