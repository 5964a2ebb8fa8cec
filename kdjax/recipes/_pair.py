"""What a recipe may need to know of two networks and of a run."""

import functools
import re
from collections.abc import Callable
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
      student_preacts: paths of what the student's stages are before their last ReLU, with the shortcut added.
      teacher_preacts: those of the teacher.
      student_pooled: path of the student's embedding [batch, channels], before the head.
      teacher_pooled: that of the teacher.
    """

    student: tuple[str, ...]
    teacher: tuple[str, ...]
    steps_per_epoch: int
    epochs: int = 240
    student_norms: tuple[str, ...] = ()
    teacher_norms: tuple[str, ...] = ()
    labels: Any = None
    student_preacts: tuple[str, ...] = ()
    teacher_preacts: tuple[str, ...] = ()
    student_pooled: str | None = None
    teacher_pooled: str | None = None


Recipe = Callable[[Pair], Objective]
"""Makes the objective for a pair."""


def pair(
    student: Network, teacher: Network, inputs: Any, *, steps_per_epoch: int, epochs: int = 240, labels: Any = None
) -> Pair:
    """What two networks tell of themselves, by the features that they tap.

    Stages are the tapped features whose names end in a number, in rising order, as the modules of `kdjax.models` name theirs:
    `stage1`, `hidden0`, `block3`. What is tapped below a stage is none: `stage1/preact` is what it was before its last ReLU,
    and names that begin with `norm` are batch norms. `pooled` is the embedding before the head. For networks that name their
    layers in other ways, make the `Pair` by hand.

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
    learns, teaches = (_layers(network, inputs) for network in (student, teacher))
    return Pair(
        student=learns.stages,
        teacher=teaches.stages,
        steps_per_epoch=steps_per_epoch,
        epochs=epochs,
        student_norms=learns.norms,
        teacher_norms=teaches.norms,
        labels=labels,
        student_preacts=learns.preacts,
        teacher_preacts=teaches.preacts,
        student_pooled=learns.pooled,
        teacher_pooled=teaches.pooled,
    )


class _Layers(NamedTuple):
    """What a network taps: stages, and of each its norm and what it is before its last ReLU; and the embedding."""

    stages: tuple[str, ...]
    norms: tuple[str, ...]
    preacts: tuple[str, ...]
    pooled: str | None


def _layers(network: Network, inputs: Any) -> _Layers:

    def features(inputs: Any) -> Any:
        return network.apply(network.init(jax.random.key(0), inputs), inputs)[0].features

    names = sorted(jax.eval_shape(features, inputs), key=lambda name: [_natural(part) for part in name.split('/')])
    top = [name for name in names if not any(name.startswith(f'{other}/') for other in names)]
    stages = tuple(name for name in top if re.search(r'[0-9]$', name))
    below = [name for name in names if name.startswith(tuple(f'{stage}/' for stage in stages))]
    norms = tuple(name for name in below if re.fullmatch(r'norm[0-9]*', name.rsplit('/', 1)[-1]))
    preacts = tuple(name for name in below if name.removesuffix('/preact') in stages)
    return _Layers(stages, norms, preacts, 'pooled' if 'pooled' in names else None)


def _natural(part: str) -> tuple[str, int]:
    """By which 'stage10' comes after 'stage9'."""
    number = re.search(r'[0-9]+$', part)
    return (part, -1) if number is None else (part[: number.start()], int(number[0]))


def on_layers(recipe: Recipe) -> Recipe:
    """A recipe that says what is missing where a network taps no stage."""
    return _needing(recipe, 'student', 'teacher', what='layers', taps="'stage1', 'stage2', 'stage3'")


def on_preacts(recipe: Recipe) -> Recipe:
    """A recipe that says what is missing where a network taps nothing before a ReLU."""
    taps = "'stage1', 'stage1/preact', 'stage2', 'stage2/preact'"
    return _needing(recipe, 'student_preacts', 'teacher_preacts', what='stages before their last ReLU', taps=taps)


def on_embeddings(recipe: Recipe) -> Recipe:
    """A recipe that says what is missing where a network does not tap its embedding."""
    return _needing(recipe, 'student_pooled', 'teacher_pooled', what='embeddings', taps="'pooled'")


def embeddings(pair: Pair) -> tuple[str, str]:
    """The paths of both, in a recipe that is `on_embeddings`."""
    return pair.student_pooled or '', pair.teacher_pooled or ''


def _needing(recipe: Recipe, *fields: str, what: str, taps: str) -> Recipe:
    @functools.wraps(recipe)
    def checked(pair: Pair) -> Objective:
        for field in fields:
            if not getattr(pair, field):
                raise ValueError(
                    f'the recipe {recipe.__name__} compares {what}, and the {field.split("_")[0]} taps none: '
                    f'networks.from_linen(module, features=[{taps}]), or the names that it has'
                )
        return recipe(pair)

    return checked


def over_epochs(pair: Pair, *, begin: float = 0.0, end: float = 20 / 240) -> Callable[[Any], jax.Array]:
    """A weight that grows from 0 to 1 between two shares of the epochs, by default the first 20 of the published 240.

    A schedule of the step, for `over_epochs(pair) * objective`: min(epoch / 20, 1) of DKD and ReviewKD, which here grows within
    an epoch too, and is shorter where there are fewer epochs.

    Args:
      pair: of which the epochs and their steps count.
      begin: the share of all epochs until which the weight is 0.
      end: the share from which it is 1, greater than `begin`; if they are less than a step apart, the weight takes a step.

    Raises:
      ValueError: these are no shares, or not in order.

    >>> weight = over_epochs(Pair((), (), steps_per_epoch=10, epochs=240))
    >>> print([float(weight(step)) for step in (0, 50, 100, 200, 2400)])
    [0.0, 0.25, 0.5, 1.0, 1.0]
    """
    if not 0 <= begin < end <= 1:
        raise ValueError(f'over_epochs: begin and end must be shares of the epochs with begin below end, got {begin} and {end}')
    total = pair.epochs * pair.steps_per_epoch
    steps = max(1.0, (end - begin) * total)
    return lambda step: jnp.clip((jnp.asarray(step, jnp.float32) - begin * total) / steps, 0.0, 1.0)
