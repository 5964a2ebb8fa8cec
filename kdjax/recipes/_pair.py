"""What a recipe may need to know of two networks and of a run."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kdjax.objectives import Objective


class Pair(NamedTuple):
    """What a recipe may need to know.

    Attributes:
      student: paths of the student's stages, from input to output.
      teacher: paths of the teacher's.
      steps_per_epoch: training steps in an epoch.
      epochs: of training.
      student_norms: paths of the batch norms whose outputs enter the stages' last ReLUs.
      teacher_norms: those of the teacher.
      labels: of all training examples, in the order of `batch['index']`.
    """

    student: tuple[str, ...]
    teacher: tuple[str, ...]
    steps_per_epoch: int
    epochs: int = 240
    student_norms: tuple[str, ...] = ()
    teacher_norms: tuple[str, ...] = ()
    labels: Any = None


Recipe = Callable[[Pair], Objective]
"""Makes the objective for a pair."""


def warm_up(pair: Pair) -> Callable[[Any], jax.Array]:
    """A weight that grows from 0 to 1 over the first twelfth of the epochs, 20 of the published 240."""
    steps = max(1.0, 20 / 240 * pair.epochs * pair.steps_per_epoch)
    return lambda step: jnp.minimum(jnp.asarray(step, jnp.float32) / steps, 1.0)
