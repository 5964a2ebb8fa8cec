"""Objectives on features, with the connectors that the papers train."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kdjax import losses
from kdjax.batches import Batch
from kdjax.metrics import Mean
from kdjax.networks import Outputs
from kdjax.objectives.connectors import Regressor, apply_connector, init_connector
from kdjax.objectives.objective import Objective, Term, Weight, batch_mean, example_mask, from_function, require_feature


def hint(student: str, teacher: str, *, normalize: bool = False) -> Objective:
    """`losses.hint` between a layer of the teacher and a trained regression from a layer of the student.

    Its parameters are those of `connectors.Regressor`. Published weight: 100.

    Args:
      student: path of the student's layer, one of the features that the student's network was made with.
      teacher: path of the teacher's.
      normalize: whether batch norm and ReLU follow the regressor's convolution, for layers that end in a ReLU.
    """

    def module(teacher_feature: Any) -> Regressor:
        return Regressor(tuple(teacher_feature.shape), normalize)

    features = _pair('hint', student, teacher)

    def init(key: jax.Array, student: Outputs, teacher: Outputs, batch: Batch) -> tuple[Any, Any]:
        del batch
        source, target = features(student, teacher)
        return init_connector(module(target), key, source), {}

    def apply(
        params: Any, state: Any, student: Outputs, teacher: Outputs, batch: Batch, *, step: jax.Array
    ) -> tuple[Mean, dict[str, Mean], Any]:
        del step
        source, target = features(student, teacher)
        mask = example_mask(batch, target.shape) if 'mask' in batch else None
        if mask is not None:
            # Statistics of no examples would be NaN; the loss of such a batch is 0 whatever they are.
            mask = mask | ~jnp.any(mask)
        regressed = apply_connector(module(target), params, source, mask=mask)
        return batch_mean(losses.hint(regressed, jax.lax.stop_gradient(target)), batch), {}, state

    return Objective((Term('hint', init, apply),))


def attention_transfer(student: str, teacher: str, *, power: float = 2, variant: str = 'mean_square') -> Objective:
    """`losses.attention_transfer` between a layer of the student and one of the teacher.

    Published weight: 1000, summed over the stages.

    Args:
      student: path of the student's layer.
      teacher: path of the teacher's layer.
      power: as in the loss.
      variant: as in the loss.
    """
    return _on_features(losses.attention_transfer, student, teacher, power=power, variant=variant)


def similarity_preserving(student: str, teacher: str) -> Objective:
    """`losses.similarity_preserving` between a layer of the student and one of the teacher. Published weight: 3000.

    Args:
      student: path of the student's layer.
      teacher: path of the teacher's layer.
    """
    features = _pair('similarity_preserving', student, teacher)

    def loss(student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        return losses.similarity_preserving(*features(student, teacher), where=batch.get('mask'))

    return from_function('similarity_preserving', loss)


def _on_features(loss: Callable[..., jax.Array], student: str, teacher: str, **hyperparameters: Weight | str) -> Objective:
    features = _pair(loss.__name__, student, teacher)

    def function(student: Outputs, teacher: Outputs, batch: Batch, **resolved: Any) -> jax.Array:
        del batch
        return loss(*features(student, teacher), **resolved)

    return from_function(loss.__name__, function, **hyperparameters)


def _pair(term: str, student_path: str, teacher_path: str) -> Callable[[Outputs, Outputs], tuple[Any, Any]]:
    """The function that picks the two features which a term compares."""

    def features(student: Outputs, teacher: Outputs) -> tuple[Any, Any]:
        return (
            require_feature(term, 'student', student, student_path),
            require_feature(term, 'teacher', teacher, teacher_path),
        )

    return features
