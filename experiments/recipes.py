"""Recipes: an objective with the weights that its paper, or the tables that compare methods, published.

Weights are those of the CIFAR-100 protocol. Each recipe is a function of the pair, since methods on features need to know
which layers there are, and warm-ups how long an epoch is.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from kdjax import objectives
from kdjax.objectives import Objective


class Pair(NamedTuple):
    """What a recipe may need to know.

    Attributes:
      student: paths of the student's stages, from input to output.
      teacher: paths of the teacher's.
      steps_per_epoch: training steps in an epoch.
    """

    student: tuple[str, ...]
    teacher: tuple[str, ...]
    steps_per_epoch: int


Recipe = Callable[[Pair], Objective]


def soft_targets(pair: Pair) -> Objective:
    """Hinton 2015: 0.1 · hard labels + 0.9 · soft targets at temperature 4."""
    del pair
    return objectives.combine(hard=0.1 * objectives.hard_labels(), soft=0.9 * objectives.soft_targets(temperature=4.0))


def logit_mse(pair: Pair) -> Objective:
    """Ba & Caruana 2014: 0.1 · hard labels + 0.9 · squared difference of logits."""
    del pair
    return objectives.combine(hard=0.1 * objectives.hard_labels(), soft=0.9 * objectives.logit_mse())


def decoupled_kd(pair: Pair) -> Objective:
    """Zhao 2022: hard labels + DKD with α = 1, β = 8, T = 4, warmed up over 20 epochs."""

    def warm_up(step: int) -> float:
        return jnp.minimum(jnp.asarray(step, jnp.float32) / (20 * pair.steps_per_epoch), 1.0)

    return objectives.combine(hard=objectives.hard_labels(), dkd=warm_up * objectives.decoupled_kd())


def hint(pair: Pair) -> Objective:
    """Romero 2015: hard labels + 100 · hint between the middle stages, in one stage."""
    middle = objectives.hint(pair.student[len(pair.student) // 2], pair.teacher[len(pair.teacher) // 2])
    return objectives.combine(hard=objectives.hard_labels(), hint=100.0 * middle)


def attention_transfer(pair: Pair) -> Objective:
    """Zagoruyko 2017: hard labels + 1000 · attention transfer at every stage."""
    stages = zip(pair.student[::-1], pair.teacher[::-1], strict=False)
    return objectives.combine(
        hard=objectives.hard_labels(),
        attention=1000.0 * sum(objectives.attention_transfer(student, teacher) for student, teacher in stages),
    )


def similarity_preserving(pair: Pair) -> Objective:
    """Tung 2019: hard labels + 3000 · similarity preserving at the last stage."""
    last = objectives.similarity_preserving(pair.student[-1], pair.teacher[-1])
    return objectives.combine(hard=objectives.hard_labels(), similarity=3000.0 * last)


RECIPES: dict[str, Recipe] = {
    recipe.__name__: recipe
    for recipe in (soft_targets, logit_mse, decoupled_kd, hint, attention_transfer, similarity_preserving)
}
