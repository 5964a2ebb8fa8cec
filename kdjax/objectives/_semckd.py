"""SemCKD, semantic calibration: every layer of the student learns from all of the teacher's, by a trained attention."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdjax import losses
from kdjax.batches import Batch
from kdjax.networks import Outputs
from kdjax.numerics import l2_normalize
from kdjax.objectives._arguments import require_feature
from kdjax.objectives._bottleneck import Bottleneck, require_positions
from kdjax.objectives._connectors import apply_connector, init_connector
from kdjax.objectives._objective import Objective, Weight, with_parameters
from kdjax.objectives._positions import feature_counts, pool_to_one_size, positions_average


def semckd(student: Sequence[str], teacher: Sequence[str], *, temperature: Weight = 1.0, width: int = 16) -> Objective:
    """SemCKD: the distances of all pairs of layers, weighted for each example by an attention over the teacher's layers.

    1/S Σ_i Σ_j a_ij · mean (P_ij(f_s,i) - f_t,j)², with a_i = softmax over j of q_i · k_j / temperature; q_i and k_j are
    embeddings of length 1 of the student's layer i and the teacher's j, and P_ij a bottleneck of 1x1, 3x3 and 1x1 convolutions
    without bias, of twice the teacher's channels in between. All are trained. The larger of two images is average-pooled to the
    smaller. `kdjax.recipes.semckd` has the published weight.

    In the paper an embedding is that of a row of the layer's similarities between the examples of the batch, by a perceptron
    with one hidden layer. Its input is as wide as the batch, so that published code skips smaller batches, and it sees
    whichever examples happen to be there, in whichever order. Here the perceptron has the example's own activation, averaged
    over positions: batches may have any size, and a mask is slicing. The rest is the paper's, on which published codes agree.

    Args:
      student: paths of the student's layers [batch, positions, channels].
      teacher: paths of the teacher's layers, any number of them.
      temperature: of the attention; a number or a schedule.
      width: of the embeddings that the attention compares; in published code a quarter of the batch of 64.

    Raises:
      ValueError: no layers are named, or from `init`: a layer has no positions.

    Reference:
      Chen, Mei, Zhang, Wang, Wang, Feng, Chen. Cross-Layer Distillation with Semantic Calibration. 2021.
      https://arxiv.org/abs/2012.03236
    """
    if not student or not teacher or isinstance(student, str) or isinstance(teacher, str):
        raise ValueError(f'semckd: name layers of both networks in sequences; got {student!r} and {teacher!r}')
    embed = _Embed(width)

    def layers(outputs: tuple[Outputs, Outputs]) -> tuple[list[Any], list[Any]]:
        sides = ('student', outputs[0], student), ('teacher', outputs[1], teacher)
        sources, targets = ([require_feature('semckd', side, own, path) for path in paths] for side, own, paths in sides)
        return sources, targets

    def bottleneck(target: Any) -> Bottleneck:
        return Bottleneck(2 * target.shape[-1], target.shape[-1])

    def init(key: jax.Array, student: Outputs, teacher: Outputs, batch: Batch) -> Any:
        del batch
        sources, targets = layers((student, teacher))
        require_positions('semckd', *sources, *targets)
        modules: dict[str, tuple[nn.Module, Any]] = {}
        for name, side in (('query', sources), ('key', targets)):
            for i, x in enumerate(side):
                modules[f'{name}{i}'] = embed, jax.ShapeDtypeStruct((x.shape[0], x.shape[-1]), jnp.float32)
        for i, source in enumerate(sources):
            for j, target in enumerate(targets):
                modules[f'project{i}_{j}'] = bottleneck(target), source
        keys = jax.random.split(key, len(modules))
        return {name: init_connector(module, own, x) for own, (name, (module, x)) in zip(keys, modules.items(), strict=True)}

    def loss(params: Any, student: Outputs, teacher: Outputs, batch: Batch, *, temperature: Any) -> jax.Array:
        sources, targets = layers((student, teacher))
        queries, keys = (
            jnp.stack(
                [apply_connector(embed, params[f'{name}{i}'], positions_average(batch, x)) for i, x in enumerate(side)], 1
            )
            for name, side in (('query', sources), ('key', targets))
        )
        energies = jnp.einsum('bsw,btw->bst', queries, keys, precision=jax.lax.Precision.HIGHEST)
        attention = jax.nn.softmax(energies / jnp.asarray(temperature, jnp.float32), axis=2)
        value = jnp.zeros(queries.shape[0], jnp.float32)
        for i, source in enumerate(sources):
            for j, target in enumerate(targets):
                own, wanted = pool_to_one_size(batch, source, target)
                where = feature_counts(batch, wanted.shape)
                projected = apply_connector(bottleneck(wanted), params[f'project{i}_{j}'], own, mask=where)
                value += attention[:, i, j] * losses.hint(projected, wanted, where=where)
        return value / len(sources)

    return with_parameters('semckd', init, loss, temperature=temperature)


class _Embed(nn.Module):
    """A perceptron with one hidden layer, and length 1.

    Attributes:
      width: of the embedding.
    """

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [batch, channels] to [batch, width]."""
        x = nn.relu(nn.Dense(2 * self.width)(x))
        return l2_normalize(nn.Dense(self.width)(x), axis=1)
