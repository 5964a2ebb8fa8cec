"""Objectives on features, with the connectors that the papers train.

A feature is named by its path, one of those that its network was made with. Which student layer learns from which teacher layer
is data: `over_layers` sums a method over a mapping of paths.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdjax import losses
from kdjax.batches import Batch
from kdjax.metrics import Average
from kdjax.networks import Outputs
from kdjax.objectives._arguments import batch_mean, feature_pair, feature_pairs
from kdjax.objectives._connectors import Convolutions, Regressor, apply_connector, init_connector
from kdjax.objectives._lifting import connected, on_features, where_shapes_differ
from kdjax.objectives._objective import Objective, Term, Weight, with_parameters
from kdjax.objectives._positions import counted_features, feature_counts


def over_layers(objective: Callable[..., Objective], layers: Mapping[str, str], **hyperparameters: Any) -> Objective:
    """The mean of an objective over pairs of layers: `{student path: teacher path, ...}`.

    >>> from kdjax import objectives
    >>> over_layers(objectives.attention_transfer, {'stage2': 'stage2', 'stage3': 'stage5'}).names
    ('stage2 <- stage2', 'stage3 <- stage5')

    Args:
      objective: one that takes the two paths first.
      layers: which student layer learns from which teacher layer.
      **hyperparameters: of the objective.
    """
    if not layers:
        raise ValueError('over_layers: the mapping of student layers to teacher layers is empty')
    terms: list[Term] = []
    for student, teacher in layers.items():
        made = (1 / len(layers) * objective(student, teacher, **hyperparameters)).terms
        terms += [term._replace(name=f'{student} <- {teacher}') for term in made]
    return Objective(tuple(terms))


def uniform_layers(student: Sequence[str], teacher: Sequence[str]) -> dict[str, str]:
    """Maps every student layer to the teacher layer at the same relative depth, the last to the last.

    >>> uniform_layers(['block0', 'block1'], ['block0', 'block1', 'block2', 'block3'])
    {'block0': 'block1', 'block1': 'block3'}
    """
    return {path: teacher[-(-(i + 1) * len(teacher) // len(student)) - 1] for i, path in enumerate(student)}


def hint(student: str, teacher: str, *, normalize: bool = False) -> Objective:
    """`losses.hint` between a layer of the teacher and a trained regression from a layer of the student.

    Its parameters are those of `connectors.Regressor`. Published weight: 100. As a stage of its own before the task, as in the
    paper: `in_stages([hint(...), hard_labels()], [steps])`.

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
    """`losses.attention_transfer` between a layer of the student and one of the teacher.

    Published weight: 1000, summed over the stages.

    Args:
      student: path of the student's layer.
      teacher: path of the teacher's layer.
      power: as in the loss.
      variant: as in the loss.
    """
    return on_features(losses.attention_transfer, student, teacher, power=power, variant=variant)


def nst(student: str, teacher: str) -> Objective:
    """Neuron selectivity transfer: `losses.nst` between a layer of the student and one of the teacher. Published weight: 50.

    Args:
      student: path of the student's layer.
      teacher: path of the teacher's layer.
    """
    return on_features(losses.nst, student, teacher)


def singular_vectors(student: str, teacher: str, *, rank: int = 1) -> Objective:
    """`losses.singular_vectors` between a layer of the student and one of the teacher.

    Args:
      student: path of the student's layer.
      teacher: path of the teacher's layer.
      rank: how many of the teacher's singular vectors are matched.
    """
    return on_features(losses.singular_vectors, student, teacher, rank=rank)


