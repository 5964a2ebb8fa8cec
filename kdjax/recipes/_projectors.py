"""Recipes for what a student's layers become behind projectors that know the teacher."""

import functools
import operator

from kdjax import objectives
from kdjax.objectives import Objective
from kdjax.recipes._pair import Pair, on_embeddings, on_layers


@on_embeddings
def srd(pair: Pair) -> Objective:
    """SRD (Miles 2024): hard labels + soft targets at T = 1 + 2 · logarithm of differences of the embeddings."""
    embeddings = objectives.srd(pair.student_pooled or '', pair.teacher_pooled or '')
    soft = objectives.soft_targets(temperature=1.0)
    return objectives.combine(hard=objectives.hard_labels(), soft=soft, embeddings=2.0 * embeddings)


@on_embeddings
def dist_plus(pair: Pair) -> Objective:
    """DIST+ (Huang 2025): hard labels + DIST with β = γ = 2, T = 4, and as much of the embeddings. Their weight is ours."""
    both = objectives.dist_plus(
        pair.student_pooled or '', pair.teacher_pooled or '', beta=2.0, gamma=2.0, feature=1.0, temperature=4.0
    )
    return objectives.combine(hard=objectives.hard_labels(), relations=both)


@on_layers
def semckd(pair: Pair) -> Objective:
    """SemCKD (Chen 2021): hard labels + soft targets at T = 4 + 400 · attended distances of all pairs of stages."""
    layers = objectives.semckd(pair.student, pair.teacher)
    return objectives.combine(
        hard=objectives.hard_labels(), soft=objectives.soft_targets(temperature=4.0), layers=400.0 * layers
    )


@on_layers
def fbkd(pair: Pair) -> Objective:
    """FBKD (Zhang 2021): hard labels + attention-guided and non-local distances of every stage, as of a detector's pyramid."""
    stages = zip(pair.student[::-1], pair.teacher[::-1], strict=False)
    distances = functools.reduce(operator.add, (objectives.fbkd(*paths) for paths in stages))
    return objectives.combine(hard=objectives.hard_labels(), distances=distances)
