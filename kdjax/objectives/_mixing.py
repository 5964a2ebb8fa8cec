"""Learning from inputs that blend two examples."""

import jax
import jax.numpy as jnp
import optax

from kdjax.batches import Batch
from kdjax.metrics import Average
from kdjax.networks import Outputs
from kdjax.numerics import LOG_ZERO
from kdjax.objectives._arguments import batch_mean, require_entry, require_logits
from kdjax.objectives._by_position import by_position
from kdjax.objectives._labels import class_labels, labels_check, nan_outside
from kdjax.objectives._objective import Objective, from_function, with_check
from kdjax.objectives._positions import zero_outside


def mixed_labels(*, ignore: int | None = None) -> Objective:
    """Mixup: cross-entropy with both labels of a blended input, λ CE(label) + (1 - λ) CE(other label), at temperature 1.

    It reads `labels`, `other_labels` and `share` λ of the batch, as `data.augment.mixup` makes them, and takes the mean over
    the examples that have both labels (which are not negative).

    Args:
      ignore: a further label that stands for none, such as 255.

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
    name = 'mixed_labels'

    def cross_entropy(student: Outputs, teacher: Outputs, batch: Batch) -> Average:
        del teacher
        logits = require_logits(name, 'student', student)
        (labels, labelled), (other, others) = (
            class_labels(name, batch, logits, entry=entry, ignore=ignore) for entry in ('labels', 'other_labels')
        )
        share = require_entry(name, batch, 'share')
        if share.shape != labels.shape:
            raise ValueError(f'{name}: share {share.shape} does not fit labels {labels.shape}')
        kept, classes = labelled & others, logits.shape[-1]
        logits, share = (zero_outside(kept[..., None], x) for x in (logits.astype(jnp.float32), share[..., None]))
        targets = share * jax.nn.one_hot(labels, classes) + (1 - share) * jax.nn.one_hot(other, classes)
        # A class at -inf is as in kdjax.losses: finite, also where it has a share of the target.
        logits = jnp.where(jnp.isneginf(logits), LOG_ZERO, logits)
        both = jnp.where(kept, jnp.maximum(labels, other), -1)
        return batch_mean(nan_outside(optax.losses.softmax_cross_entropy(logits, targets), both, classes), batch, kept)

    objective = by_position(from_function(name, cross_entropy))
    return with_check(objective, labels_check(name, 'labels', 'other_labels', ignore=ignore))
