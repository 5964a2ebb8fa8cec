"""Recipes for the relations between the examples of a batch, or of a memory."""

from kdjax import objectives
from kdjax.objectives import Objective
from kdjax.recipes._pair import Pair, on_layers


@on_layers
def similarity_preserving(pair: Pair) -> Objective:
    """SP (Tung 2019): hard labels + 3000 · similarity preserving at the last stage."""
    last = objectives.similarity_preserving(pair.student[-1], pair.teacher[-1])
    return objectives.combine(hard=objectives.hard_labels(), similarity=3000.0 * last)


@on_layers
def pkt(pair: Pair) -> Objective:
    """PKT (Passalis 2018): hard labels + 30000 · PKT at the last stage."""
    return objectives.combine(hard=objectives.hard_labels(), pkt=30000.0 * objectives.pkt(pair.student[-1], pair.teacher[-1]))


@on_layers
def rkd(pair: Pair) -> Objective:
    """RKD (Park 2019): hard labels + 25 · distances + 50 · angles at the last stage."""
    last = pair.student[-1], pair.teacher[-1]
    relations = 25.0 * objectives.rkd_distance(*last) + 50.0 * objectives.rkd_angle(*last)
    return objectives.combine(hard=objectives.hard_labels(), rkd=relations)


@on_layers
def correlation_congruence(pair: Pair) -> Objective:
    """CC (Peng 2019): hard labels + 0.02 · correlation congruence at the last stage."""
    last = objectives.correlation_congruence(pair.student[-1], pair.teacher[-1])
    return objectives.combine(hard=objectives.hard_labels(), correlation=0.02 * last)


@on_layers
def instance_graph(pair: Pair) -> Objective:
    """IRG (Liu 2019): hard labels + 0.1 · the instance graph of the last two stages."""
    graph = objectives.instance_graph(pair.student[-2:], pair.teacher[-2:])
    return objectives.combine(hard=objectives.hard_labels(), graph=0.1 * graph)


@on_layers
def crd(pair: Pair) -> Objective:
    """CRD (Tian 2020): hard labels + 0.8 · CRD at the last stage, with 16384 negatives or as many as there are examples."""
    contrast = objectives.crd(pair.student[-1], pair.teacher[-1], pair.labels, negatives=min(16384, len(pair.labels)))
    return objectives.combine(hard=objectives.hard_labels(), crd=0.8 * contrast)


@on_layers
def info_nce(pair: Pair) -> Objective:
    """InfoNCE (Oord 2018): hard labels + contrast within the batch at the last stage. The weight is ours."""
    contrast = objectives.info_nce(pair.student[-1], pair.teacher[-1])
    return objectives.combine(hard=objectives.hard_labels(), contrast=contrast)
