"""Objectives on a feature of each network that need a regressor at most: FitNets, AT, NST, KDSVD and CWD.

A feature is named by its path, one of those that its network was made with. Which student layer learns from which teacher layer
is data: `over_layers` sums a method over a mapping of paths.
"""

from typing import Literal

import flax.linen as nn
import jax

from kdjax import losses
from kdjax.objectives._connectors import Regressor
from kdjax.objectives._lifting import connected, on_features, where_shapes_differ
from kdjax.objectives._objective import Objective, Weight


def hint(student: str, teacher: str, *, normalize: bool = False) -> Objective:
    """FitNets: `losses.hint` between a layer of the teacher and a trained regression from a layer of the student.

    Its parameters are those of `connectors.Regressor`. The code behind published tables has batch norm and ReLU after the
    convolution, `normalize=True`: its weight 100, that of `kdjax.recipes.hint`, is for this regressor. The paper has no norm.
    As a stage of its own before the task, as in the paper: `in_stages([hint(...), hard_labels()], [steps])`.

    Args:
      student: path of the student's layer, one of the features that the student's network was made with.
      teacher: path of the teacher's.
      normalize: whether batch norm and ReLU follow the regressor's convolution, for layers that end in a ReLU.
    """

    def loss(regressed: jax.Array, target: jax.Array, *, where: jax.Array | None) -> jax.Array:
        return losses.hint(nn.relu(regressed) if normalize else regressed, target, where=where)

    return connected('hint', loss, student, teacher, lambda source, target: Regressor(target.shape, normalize))


def attention_transfer(
    student: str, teacher: str, *, power: float = 2, variant: Literal['mean_square', 'norm'] = 'mean_square'
) -> Objective:
    """AT: `losses.attention_transfer` between a layer of the student and one of the teacher.

    `kdjax.recipes.attention_transfer` has the published weight, summed over the stages.

    Args:
      student: path of the student's layer.
      teacher: path of the teacher's layer.
      power: as in the loss.
      variant: as in the loss.
    """
    return on_features(losses.attention_transfer, student, teacher, power=power, variant=variant)


def nst(student: str, teacher: str) -> Objective:
    """NST, neuron selectivity transfer: `losses.nst` between a layer of each network.

    `kdjax.recipes.nst` has the published weight.

    Args:
      student: path of the student's layer.
      teacher: path of the teacher's layer.
    """
    return on_features(losses.nst, student, teacher)


def singular_vectors(student: str, teacher: str, *, rank: int = 1) -> Objective:
    """KDSVD: `losses.singular_vectors` between a layer of the student and one of the teacher.

    Args:
      student: path of the student's layer.
      teacher: path of the teacher's layer.
      rank: how many of the teacher's singular vectors are matched.
    """
    return on_features(losses.singular_vectors, student, teacher, rank=rank)


def channel_wise(student: str, teacher: str, *, temperature: Weight = 4.0) -> Objective:
    """CWD: `losses.channel_wise` between a layer of each network, the student's regressed to the teacher's shape if need be.

    Args:
      student: path of the student's layer.
      teacher: path of the teacher's layer.
      temperature: of the softmax over positions; a number or a schedule.
    """
    return connected('channel_wise', losses.channel_wise, student, teacher, where_shapes_differ, temperature=temperature)
