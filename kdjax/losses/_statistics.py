"""Losses on second-order statistics of activations: how channels or positions go together, whatever each value is.

All return one value per example and take images [batch, height, width, channels], or other layouts through `axis`, the channel
axis. `fsp` relates channels to channels and does not see where things are. `nst` and `singular_vectors` compare patterns over
positions, and see neither how many channels there are, nor their order, nor the scale of an example.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import numerics, pooling
from kdjax.losses import _features
from kdjax.meshes import on_any_mesh

# Below this share of the sum of the eigenvalues, float32 cannot tell an eigenvalue from 0.
_RANK_TOLERANCE = 1e-6
# The square of the distance below which two eigenvalues count as equal when their vectors are differentiated.
_GAP_SQUARED = 1e-8


@on_any_mesh
def fsp(
    student_in: ArrayLike,
    student_out: ArrayLike,
    teacher_in: ArrayLike,
    teacher_out: ArrayLike,
    *,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Mean squared difference of how the channels before and after a part of each network go together, per example.

    mean over [channels_in, channels_out] of (G_s - G_t)², with G = mean over positions of the outer products of the
    activations `in` and `out`; the larger of the two is average-pooled to the smaller. Published weight [50], with one term
    for each pair of neighbouring layers.

    Args:
      student_in: activations [batch, height, width, channels_in], floating point of any precision; arithmetic is in float32.
      student_out: activations [batch, height, width, channels_out].
      teacher_in: activations with as many channels as `student_in`, of any size.
      teacher_out: activations with as many channels as `student_out`, of any size.
      axis: the channel axis.
      where: boolean, broadcastable to the smaller of `in` and `out` of each network, with a channel axis of length 1: positions
        to keep.

    Returns:
      float32 [batch], in the fourth power of the activation's unit; 0 where no position is kept.

    Raises:
      ValueError: shapes or dtypes do not fit.

    >>> import jax.numpy as jnp
    >>> one, two = jnp.ones((1, 2, 2, 1)), 2 * jnp.ones((1, 4, 4, 1))
    >>> print(fsp(one, two, one, one))
    [1.]

    Reference:
      Yim, Joo, Bae, Kim. A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer Learning.
      2017. https://openaccess.thecvf.com/content_cvpr_2017/html/Yim_A_Gift_From_CVPR_2017_paper.html
    """
    student_in, teacher_in = numerics.pair('fsp', student_in, teacher_in, axis, same_shape=False)
    student_out, teacher_out = numerics.pair('fsp', student_out, teacher_out, axis, same_shape=False)
    for student, teacher in ((student_in, teacher_in), (student_out, teacher_out)):
        if student.ndim != 4 or student.shape[::3] != teacher.shape[::3]:
            raise ValueError(
                'fsp: student and teacher must be [batch, height, width, channels] with the same batch and the same channels '
                f'(or go through the connectors of kdjax.objectives), got {student.shape} and {teacher.shape} (channels last)'
            )
    if student_in.shape[0] != student_out.shape[0]:
        raise ValueError(
            f'fsp: {student_in.shape} before and {student_out.shape} after must have the same batch (channels last)'
        )

    def flow(before: jax.Array, after: jax.Array) -> jax.Array:
        size = _features.smaller_size(before, after)
        keep = _features.position_mask('fsp', where, (before.shape[0], *size), axis)
        before, after = (_flatten_positions(_features.masked_images(x, keep), size, keep) for x in (before, after))
        kept = jnp.float32(size[0] * size[1]) if keep is None else jnp.sum(keep, axis=(1, 2), dtype=jnp.float32)[:, None, None]
        return _einsum('bpi,bpo->bio', before, after) / jnp.maximum(kept, 1.0)

    difference = flow(student_in, student_out) - flow(teacher_in, teacher_out)
    return jnp.mean(jnp.square(difference), axis=(1, 2))


