"""Recipes: an objective with the weights that its paper, or the tables that compare methods, published.

Weights are those of the CIFAR-100 protocol where it has any. Each recipe is a function of the pair, since methods on features
need to know which layers there are, and warm-ups and stages how long an epoch is.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.architectures import Architecture
from kdjax import objectives
from kdjax.objectives import Objective

# Of the epochs, the share of a first stage in methods that train in two.
FIRST_STAGE = 0.2


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

    @classmethod
    def of(cls, student: Architecture, teacher: Architecture, steps_per_epoch: int, epochs: int, labels: Any) -> 'Pair':
        """The pair of two architectures."""
        return cls(student.stages, teacher.stages, steps_per_epoch, epochs, student.norms, teacher.norms, labels)


Recipe = Callable[[Pair], Objective]


def soft_targets(pair: Pair) -> Objective:
    """Hinton 2015: 0.1 · hard labels + 0.9 · soft targets at temperature 4."""
    del pair
    return objectives.combine(hard=0.1 * objectives.hard_labels(), soft=0.9 * objectives.soft_targets(temperature=4.0))


def logit_mse(pair: Pair) -> Objective:
    """Ba & Caruana 2014: 0.1 · hard labels + 0.9 · squared difference of logits."""
    del pair
    return objectives.combine(hard=0.1 * objectives.hard_labels(), soft=0.9 * objectives.logit_mse())


def hard_targets(pair: Pair) -> Objective:
    """Touvron 2021: half hard labels, half the teacher's choices."""
    del pair
    return objectives.combine(hard=0.5 * objectives.hard_labels(), choices=0.5 * objectives.hard_targets())


def standardized_logits(pair: Pair) -> Objective:
    """Sun 2024: 0.1 · hard labels + 9 · soft targets of standardized logits at temperature 2."""
    del pair
    soft = objectives.standardize_logits(objectives.soft_targets(temperature=2.0))
    return objectives.combine(hard=0.1 * objectives.hard_labels(), soft=9.0 * soft)


def reverse_kl(pair: Pair) -> Objective:
    """Gu 2024: hard labels + reverse divergence. The paper is about language models; the weight is ours."""
    del pair
    return objectives.combine(hard=objectives.hard_labels(), reverse=objectives.reverse_kl())


def jensen_shannon(pair: Pair) -> Objective:
    """Agarwal 2024: hard labels + the divergence half way. The paper is about language models; the weight is ours."""
    del pair
    return objectives.combine(hard=objectives.hard_labels(), between=objectives.jensen_shannon())


def skewed_kl(pair: Pair) -> Objective:
    """Ko 2024: hard labels + skewed divergence. The paper is about language models; the weight is ours."""
    del pair
    return objectives.combine(hard=objectives.hard_labels(), skewed=objectives.skewed_kl())


def decoupled_kd(pair: Pair) -> Objective:
    """Zhao 2022: hard labels + DKD with α = 1, β = 8, T = 4, warmed up over 20 epochs of 240."""
    return objectives.combine(hard=objectives.hard_labels(), dkd=_warm_up(pair) * objectives.decoupled_kd())


def normalized_kd(pair: Pair) -> Objective:
    """Yang 2023: hard labels + NKD with γ = 1.5, T = 1."""
    del pair
    return objectives.combine(hard=objectives.hard_labels(), nkd=objectives.normalized_kd())


def weighted_soft_labels(pair: Pair) -> Objective:
    """Zhou 2021: hard labels + 2.25 · weighted soft labels at temperature 2."""
    del pair
    return objectives.combine(hard=objectives.hard_labels(), weighted=2.25 * objectives.weighted_soft_labels())


def dist(pair: Pair) -> Objective:
    """Huang 2022: hard labels + DIST with β = γ = 2, T = 4."""
    del pair
    return objectives.combine(hard=objectives.hard_labels(), dist=objectives.dist(beta=2.0, gamma=2.0, temperature=4.0))


def hint(pair: Pair) -> Objective:
    """Romero 2015: hard labels + 100 · hint between the middle stages, in one stage."""
    return objectives.combine(hard=objectives.hard_labels(), hint=100.0 * _middle(pair))


def hint_in_two_stages(pair: Pair) -> Objective:
    """Romero 2015, as in the paper: the hint first, then the task."""
    return objectives.in_stages([_middle(pair), objectives.hard_labels()], [_first_stage(pair)])


def attention_transfer(pair: Pair) -> Objective:
    """Zagoruyko 2017: hard labels + 1000 · attention transfer at every stage."""
    return _at_every_stage(pair, 'attention', 1000.0, objectives.attention_transfer)


def fsp(pair: Pair) -> Objective:
    """Yim 2017: hard labels + 50 · FSP between successive stages. The paper trains FSP first; the tables train both at once."""
    flows = zip(
        zip(pair.student, pair.student[1:], strict=False), zip(pair.teacher, pair.teacher[1:], strict=False), strict=False
    )
    return objectives.combine(hard=objectives.hard_labels(), fsp=50.0 * sum(objectives.fsp(*flow) for flow in flows))


