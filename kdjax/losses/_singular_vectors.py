"""KDSVD: the leading singular vectors of an activation, positions by channels.

They depend neither on how many channels there are, nor on their order, nor on the scale of an example.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import numerics
from kdjax.losses._activations import as_positions, exact_einsum
from kdjax.meshes import on_any_mesh

# Below this share of the sum of the eigenvalues, float32 cannot tell an eigenvalue from 0.
_RANK_TOLERANCE = 1e-6
# The square of the distance below which two eigenvalues count as equal when their vectors are differentiated.
_GAP_SQUARED = 1e-8


@on_any_mesh
def singular_vectors(
    student: ArrayLike, teacher: ArrayLike, *, rank: int = 1, axis: int = -1, where: ArrayLike | None = None
) -> jax.Array:
    """KDSVD: how far the student is from having the teacher's strongest patterns over positions, per example.

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
    student, teacher = as_positions('singular_vectors', student, teacher, axis, where)
    _, student_vectors = _left_singular_vectors(student, rank + 3)
    weights, teacher_vectors = _left_singular_vectors(teacher, rank)
    total = numerics.nonzero(jnp.sum(weights, axis=1, keepdims=True))
    cosines = jnp.abs(exact_einsum('bpk,bpj->bkj', teacher_vectors, student_vectors))
    # Rounding may bring the cosine of equal vectors above 1.
    distances = jnp.maximum(2 - 2 * jnp.max(cosines, axis=2), 0.0)
    return jnp.sum(weights / total * distances, axis=1)


def _left_singular_vectors(matrices: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The largest squared singular values [batch, count], of a sum of 1, and left vectors of [batch, positions, channels]."""
    matrices = numerics.l2_normalize(matrices, axis=(1, 2))
    positions, channels = matrices.shape[1:]
    if positions <= channels:
        values, vectors = _eigenvectors(exact_einsum('bpc,bqc->bpq', matrices, matrices))
    else:
        values, right = _eigenvectors(exact_einsum('bpc,bpd->bcd', matrices, matrices))
        vectors = exact_einsum('bpc,bck->bpk', matrices, right)
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
    rotated = exact_einsum('bik,bij,bjl->bkl', vectors, *tangents, vectors)
    gaps = values[:, None, :] - values[:, :, None]
    turns = rotated * gaps / (jnp.square(gaps) + _GAP_SQUARED)
    return (values, vectors), (jnp.diagonal(rotated, axis1=1, axis2=2), exact_einsum('bik,bkl->bil', vectors, turns))