@on_any_mesh
def nst(student: ArrayLike, teacher: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None) -> jax.Array:
    """Maximum mean discrepancy of the two sets of channels, each channel a map of where it is active, per example.

    mean K(t, t) + mean K(s, s) - 2 mean K(s, t) over pairs of channels, with K(a, b) = (a · b)² of maps that are L2-normalised
    over positions. It is the squared distance of the two means of a aᵀ. Where sizes differ, the larger is average-pooled to
    the smaller. Published code stops the gradient of K(t, t) or leaves it out; here it is there, as for all losses. Published
    weight [50].

    Args:
      student: activations [batch, height, width, channels], floating point of any precision; arithmetic is in float32.
      teacher: activations of the same rank and batch size.
      axis: the channel axis.
      where: boolean, broadcastable to the smaller activation with a channel axis of length 1: positions to keep.

    Returns:
      float32 [batch], without unit, at most 2, and not negative but for rounding; 0 where no position is kept.

    Raises:
      ValueError: shapes or dtypes do not fit.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([1., 0.]).reshape(1, 1, 2, 1), jnp.array([0., 3.]).reshape(1, 1, 2, 1)
    >>> print(nst(student, teacher))
    [2.]

    Reference:
      Huang, Wang. Like What You Like: Knowledge Distill via Neuron Selectivity Transfer. 2017. https://arxiv.org/abs/1707.01219
    """
    maps = [numerics.l2_normalize(x, axis=1) for x in _positions('nst', student, teacher, axis, where)]
    positions, channels = maps[0].shape[1], [x.shape[2] for x in maps]
    if positions <= sum(channels):
        of_student, of_teacher = (_einsum('bpc,bqc->bpq', x, x) / count for x, count in zip(maps, channels, strict=True))
        return jnp.sum(jnp.square(of_student - of_teacher), axis=(1, 2))
    # The same from products of channels, of which there are fewer.
    both = jnp.concatenate(maps, axis=2)
    weights = jnp.concatenate([jnp.full(channels[0], 1 / channels[0]), jnp.full(channels[1], -1 / channels[1])])
    kernel = jnp.square(_einsum('bpc,bpd->bcd', both, both))
    return _einsum('c,bcd,d->b', weights, kernel, weights)


@on_any_mesh
def singular_vectors(
    student: ArrayLike, teacher: ArrayLike, *, rank: int = 1, axis: int = -1, where: ArrayLike | None = None
) -> jax.Array:
    """How far the student is from having the teacher's strongest patterns over positions, per example.

    Σ_k w_k (2 - 2 max_j |u_t,k · u_s,j|), with the left singular vectors u [positions] of the activations as matrices
    [positions, channels]: the teacher's first `rank`, the student's first `rank + 3`, and w_k = σ_t,k² / Σ_k σ_t,k². The
    bracket is ||u_t,k ∓ u_s,j||² for the student's vector that fits best and the better sign, the paper's alignment. The paper
    takes the right singular vectors instead, which have as many entries as there are channels, and compares how they go on
    from one layer to the next, through radial basis functions. Where sizes differ, the larger is average-pooled to the
    smaller.

    Singular vectors have no derivative where singular values are equal. With λ = σ² / Σσ², the factor 1 / (λ_i - λ_j) in the
    derivative of an eigenvector is replaced by d / (d² + 1e-8), d = λ_i - λ_j, which never exceeds 5000 and is 0 for equal
    ones; which vectors stand for equal values is up to the decomposition. A vector with λ < 1e-6 counts as zero and has no
    gradient: the bracket is 2 for a pattern that the student lacks, or to which it is orthogonal.

    Args:
      student: activations [batch, height, width, channels], floating point of any precision; arithmetic is in float32.
      teacher: activations of the same rank and batch size.
      rank: number of the teacher's singular vectors; of those that there are, where there are fewer.
      axis: the channel axis.
      where: boolean, broadcastable to the smaller activation with a channel axis of length 1: positions to keep.

    Returns:
      float32 [batch], without unit, between 0 and 2; 0 where the teacher is zero or no position is kept.

    Raises:
      ValueError: shapes or dtypes do not fit, or the rank is not positive.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([1., 0.]).reshape(1, 1, 2, 1), jnp.array([3., 4.]).reshape(1, 1, 2, 1)
    >>> print(singular_vectors(student, teacher))
    [0.8]

    Reference:
      Lee, Kim, Song. Self-supervised Knowledge Distillation Using Singular Value Decomposition. 2018.
      https://arxiv.org/abs/1807.06819
    """
    numerics.check_positive('singular_vectors', rank=rank)
    student, teacher = _positions('singular_vectors', student, teacher, axis, where)
    _, student_vectors = _left_singular_vectors(student, rank + 3)
    weights, teacher_vectors = _left_singular_vectors(teacher, rank)
    total = numerics.nonzero(jnp.sum(weights, axis=1, keepdims=True))
    cosines = jnp.abs(_einsum('bpk,bpj->bkj', teacher_vectors, student_vectors))
    # Rounding may bring the cosine of equal vectors above 1.
    distances = jnp.maximum(2 - 2 * jnp.max(cosines, axis=2), 0.0)
    return jnp.sum(weights / total * distances, axis=1)


