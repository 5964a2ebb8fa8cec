"""Objectives on relations between the examples of a batch. They see the whole batch, on one device or on many.

Layers may have any widths. Relations are compared, not coordinates, so that nothing need be trained. A layer [batch, positions,
channels] is flattened with zeros for the positions that do not count, so that padding changes nothing. Each is a scalar, not a
mean over examples: of the batch's weights it matters only which are 0.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from kdjax import losses
from kdjax.batches import Batch, counted_examples
from kdjax.networks import Outputs
from kdjax.objectives._arguments import feature_pair, feature_pairs, require_logits
from kdjax.objectives._embeddings import Embeddings
from kdjax.objectives._objective import Objective, Weight, from_function, with_parameters
from kdjax.objectives._positions import counted_features, counted_logits, logit_counts, zero_outside


def similarity_preserving(student: str, teacher: str) -> Objective:
    """SP: `losses.similarity_preserving` between a layer of the student and one of the teacher.

    `kdjax.recipes.similarity_preserving` has the published weight.

    Args:
      student: path of the student's layer.
      teacher: path of the teacher's layer.
    """
    return _on_relations(losses.similarity_preserving, student, teacher)


def pkt(student: str, teacher: str) -> Objective:
    """PKT, probabilistic knowledge transfer: `losses.pkt` between two layers.

    `kdjax.recipes.pkt` has the published weight.

    Args:
      student: path of the student's layer.
      teacher: path of the teacher's layer.
    """
    return _on_relations(losses.pkt, student, teacher)


def rkd_distance(student: str, teacher: str) -> Objective:
    """RKD-D, relational distillation of distances: `losses.rkd_distance` between two layers.

    `kdjax.recipes.rkd` has the published weight.

    Args:
      student: path of the student's layer.
      teacher: path of the teacher's layer.
    """
    return _on_relations(losses.rkd_distance, student, teacher)


def rkd_angle(student: str, teacher: str) -> Objective:
    """RKD-A, relational distillation of angles: `losses.rkd_angle` between two layers.

    `kdjax.recipes.rkd` has the published weight.

    Args:
      student: path of the student's layer.
      teacher: path of the teacher's layer.
    """
    return _on_relations(losses.rkd_angle, student, teacher)


def correlation_congruence(
    student: str,
    teacher: str,
    *,
    gamma: Weight = 0.4,
    order: int = 2,
    variant: Literal['kernel', 'adjacent'] = 'kernel',
    width: int | None = None,
) -> Objective:
    """CC: `losses.correlation_congruence` between two layers, as they are or behind trained linear embeddings.

    The published weight 0.02 is that of `variant='adjacent'` with embeddings of `width=128` of the pooled layers, both
    networks' trained; `kdjax.recipes.correlation_congruence` has it.

    Args:
      student: path of the student's layer.
      teacher: path of the teacher's layer.
      gamma: as in the loss; a number or a schedule.
      order: as in the loss.
      variant: as in the loss; `'adjacent'` needs layers of one width, or embeddings.
      width: of the embeddings; None compares the layers as they are.
    """
    hyperparameters: dict[str, Any] = {'gamma': gamma, 'order': order, 'variant': variant}
    if width is None:
        return _on_relations(losses.correlation_congruence, student, teacher, **hyperparameters)
    embed = Embeddings('correlation_congruence', student, teacher, width)

    def loss(params: Any, student: Outputs, teacher: Outputs, batch: Batch, **resolved: Any) -> jax.Array:
        pair = embed.apply(params, student, teacher, batch)
        return losses.correlation_congruence(*pair, where=counted_examples(batch), **resolved)

    return with_parameters('correlation_congruence', embed.init, loss, **hyperparameters)


def instance_graph(student: Sequence[str], teacher: Sequence[str], **hyperparameters: Weight) -> Objective:
    """IRG: `losses.instance_graph` of the logits and of layers of both networks, from input to output.

    Args:
      student: paths of the student's layers.
      teacher: paths of as many of the teacher's.
      **hyperparameters: weights of the graph's parts, as in the loss; numbers or schedules.
    """
    features = feature_pairs('instance_graph', student, teacher)

    def loss(student: Outputs, teacher: Outputs, batch: Batch, **resolved: Any) -> jax.Array:
        logits = [require_logits('instance_graph', side, x) for side, x in (('student', student), ('teacher', teacher))]
        source, target = (counted_features(batch, *side) for side in features(student, teacher))
        vertices, wanted = (_over_counted(batch, x) for x in logits)
        return losses.instance_graph(vertices, wanted, source, target, where=counted_examples(batch), **resolved)

    return from_function('instance_graph', loss, **hyperparameters)


def _on_relations(loss: Callable[..., jax.Array], student: str, teacher: str, **hyperparameters: Any) -> Objective:
    features = feature_pair(loss.__name__, student, teacher)

    def function(student: Outputs, teacher: Outputs, batch: Batch, **resolved: Any) -> jax.Array:
        pair = counted_features(batch, *features(student, teacher))
        return loss(*pair, where=counted_examples(batch), **resolved)

    return from_function(loss.__name__, function, **hyperparameters)


def _over_counted(batch: Batch, logits: jax.Array) -> jax.Array:
    """Logits whose mean of squares over all positions is that over the positions that count."""
    where = logit_counts(batch, logits.shape)
    if where is None or logits.ndim < 3:
        return counted_logits(batch, logits)
    inner = tuple(range(1, logits.ndim))
    share = jnp.mean(jnp.broadcast_to(where, (*logits.shape[:-1], 1)), axis=inner, keepdims=True, dtype=jnp.float32)
    return zero_outside(where, logits.astype(jnp.float32)) / jnp.sqrt(jnp.where(share > 0, share, 1.0))