def nst(pair: Pair) -> Objective:
    """Huang & Wang 2017: hard labels + 50 · NST at every stage."""
    return _at_every_stage(pair, 'nst', 50.0, objectives.nst)


def vid(pair: Pair) -> Objective:
    """Ahn 2019: hard labels + VID at every stage."""
    return _at_every_stage(pair, 'vid', 1.0, objectives.vid)


def factor_transfer(pair: Pair) -> Objective:
    """Kim 2018: the paraphraser first, then hard labels + 200 · factor transfer at the last stage."""
    first = _first_stage(pair)
    factors = objectives.factor_transfer(pair.student[-1], pair.teacher[-1], pretraining=first)
    nothing = 0.0 * objectives.hard_labels()
    hard = objectives.in_stages([nothing, objectives.hard_labels()], [first])
    return objectives.combine(hard=hard, factors=200.0 * factors)


def factor_transfer_in_one_stage(pair: Pair) -> Objective:
    """Kim 2018, paraphraser and student at once."""
    factors = objectives.factor_transfer(pair.student[-1], pair.teacher[-1])
    return objectives.combine(hard=objectives.hard_labels(), factors=200.0 * factors)


def activation_boundary(pair: Pair) -> Objective:
    """Heo 2019: the boundaries of every stage first, then hard labels."""
    stages = _norms(pair, 'activation_boundary')
    boundaries = sum(0.5**i * objectives.activation_boundary(*paths) for i, paths in enumerate(stages))
    return objectives.in_stages([1e-3 * boundaries, objectives.hard_labels()], [_first_stage(pair)])


def overhaul(pair: Pair) -> Objective:
    """Heo 2019b: hard labels + 1e-3 · overhaul of every stage, half as much for each before the last."""
    stages = _norms(pair, 'overhaul')
    distance = sum(0.5**i * objectives.overhaul(*paths) for i, paths in enumerate(stages))
    return objectives.combine(hard=objectives.hard_labels(), overhaul=1e-3 * distance)


def hierarchical_context(pair: Pair) -> Objective:
    """Chen 2021: hard labels + knowledge review of all stages, warmed up over 20 epochs of 240."""
    count = min(len(pair.student), len(pair.teacher))
    review = objectives.hierarchical_context(pair.student[-count:], pair.teacher[-count:])
    return objectives.combine(hard=objectives.hard_labels(), review=_warm_up(pair) * review)


def masked_generation(pair: Pair) -> Objective:
    """Yang 2022: hard labels + masked generation of the last stage. The weight is ours: the paper's is for a sum."""
    generation = objectives.masked_generation(pair.student[-1], pair.teacher[-1])
    return objectives.combine(hard=objectives.hard_labels(), generation=generation)


def channel_wise(pair: Pair) -> Objective:
    """Shu 2021: hard labels + 3 · channel-wise divergence of the last stage at temperature 4, as for segmentation."""
    channels = objectives.channel_wise(pair.student[-1], pair.teacher[-1])
    return objectives.combine(hard=objectives.hard_labels(), channels=3.0 * channels)


def singular_vectors(pair: Pair) -> Objective:
    """Lee 2018: hard labels + singular vectors of every stage. The weight is ours."""
    return _at_every_stage(pair, 'vectors', 1.0, objectives.singular_vectors)


def loss_gradient_attention(pair: Pair) -> Objective:
    """Dhar 2019: hard labels + attention for the teacher's choice at the last stage. The weight is ours."""
    attention = objectives.loss_gradient_attention(pair.student[-1], pair.teacher[-1])
    return objectives.combine(hard=objectives.hard_labels(), attention=attention)


def jacobian(pair: Pair) -> Objective:
    """Czarnecki 2017: hard labels + derivatives by the inputs. The weight is ours."""
    del pair
    return objectives.combine(hard=objectives.hard_labels(), jacobian=objectives.jacobian())


def similarity_preserving(pair: Pair) -> Objective:
    """Tung 2019: hard labels + 3000 · similarity preserving at the last stage."""
    last = objectives.similarity_preserving(pair.student[-1], pair.teacher[-1])
    return objectives.combine(hard=objectives.hard_labels(), similarity=3000.0 * last)


def pkt(pair: Pair) -> Objective:
    """Passalis 2018: hard labels + 30000 · PKT at the last stage."""
    return objectives.combine(hard=objectives.hard_labels(), pkt=30000.0 * objectives.pkt(pair.student[-1], pair.teacher[-1]))


def rkd(pair: Pair) -> Objective:
    """Park 2019: hard labels + 25 · distances + 50 · angles at the last stage."""
    last = pair.student[-1], pair.teacher[-1]
    relations = 25.0 * objectives.rkd_distance(*last) + 50.0 * objectives.rkd_angle(*last)
    return objectives.combine(hard=objectives.hard_labels(), rkd=relations)


def correlation_congruence(pair: Pair) -> Objective:
    """Peng 2019: hard labels + 0.02 · correlation congruence at the last stage."""
    last = objectives.correlation_congruence(pair.student[-1], pair.teacher[-1])
    return objectives.combine(hard=objectives.hard_labels(), correlation=0.02 * last)


