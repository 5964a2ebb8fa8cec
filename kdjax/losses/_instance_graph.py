"""IRG, the instance relationship graph: how the examples of a batch lie, and how they move from layer to layer."""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import numerics
from kdjax.losses._embeddings import count, differences, embeddings, squared_distances
from kdjax.losses._logits import logit_mse
from kdjax.meshes import on_any_mesh


@on_any_mesh
def instance_graph(
    student: ArrayLike,
    teacher: ArrayLike,
    student_layers: Sequence[ArrayLike],
    teacher_layers: Sequence[ArrayLike],
    *,
    edges: ArrayLike = 50.0,
    transformations: ArrayLike = 50.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """IRG: difference of the two networks' instance relationship graphs over the examples of a batch, a scalar.

    vertices + `edges` · E + `transformations` · (Θ + Λ), each the mean square of a difference between student and teacher:
    - vertices: of the logits.
    - E, the mean over layers: of the edges A_ij = ||x_i - x_j||² / max_ij ||x_i - x_j||², over B². The division, as in public
      implementations and not in the paper, makes them independent of a layer's width and scale.
    - Θ, the mean over successive layers: of the edges' change from one to the next, over B².
    - Λ, the same: of the vertices' change v_i = ||x_i - x'_i||² / max_i ||x_i - x'_i||² from layer x to layer x', over B. Only
      where both layers have the same number of features, in both networks; 0 for others. To have it elsewhere, pool them.

    Public implementations disagree on the transformations: some have Λ alone, some the squares of Θ's and Λ's mean squares.
    The default weights are those of the public table (0.1, 5 and 5 for vertices, edges and transformations) over 0.1.

    Args:
      student: logits [batch, classes], floating point of any precision; arithmetic is in float32.
      teacher: logits of the same shape.
      student_layers: embeddings [batch, ..., channels] of one layer after the other, at least one.
      teacher_layers: as many layers of the teacher, of any widths.
      edges: weight of E.
      transformations: weight of Θ + Λ.
      axis: the class axis of the logits and the channel axis of the layers.
      where: boolean [batch] or [batch, positions]: what to keep, of logits and layers that have such positions as their first
        axes with channels last. Examples of which nothing is kept are as if sliced away.

    Returns:
      float32 scalar; 0 where no example is kept.

    Raises:
      ValueError: shapes or dtypes do not fit, or the numbers of layers differ.

    >>> import jax.numpy as jnp
    >>> logits = jnp.array([[1., 0.], [0., 1.], [2., 2.]])
    >>> student, teacher = jnp.array([[0.], [1.], [2.]]), jnp.array([[0.], [1.], [1.]])
    >>> print(instance_graph(logits, logits, [student], [teacher], edges=1.0))
    0.1389

    Reference:
      Liu, Cao, Li, Yuan, Hu, Li, Duan. Knowledge Distillation via Instance Relationship Graph. 2019.
      https://openaccess.thecvf.com/content_CVPR_2019/html/Liu_Knowledge_Distillation_via_Instance_Relationship_Graph_CVPR_2019_paper.html
    """
    student_layers, teacher_layers = list(student_layers), list(teacher_layers)
    if not student_layers or len(student_layers) != len(teacher_layers):
        raise ValueError(
            f'instance_graph: student_layers and teacher_layers must be as many and at least one, got {len(student_layers)} '
            f'and {len(teacher_layers)}'
        )
    student, teacher = numerics.pair('instance_graph', student, teacher, axis)
    if student.ndim < 2:
        raise ValueError(f'instance_graph: student {student.shape} and teacher {teacher.shape} must be [batch, classes]')
    numerics.check_scalars('instance_graph', edges=edges, transformations=transformations)
    batch, width = student.shape[0], math.prod(student.shape[1:])
    pairs = [embeddings('instance_graph', s, t, axis, where)[:2] for s, t in zip(student_layers, teacher_layers, strict=True)]
    if any(layer.shape[0] != batch for pair in pairs for layer in pair):
        shapes = [jnp.shape(layer) for layer in student_layers]
        raise ValueError(f'instance_graph: layers {shapes} must have the {batch} examples of student {student.shape}')
    elements = None
    if where is not None:
        elements = jnp.broadcast_to(numerics.leading_mask('instance_graph', where, student.shape), student.shape)
        elements = elements.reshape(batch, width)
        where = numerics.leading_mask('instance_graph', where, (batch, 1))[:, 0]
    vertices = logit_mse(student.reshape(batch, width), teacher.reshape(batch, width), where=elements)

    kept = count(student, where)
    unlike = jnp.stack([_edges(s, where) - _edges(t, where) for s, t in pairs])
    edge_loss = jnp.sum(jnp.square(unlike)) / (len(pairs) * kept**2)
    loss = jnp.sum(vertices, where=where) / kept + jnp.asarray(edges, jnp.float32) * edge_loss
    if len(pairs) == 1:
        return loss
    changes = jnp.sum(jnp.square(jnp.diff(unlike, axis=0))) / kept**2
    for before, after in itertools.pairwise(pairs):
        if all(x.shape == y.shape for x, y in zip(before, after, strict=True)):
            moves = [_moves(x, y) for x, y in zip(before, after, strict=True)]
            changes += jnp.sum(jnp.square(moves[0] - moves[1])) / kept
    return loss + jnp.asarray(transformations, jnp.float32) * changes / (len(pairs) - 1)


def _edges(layer: jax.Array, where: jax.Array | None) -> jax.Array:
    return _relative(squared_distances(numerics.unit_scale(layer, axis=(0, 1)), where))


def _moves(before: jax.Array, after: jax.Array) -> jax.Array:
    """How far each example moves from one layer to the next, [batch]."""
    scaled = numerics.unit_scale(jnp.stack([before, after]), axis=(0, 1, 2))
    return _relative(jnp.sum(jnp.square(differences(scaled[0], scaled[1])), axis=1))


def _relative(squares: jax.Array) -> jax.Array:
    return squares / numerics.nonzero(jnp.max(squares, initial=0.0))