def _left_singular_vectors(matrices: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The largest squared singular values [batch, count], of a sum of 1, and left vectors of [batch, positions, channels]."""
    matrices = numerics.l2_normalize(matrices, axis=(1, 2))
    positions, channels = matrices.shape[1:]
    if positions <= channels:
        values, vectors = _eigenvectors(_einsum('bpc,bqc->bpq', matrices, matrices))
    else:
        values, right = _eigenvectors(_einsum('bpc,bpd->bcd', matrices, matrices))
        vectors = _einsum('bpc,bck->bpk', matrices, right)
    values, vectors = values[:, ::-1][:, :count], vectors[:, :, ::-1][:, :, :count]
    absent = values <= _RANK_TOLERANCE
    vectors = jnp.where(absent[:, None], 0.0, vectors)
    return jnp.where(absent, 0.0, values), numerics.l2_normalize(vectors, axis=1)


@jax.custom_jvp
def _eigenvectors(symmetric: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues, the smallest first, and eigenvectors as columns, with derivatives that stay finite for equal values."""
    # On CPUs one matrix at a time: LAPACK's batched call shares its threads with the rest of the program, and a training loop
    # that dispatched steps ahead was seen to wait for ever (jax 0.10.2). It is no slower: the call works through them in turn.
    return jax.lax.platform_dependent(
        symmetric,
        cpu=lambda x: jax.lax.map(lambda one: tuple(jnp.linalg.eigh(one)), x),
        default=lambda x: tuple(jnp.linalg.eigh(x)),
    )


@_eigenvectors.defjvp
def _eigenvectors_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple:
    values, vectors = _eigenvectors(*primals)
    rotated = _einsum('bik,bij,bjl->bkl', vectors, *tangents, vectors)
    gaps = values[:, None, :] - values[:, :, None]
    turns = rotated * gaps / (jnp.square(gaps) + _GAP_SQUARED)
    return (values, vectors), (jnp.diagonal(rotated, axis1=1, axis2=2), _einsum('bik,bkl->bil', vectors, turns))


def _positions(
    loss: str, student: ArrayLike, teacher: ArrayLike, axis: int, where: ArrayLike | None
) -> tuple[jax.Array, jax.Array]:
    """Both as [batch, positions, channels] at the smaller size, and zero outside `where`."""
    student, teacher, size, where = _features.images(loss, student, teacher, axis, where)
    return _flatten_positions(student, size, where), _flatten_positions(teacher, size, where)


def _flatten_positions(images: jax.Array, size: tuple[int, int], where: jax.Array | None) -> jax.Array:
    """[batch, height, width, channels] as [batch, positions of a size, channels], zero outside `where` of that size."""
    pooled = pooling.average_pool(images, size)
    kept = pooled if where is None else jnp.where(where[..., None], pooled, 0.0)
    return kept.reshape(images.shape[0], size[0] * size[1], images.shape[3])


def _einsum(subscripts: str, *operands: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, *operands, precision=jax.lax.Precision.HIGHEST)
