"""Learning from inputs that blend two examples."""

import jax
import jax.numpy as jnp
import optax

from kdjax.batches import Batch
from kdjax.losses.numerics import LOG_ZERO
from kdjax.metrics import Average
from kdjax.networks import Outputs
from kdjax.objectives.arguments import batch_mean, require_entry, require_labels, require_logits
from kdjax.objectives.objective import Objective, from_function


def mixed_labels() -> Objective:
    """Cross-entropy with both labels of a blended input, λ CE(label) + (1 - λ) CE(other label), at temperature 1.

    It reads `labels`, `other_labels` and `share` λ of the batch, as `data.augment.mixup` makes them, and takes the mean over
    the examples that have both labels (which are not negative).

    >>> import jax.numpy as jnp
    >>> from kdjax.networks import Outputs
    >>> batch = {'labels': jnp.array([0]), 'other_labels': jnp.array([1]), 'share': jnp.array([0.75])}
    >>> nothing, student = {'mixed_labels': {}}, Outputs(jnp.zeros((1, 2)))
    >>> loss, _, _ = mixed_labels().apply(nothing, nothing, student, student, batch, step=0)
    >>> print(loss)
    0.693

    Reference:
      Zhang, Cisse, Dauphin, Lopez-Paz. mixup: Beyond Empirical Risk Minimization. 2018. https://arxiv.org/abs/1710.09412
    """

    def cross_entropy(student: Outputs, teacher: Outputs, batch: Batch) -> Average:
        del teacher
        logits = require_logits('mixed_labels', 'student', student).astype(jnp.float32)
        labels = require_labels('mixed_labels', batch)
        other, share = (require_entry('mixed_labels', batch, name) for name in ('other_labels', 'share'))
        if not labels.shape == other.shape == share.shape == logits.shape[:-1]:
            raise ValueError(
                f'mixed_labels: labels {labels.shape}, other_labels {other.shape} and share {share.shape} '
                f'do not fit logits {logits.shape}'
            )
        classes, share = logits.shape[-1], share[..., None]
        targets = share * jax.nn.one_hot(labels, classes) + (1 - share) * jax.nn.one_hot(other, classes)
        # A class at -inf is as in kdjax.losses: finite, also where it has a share of the target.
        logits = jnp.where(jnp.isneginf(logits), LOG_ZERO, logits)
        return batch_mean(optax.losses.softmax_cross_entropy(logits, targets), batch, (labels >= 0) & (other >= 0))

    return from_function('mixed_labels', cross_entropy)
