"""Distillation losses: pure functions of arrays that know nothing of networks, optimizers or training.

Every loss is `loss(student, teacher, [labels], *, hyperparameters, axis=-1, where=None)`, computes in float32 whatever comes
in, returns float32, and has finite values and gradients for finite logits, for -inf logits, for zeros and under full masks. A
loss that is a sum over examples returns one value per example, and the caller writes `.mean()`; a loss on relations between
the examples of a batch returns a scalar. No loss stops the gradient on the teacher's side.

| what you have                          | losses                                  | returns     |
|----------------------------------------|-----------------------------------------|-------------|
| logits over the same classes           | `soft_targets`, `logit_mse`             | per example |
| the same, with another divergence      | `reverse_kl`, `jensen_shannon`, `skewed_kl` | per example |
| the same, and labels                   | `decoupled_kd`                          | per example |
| activations of the same shape          | `hint` (other shapes: `objectives.hint`)| per example |
| activations, any channels and sizes    | `attention_transfer`                    | per example |
| embeddings of a batch, any widths      | `similarity_preserving`                 | scalar      |
"""

from kdjax.losses.divergences import jensen_shannon as jensen_shannon
from kdjax.losses.divergences import reverse_kl as reverse_kl
from kdjax.losses.divergences import skewed_kl as skewed_kl
from kdjax.losses.features import attention_transfer as attention_transfer
from kdjax.losses.features import hint as hint
from kdjax.losses.logits import decoupled_kd as decoupled_kd
from kdjax.losses.logits import logit_mse as logit_mse
from kdjax.losses.logits import soft_targets as soft_targets
from kdjax.losses.relations import similarity_preserving as similarity_preserving