def fsp(student: tuple[str, str], teacher: tuple[str, str]) -> Objective:
    """Flow between two layers: `losses.fsp`. Published weight: 50.

    Where student and teacher differ in channels, a 1x1 convolution is trained on each of the student's two layers.

    Args:
      student: paths of the layer where the flow begins and of that where it ends.
      teacher: the same of the teacher.

    Raises:
      ValueError: not two paths are named.
    """
    features = feature_pairs('fsp', student, teacher)
    if len(student) != 2:
        raise ValueError(f'fsp: a flow has two layers, where it begins and where it ends; got {student}')

    def pairs(student: Outputs, teacher: Outputs) -> dict[str, tuple[Any, Any]]:
        return dict(zip(('begin', 'end'), zip(*features(student, teacher), strict=True), strict=True))

    def widen(source: Any, target: Any) -> Regressor:
        return Regressor((*source.shape[:-1], target.shape[-1]))

    def init(key: jax.Array, student: Outputs, teacher: Outputs, batch: Batch) -> Any:
        del batch
        return {
            name: init_connector(widen(source, target), jax.random.fold_in(key, i), source)
            for i, (name, (source, target)) in enumerate(pairs(student, teacher).items())
            if source.shape[-1] != target.shape[-1]
        }

    def loss(params: Any, student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        layers = {name: counted_features(batch, *pair) for name, pair in pairs(student, teacher).items()}
        sources = [
            apply_connector(widen(source, target), params[name], source) if name in params else source
            for name, (source, target) in layers.items()
        ]
        return losses.fsp(*_as_counted(batch, *sources), *_as_counted(batch, *(target for _, target in layers.values())))

    return with_parameters('fsp', init, loss)


def _as_counted(batch: Batch, begin: jax.Array, end: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both ends of a flow such that the mean of their products over all positions is that over those that count.

    The two networks' flows may be of two sizes, for which a loss would need two masks.
    """
    smaller = tuple(min(sizes) for sizes in zip(begin.shape, end.shape, strict=False))
    where = feature_counts(batch, smaller)
    if where is None:
        return begin, end
    share = jnp.mean(jnp.broadcast_to(where, (*smaller[:3], 1)), axis=(1, 2), keepdims=True, dtype=jnp.float32)
    # A connector's bias stands where nothing counts.
    begin, end = counted_features(batch, begin, end)
    return begin.astype(jnp.float32) / jnp.where(share > 0, share, 1.0), end


def channel_wise(student: str, teacher: str, *, temperature: Weight = 4.0) -> Objective:
    """`losses.channel_wise` between a layer of the teacher and one of the student, regressed to its shape if need be.

    Args:
      student: path of the student's layer.
      teacher: path of the teacher's layer.
      temperature: of the softmax over positions; a number or a schedule.
    """
    return connected('channel_wise', losses.channel_wise, student, teacher, where_shapes_differ, temperature=temperature)


def activation_boundary(student: str, teacher: str, *, margin: Weight = 1.0) -> Objective:
    """`losses.activation_boundary` from a trained 1x1 convolution with batch norm on the student's layer.

    The layers are pre-activations, such as the output of the last norm before a ReLU. The paper trains with this alone first,
    and then with the task: `in_stages([activation_boundary(...), hard_labels()], [steps])`.

    Args:
      student: path of the student's layer.
      teacher: path of the teacher's layer.
      margin: as in the loss; a number or a schedule.
    """
    return connected(
        'activation_boundary',
        losses.activation_boundary,
        student,
        teacher,
        lambda source, target: Regressor(target.shape, normalize=True),
        margin=margin,
    )


def masked_generation(student: str, teacher: str, *, masked: float = 0.5) -> Objective:
    """Masked generative distillation: the student's feature, positions masked at random, must still make the teacher's.

    A convolution to the teacher's shape where shapes differ, the mask, then two 3x3 convolutions with a ReLU between, all
    trained; the loss is `losses.masked_generation`. Tokens have convolutions of 3 of them. The state is a random key, and what
    is masked depends on the shape of the layer too.

    Args:
      student: path of the student's layer.
      teacher: path of the teacher's layer.
      masked: the share of positions that are masked.
    """
    if not 0 <= masked < 1:
        raise ValueError(f'masked_generation: masked must be at least 0 and below 1, got {masked}')
    features = feature_pair('masked_generation', student, teacher)

    def generator(target: Any) -> Convolutions:
        return Convolutions((target.shape[-1], target.shape[-1]), 3)

    def init(key: jax.Array, student: Outputs, teacher: Outputs, batch: Batch) -> tuple[Any, Any]:
        del batch
        source, target = features(student, teacher)
        keys = jax.random.split(key, 3)
        align = where_shapes_differ(source, target)
        aligned = {} if align is None else {'align': init_connector(align, keys[0], source)}
        return {'generator': init_connector(generator(target), keys[1], target), **aligned}, {'key': keys[2]}

    def apply(
        params: Any, state: Any, student: Outputs, teacher: Outputs, batch: Batch, *, step: jax.Array
    ) -> tuple[Average, dict[str, Average], Any]:
        source, target = counted_features(batch, *features(student, jax.lax.stop_gradient(teacher)))
        align = where_shapes_differ(source, target)
        if align is not None:
            source = apply_connector(align, params['align'], source)
        keep = jax.random.bernoulli(jax.random.fold_in(state['key'], step), 1 - masked, (*target.shape[:-1], 1))
        where = feature_counts(batch, target.shape)
        generated = apply_connector(generator(target), params['generator'], source * keep.astype(source.dtype), mask=where)
        return batch_mean(losses.masked_generation(generated, target, where=where), batch), {}, state

    return Objective((Term('masked_generation', init, apply),))
