"""What a recipe may need to know of two networks and of a run."""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kdjax.networks import Network
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


def pair(
    student: Network, teacher: Network, inputs: Any, *, steps_per_epoch: int, epochs: int = 240, labels: Any = None
) -> Pair:
    """What two networks tell of themselves, by the features that they tap.

    Stages are the tapped features whose names end in a number, in rising order, as the modules of `kdjax.models` name theirs:
    `stage1`, `hidden0`, `block3`. What is tapped below a stage is none; batch norms are, whose names begin with `norm`. For
    networks that name their layers in other ways, make the `Pair` by hand.

    Args:
      student: the student, with features.
      teacher: the teacher.
      inputs: a batch of inputs, of which only the shapes count.
      steps_per_epoch: training steps in an epoch.
      epochs: of training.
      labels: of all training examples, in the order of `batch['index']`.

    >>> import jax, jax.numpy as jnp
    >>> from kdjax import models, networks
    >>> stages = ('stage0', 'stage1')
    >>> small, large = (networks.from_linen(models.CNN(widths, (8,)), features=stages) for widths in ((4, 8), (8, 16)))
    >>> pair(small, large, jnp.ones((2, 8, 8, 1)), steps_per_epoch=10).student
    ('stage0', 'stage1')
    """
    (stages, norms), (of_teacher, teacher_norms) = (_layers(network, inputs) for network in (student, teacher))
    return Pair(stages, of_teacher, steps_per_epoch, epochs, norms, teacher_norms, labels)


def _layers(network: Network, inputs: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of the stages that a network taps, and of the batch norms below them."""

    def features(inputs: Any) -> Any:
        return network.apply(network.init(jax.random.key(0), inputs), inputs)[0].features

    names = sorted(jax.eval_shape(features, inputs), key=lambda name: [_natural(part) for part in name.split('/')])
    top = [name for name in names if not any(name.startswith(f'{other}/') for other in names)]
    stages = tuple(name for name in top if re.search(r'[0-9]$', name))
    below = [name for name in names if name.startswith(tuple(f'{stage}/' for stage in stages))]
    return stages, tuple(name for name in below if re.fullmatch(r'norm[0-9]*', name.rsplit('/', 1)[-1]))


def _natural(part: str) -> tuple[str, int]:
    """By which 'stage10' comes after 'stage9'."""
    number = re.search(r'[0-9]+$', part)
    return (part, -1) if number is None else (part[: number.start()], int(number[0]))


def on_layers(recipe: Recipe) -> Recipe:
    """A recipe that says what is missing where a network taps no stage."""

    @functools.wraps(recipe)
    def checked(pair: Pair) -> Objective:
        for side, stages in (('student', pair.student), ('teacher', pair.teacher)):
            _check_stages(recipe.__name__, side, stages)
        return recipe(pair)

    return checked


def _check_stages(recipe: str, side: str, stages: Sequence[str]) -> None:
    if not stages:
        raise ValueError(
            f'the recipe {recipe} compares layers, and the {side} taps none: networks.from_linen(module, '
            "features=['stage1', 'stage2', 'stage3']), or the names that it has"
        )


def warm_up(pair: Pair) -> Callable[[Any], jax.Array]:
    """A weight that grows from 0 to 1 over the first twelfth of the epochs, 20 of the published 240."""
    steps = max(1.0, 20 / 240 * pair.epochs * pair.steps_per_epoch)
    return lambda step: jnp.minimum(jnp.asarray(step, jnp.float32) / steps, 1.0)
