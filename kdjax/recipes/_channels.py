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


@on_layers
def inter_channel(pair: Pair) -> Objective:
    """ICKD (Liu 2021): hard labels + 2.5 · normalized products of the channels of the last stage."""
    channels = objectives.inter_channel(pair.student[-1], pair.teacher[-1], variant='normalized')
    return objectives.combine(hard=objectives.hard_labels(), channels=2.5 * channels)
