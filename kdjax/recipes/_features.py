"""Recipes for layers, with the connectors that their papers train."""

import functools
import operator
from collections.abc import Callable, Iterable

from kdjax import objectives
from kdjax.objectives import Objective
from kdjax.recipes._pair import Pair, embeddings, on_embeddings, on_layers, on_preacts, over_epochs

# Of the epochs, the share of a first stage in methods that train in two.
FIRST_STAGE = 0.2


@on_layers
def hint(pair: Pair) -> Objective:
    """FitNets (Romero 2015): hard labels + 100 · hint between the middle stages, in one stage.

    The weight is that of a regressor with batch norm and ReLU, as published code has it.
    """
    return objectives.combine(hard=objectives.hard_labels(), hint=100.0 * _middle(pair, normalize=True))


@on_layers
def hint_in_two_stages(pair: Pair) -> Objective:
    """FitNets (Romero 2015), as in the paper: the hint first, then the task."""
    return objectives.in_stages([_middle(pair), objectives.hard_labels()], [_first_stage(pair)])


@on_layers
def attention_transfer(pair: Pair) -> Objective:
    """AT (Zagoruyko 2017): hard labels + 1000 · attention transfer at every stage."""
    return _at_every_stage(pair, 'attention', 1000.0, objectives.attention_transfer)


@on_layers
def fsp(pair: Pair) -> Objective:
    """FSP (Yim 2017): hard labels + 50 · FSP between successive stages, both at once.

    The paper trains the flows first and then the task alone, and so does the code behind published tables, which never applies
    the weight 50 that its commands give.
    """
    flows = zip(
        zip(pair.student, pair.student[1:], strict=False), zip(pair.teacher, pair.teacher[1:], strict=False), strict=False
    )
    return objectives.combine(hard=objectives.hard_labels(), fsp=50.0 * _sum(objectives.fsp(*flow) for flow in flows))


@on_layers
def nst(pair: Pair) -> Objective:
    """NST (Huang & Wang 2017): hard labels + 50 · NST at every stage."""
    return _at_every_stage(pair, 'nst', 50.0, objectives.nst)


@on_layers
def vid(pair: Pair) -> Objective:
    """VID (Ahn 2019): hard labels + VID at every stage."""
    return _at_every_stage(pair, 'vid', 1.0, objectives.vid)


@on_layers
def factor_transfer(pair: Pair) -> Objective:
    """FT (Kim 2018), as its authors: the paraphraser first, then hard labels + 500 · factor transfer at the last stage."""
    first = _first_stage(pair)
    factors = objectives.factor_transfer(pair.student[-1], pair.teacher[-1], pretraining=first)
    nothing = 0.0 * objectives.hard_labels()
    hard = objectives.in_stages([nothing, objectives.hard_labels()], [first])
    return objectives.combine(hard=hard, factors=500.0 * factors)


@on_layers
def factor_transfer_in_one_stage(pair: Pair) -> Objective:
    """FT (Kim 2018), as in the tables: hard labels + 200 · attention maps of factors; the paraphraser learns beside."""
    factors = objectives.factor_transfer(pair.student[-1], pair.teacher[-1], variant='attention')
    return objectives.combine(hard=objectives.hard_labels(), factors=200.0 * factors)


@on_preacts
def activation_boundary(pair: Pair) -> Objective:
    """AB (Heo 2019): the boundaries of every stage before its last ReLU first, then hard labels."""
    stages = zip(pair.student_preacts[::-1], pair.teacher_preacts[::-1], strict=False)
    boundaries = _sum(0.5**i * objectives.activation_boundary(*paths) for i, paths in enumerate(stages))
    return objectives.in_stages([1e-3 * boundaries, objectives.hard_labels()], [_first_stage(pair)])