def instance_graph(pair: Pair) -> Objective:
    """Liu 2019: hard labels + 0.1 · the instance graph of the last two stages."""
    graph = objectives.instance_graph(pair.student[-2:], pair.teacher[-2:])
    return objectives.combine(hard=objectives.hard_labels(), graph=0.1 * graph)


def crd(pair: Pair) -> Objective:
    """Tian 2020: hard labels + 0.8 · CRD at the last stage, with 16384 negatives or as many as there are examples."""
    contrast = objectives.crd(pair.student[-1], pair.teacher[-1], pair.labels, negatives=min(16384, len(pair.labels)))
    return objectives.combine(hard=objectives.hard_labels(), crd=0.8 * contrast)


def info_nce(pair: Pair) -> Objective:
    """Oord 2018: hard labels + contrast within the batch at the last stage. The weight is ours."""
    contrast = objectives.info_nce(pair.student[-1], pair.teacher[-1])
    return objectives.combine(hard=objectives.hard_labels(), contrast=contrast)


def attention_distillation(pair: Pair) -> Objective:
    """Hard labels + attention-weighted differences of every stage. The weight is ours."""
    return _at_every_stage(pair, 'attention', 100.0, objectives.attention_distillation)


def diversity(pair: Pair) -> Objective:
    """Hard labels + 0.01 · confident and diverse predictions, which need no teacher. The weight is ours."""
    del pair
    return objectives.combine(hard=objectives.hard_labels(), diversity=0.01 * objectives.diversity())


def hidden_cosine(pair: Pair) -> Objective:
    """Sanh 2019: hard labels + the cosine of hidden states at every layer."""
    return _over_layers(pair, 'hidden', 1.0, objectives.hidden_cosine, '')


def attention_maps(pair: Pair) -> Objective:
    """Jiao 2020: hard labels + squared differences of attention scores at every layer."""
    return _over_layers(pair, 'attention', 1.0, objectives.attention_maps, '/attention/scores')


def value_relations(pair: Pair) -> Objective:
    """Wang 2020: hard labels + divergence of attention and of value relations at the last layer."""
    layers = f'{pair.student[-1]}/attention', f'{pair.teacher[-1]}/attention'
    attention = objectives.attention_maps(*(f'{layer}/scores' for layer in layers), variant='kl')
    values = objectives.value_relations(*(f'{layer}/values' for layer in layers))
    return objectives.combine(hard=objectives.hard_labels(), relations=attention + values)


def _middle(pair: Pair) -> Objective:
    return objectives.hint(pair.student[len(pair.student) // 2], pair.teacher[len(pair.teacher) // 2])


def _at_every_stage(pair: Pair, name: str, weight: float, method: Callable[[str, str], Objective]) -> Objective:
    stages = zip(pair.student[::-1], pair.teacher[::-1], strict=False)
    terms = sum(method(student, teacher) for student, teacher in stages)
    return objectives.combine(hard=objectives.hard_labels(), **{name: weight * terms})


def _over_layers(pair: Pair, name: str, weight: float, method: Callable[[str, str], Objective], tap: str) -> Objective:
    layers = objectives.uniform_layers([path + tap for path in pair.student], [path + tap for path in pair.teacher])
    return objectives.combine(hard=objectives.hard_labels(), **{name: weight * objectives.over_layers(method, layers)})


def _norms(pair: Pair, recipe: str) -> list[tuple[str, str]]:
    norms = list(zip(pair.student_norms[::-1], pair.teacher_norms[::-1], strict=False))
    if not norms:
        raise ValueError(f'the recipe {recipe} needs networks with batch norm, such as resnet8 and resnet20')
    return norms


def _first_stage(pair: Pair) -> int:
    return max(1, round(FIRST_STAGE * pair.epochs * pair.steps_per_epoch))


def _warm_up(pair: Pair) -> Callable[[Any], jax.Array]:
    steps = max(1.0, 20 / 240 * pair.epochs * pair.steps_per_epoch)
    return lambda step: jnp.minimum(jnp.asarray(step, jnp.float32) / steps, 1.0)


RECIPES: dict[str, Recipe] = {
    recipe.__name__: recipe
    for recipe in (
        soft_targets,
        logit_mse,
        hard_targets,
        standardized_logits,
        reverse_kl,
        jensen_shannon,
        skewed_kl,
        decoupled_kd,
        normalized_kd,
        weighted_soft_labels,
        dist,
        hint,
        hint_in_two_stages,
        attention_transfer,
        fsp,
        nst,
        vid,
        factor_transfer,
        factor_transfer_in_one_stage,
        activation_boundary,
        overhaul,
        hierarchical_context,
        masked_generation,
        channel_wise,
        singular_vectors,
        loss_gradient_attention,
        jacobian,
        attention_distillation,
        diversity,
        similarity_preserving,
        pkt,
        rkd,
        correlation_congruence,
        instance_graph,
        crd,
        info_nce,
    )
}
"""For any pair of image classifiers."""

TRANSFORMER_RECIPES: dict[str, Recipe] = {
    recipe.__name__: recipe for recipe in (soft_targets, hidden_cosine, attention_maps, value_relations)
}
"""For a pair of transformers whose stages are their blocks."""
