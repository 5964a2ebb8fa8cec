"""Objectives on relations between the examples of a batch. They see the whole batch, on one device or on many.

Layers may have any widths. None trains anything: relations are compared, not coordinates.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from kdjax import losses
from kdjax.batches import Batch
from kdjax.networks import Outputs
from kdjax.objectives.arguments import feature_pair, feature_pairs, kept_examples, require_logits
from kdjax.objectives.objective import Objective, Weight, from_function


def similarity_preserving(student: str, teacher: str) -> Objective:
    """`losses.similarity_preserving` between a layer of the student and one of the teacher. Published weight: 3000.

    Args:
      student: path of the student's layer.
      teacher: path of the teacher's layer.
    """
    return _on_relations(losses.similarity_preserving, student, teacher)


def pkt(student: str, teacher: str) -> Objective:
    """Probabilistic knowledge transfer: `losses.pkt` between two layers. Published weight: 30000.

    Args:
      student: path of the student's layer.
      teacher: path of the teacher's layer.
    """
    return _on_relations(losses.pkt, student, teacher)


def rkd_distance(student: str, teacher: str) -> Objective:
    """Relational distillation of distances: `losses.rkd_distance` between two layers. Published weight: 25.

    Args:
      student: path of the student's layer.
      teacher: path of the teacher's layer.
    """
    return _on_relations(losses.rkd_distance, student, teacher)


def rkd_angle(student: str, teacher: str) -> Objective:
    """Relational distillation of angles: `losses.rkd_angle` between two layers. Published weight: 50.

    Args:
      student: path of the student's layer.
      teacher: path of the teacher's layer.
    """
    return _on_relations(losses.rkd_angle, student, teacher)


def correlation_congruence(
    student: str, teacher: str, *, gamma: Weight = 0.4, order: int = 2, variant: str = 'kernel'
) -> Objective:
    """`losses.correlation_congruence` between two layers. Published weight: 0.02.

    Args:
      student: path of the student's layer.
      teacher: path of the teacher's layer.
      gamma: as in the loss; a number or a schedule.
      order: as in the loss.
      variant: as in the loss; `'adjacent'` needs layers of one width.
    """
    return _on_relations(losses.correlation_congruence, student, teacher, gamma=gamma, order=order, variant=variant)


def instance_graph(student: Sequence[str], teacher: Sequence[str], **hyperparameters: Weight) -> Objective:
    """`losses.instance_graph` of the logits and of layers of both networks, from input to output.

    Args:
      student: paths of the student's layers.
      teacher: paths of as many of the teacher's.
      **hyperparameters: weights of the graph's parts, as in the loss; numbers or schedules.
    """
    features = feature_pairs('instance_graph', student, teacher)

    def loss(student: Outputs, teacher: Outputs, batch: Batch, **resolved: Any) -> jax.Array:
        logits = [require_logits('instance_graph', side, x) for side, x in (('student', student), ('teacher', teacher))]
        return losses.instance_graph(*logits, *features(student, teacher), where=kept_examples(batch), **resolved)

    return from_function('instance_graph', loss, **hyperparameters)


def _on_relations(loss: Callable[..., jax.Array], student: str, teacher: str, **hyperparameters: Any) -> Objective:
    features = feature_pair(loss.__name__, student, teacher)

    def function(student: Outputs, teacher: Outputs, batch: Batch, **resolved: Any) -> jax.Array:
        return loss(*features(student, teacher), where=kept_examples(batch), **resolved)

    return from_function(loss.__name__, function, **hyperparameters)
