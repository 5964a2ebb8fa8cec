"""Recipes for what the channels of a layer, or of the classes, have in common."""

import functools
import operator

from kdjax import objectives
from kdjax.objectives import Objective
from kdjax.recipes._pair import Pair, on_layers


@on_layers
def pearson_features(pair: Pair) -> Objective:
    """PKD (Cao 2022): hard labels + 6 · standardized maps of every stage, as of every level of a detector's pyramid."""
    stages = zip(pair.student[::-1], pair.teacher[::-1], strict=False)
    maps = functools.reduce(operator.add, (objectives.pearson_features(*paths) for paths in stages))
    return objectives.combine(hard=objectives.hard_labels(), maps=6.0 * maps)