@on_preacts
def overhaul(pair: Pair) -> Objective:
    """OFD (Heo 2019b): hard labels + 1e-3 · overhaul of every stage before its last ReLU, half as much for each before it."""
    if len(pair.teacher_norms) < len(pair.teacher_preacts):
        raise ValueError('the recipe overhaul needs a teacher whose stages end in batch norms that it taps, such as resnet20')
    stages = zip(pair.student_preacts[::-1], pair.teacher_preacts[::-1], pair.teacher_norms[::-1], strict=False)
    distance = _sum(0.5**i * objectives.overhaul(*paths, norm=norm) for i, (*paths, norm) in enumerate(stages))
    return objectives.combine(hard=objectives.hard_labels(), overhaul=1e-3 * distance)


@on_layers
@on_embeddings
def hierarchical_context(pair: Pair) -> Objective:
    """ReviewKD (Chen 2021): hard labels + knowledge review of all stages and the embedding, warmed up over 20 epochs of 240.

    Published code takes the teacher's stages before their last ReLU; here both networks' are those after it.
    """
    count = min(len(pair.student), len(pair.teacher))
    stages = zip((pair.student, pair.teacher), embeddings(pair), strict=True)
    review = objectives.hierarchical_context(*((*paths[-count:], pooled) for paths, pooled in stages))
    return objectives.combine(hard=objectives.hard_labels(), review=over_epochs(pair) * review)


@on_layers
def masked_generation(pair: Pair) -> Objective:
    """MGD (Yang 2022): hard labels + 0.3 · generation of the last stage, 15 % of its channels masked.

    The published weight, 7e-5, is that of a sum: over 8 x 8 positions of 64 channels it is 0.29 of our mean.
    """
    generation = objectives.masked_generation(pair.student[-1], pair.teacher[-1], masked='channels')
    return objectives.combine(hard=objectives.hard_labels(), generation=0.3 * generation)


@on_layers
def channel_wise(pair: Pair) -> Objective:
    """CWD (Shu 2021): hard labels + 3 · channel-wise divergence of the last stage at temperature 4, as for segmentation."""
    channels = objectives.channel_wise(pair.student[-1], pair.teacher[-1])
    return objectives.combine(hard=objectives.hard_labels(), channels=3.0 * channels)


@on_layers
def singular_vectors(pair: Pair) -> Objective:
    """KDSVD (Lee 2018): hard labels + singular vectors of every stage. The weight is ours."""
    return _at_every_stage(pair, 'vectors', 1.0, objectives.singular_vectors)


@on_layers
def attention_distillation(pair: Pair) -> Objective:
    """Hard labels + attention-weighted differences of every stage. The weight is ours."""
    return _at_every_stage(pair, 'attention', 10.0, objectives.attention_distillation)


@on_layers
def loss_gradient_attention(pair: Pair) -> Objective:
    """LwM (Dhar 2019): hard labels + attention for the teacher's choice at the last stage. The weight is ours."""
    attention = objectives.loss_gradient_attention(pair.student[-1], pair.teacher[-1])
    return objectives.combine(hard=objectives.hard_labels(), attention=attention)


def jacobian(pair: Pair) -> Objective:
    """Sobolev (Czarnecki 2017): hard labels + derivatives by the inputs. The weight is ours."""
    del pair
    return objectives.combine(hard=objectives.hard_labels(), jacobian=objectives.jacobian())


def _middle(pair: Pair, *, normalize: bool = False) -> Objective:
    student, teacher = (stages[len(stages) // 2] for stages in (pair.student, pair.teacher))
    return objectives.hint(student, teacher, normalize=normalize)


def _at_every_stage(pair: Pair, name: str, weight: float, method: Callable[[str, str], Objective]) -> Objective:
    stages = zip(pair.student[::-1], pair.teacher[::-1], strict=False)
    terms = _sum(method(student, teacher) for student, teacher in stages)
    return objectives.combine(hard=objectives.hard_labels(), **{name: weight * terms})


def _sum(terms: Iterable[Objective]) -> Objective:
    """Unlike `sum`, whose type allows for 0, the sum of nothing."""
    return functools.reduce(operator.add, terms)


def _first_stage(pair: Pair) -> int:
    return max(1, round(FIRST_STAGE * pair.epochs * pair.steps_per_epoch))
