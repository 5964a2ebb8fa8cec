"""Recipes for the relations between the examples of a batch, or of a memory."""

from kdjax import objectives
from kdjax.objectives import Objective
from kdjax.recipes._pair import Pair, embeddings, on_embeddings, on_layers


@on_layers
def similarity_preserving(pair: Pair) -> Objective:
    """SP (Tung 2019): hard labels + 3000 · similarity preserving at the last stage."""
    last = objectives.similarity_preserving(pair.student[-1], pair.teacher[-1])
    return objectives.combine(hard=objectives.hard_labels(), similarity=3000.0 * last)


@on_embeddings
def pkt(pair: Pair) -> Objective:
    """PKT (Passalis 2018): hard labels + 30000 · PKT of the embeddings."""
    return objectives.combine(hard=objectives.hard_labels(), pkt=30000.0 * objectives.pkt(*embeddings(pair)))


@on_embeddings
def rkd(pair: Pair) -> Objective:
    """RKD (Park 2019): hard labels + 25 · distances + 50 · angles of the embeddings."""
    relations = 25.0 * objectives.rkd_distance(*embeddings(pair)) + 50.0 * objectives.rkd_angle(*embeddings(pair))
    return objectives.combine(hard=objectives.hard_labels(), rkd=relations)


@on_embeddings
def correlation_congruence(pair: Pair) -> Objective:
    """CC (Peng 2019), as in the tables: hard labels + 0.02 · products of neighbours in trained embeddings of width 128."""
    congruence = objectives.correlation_congruence(*embeddings(pair), variant='adjacent', width=128)
    return objectives.combine(hard=objectives.hard_labels(), correlation=0.02 * congruence)


@on_embeddings
def correlation_congruence_of_kernels(pair: Pair) -> Objective:
    """CC (Peng 2019), as in the paper: hard labels + 100 · kernel matrices of the embeddings.

    The weight is that of Knowledge-Distillation-Zoo, which compares the pooled embeddings as they are: γ = 0.4, order 2.
    """
    congruence = objectives.correlation_congruence(*embeddings(pair))
    return objectives.combine(hard=objectives.hard_labels(), correlation=100.0 * congruence)


@on_layers
def instance_graph(pair: Pair) -> Objective:
    """IRG (Liu 2019): hard labels + 0.1 · the instance graph of the last two stages."""
    graph = objectives.instance_graph(pair.student[-2:], pair.teacher[-2:])
    return objectives.combine(hard=objectives.hard_labels(), graph=0.1 * graph)


@on_embeddings
def crd(pair: Pair) -> Objective:
    """CRD (Tian 2020): hard labels + 0.8 · CRD of the embeddings, with 16384 negatives or as many as there are examples."""
    contrast = objectives.crd(*embeddings(pair), pair.labels, negatives=min(16384, len(pair.labels)))
    return objectives.combine(hard=objectives.hard_labels(), crd=0.8 * contrast)


@on_embeddings
def info_nce(pair: Pair) -> Objective:
    """InfoNCE (Oord 2018): hard labels + contrast of the embeddings within the batch. The weight is ours."""
    contrast = objectives.info_nce(*embeddings(pair))
    return objectives.combine(hard=objectives.hard_labels(), contrast=contrast)
