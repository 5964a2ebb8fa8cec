"""Losses on relations between the examples of a batch: which inputs the teacher finds alike, whatever its coordinates.

All return one scalar for the batch, and see the whole batch: under `jit` with sharded arrays that is the global one.
Embeddings are [batch, ...]; all axes but the first are flattened, and the two networks may have different widths. A mask may
be of positions too, the first axes of embeddings with channels last, as of tokens in [batch, tokens, channels]: what is outside
is zero, so that more padding, of any content, changes nothing. What is kept and is NaN or infinite makes the value NaN.
"""

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import numerics
from kdjax.meshes import on_any_mesh

# Numbers that one array over several anchors may hold at a time, in `map_anchors`: 4 MB in float32.
_CHUNK = 2**20


@on_any_mesh
def similarity_preserving(
    student: ArrayLike, teacher: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None
) -> jax.Array:
    """Squared difference of the two networks' similarity matrices over the batch, a scalar.

    Σ_ij (G_t - G_s)²_ij / B², with G = F Fᵀ for the flattened activations F [B, D], each row of G divided by its L2 norm
    (the L2 norm, where some implementations take L1).

    Args:
      student: activations [batch, ..., channels], floating point of any precision; arithmetic is in float32.
      teacher: activations with the same batch size; the other sizes may differ.
      axis: the channel axis.
      where: boolean [batch] or [batch, positions]: what to keep. Examples of which nothing is kept are as if sliced away.

    Returns:
      float32 scalar, without unit, at most 4 / B; 0 where no example is kept. An example whose activation is zero has a row
      of zeros.

    Raises:
      ValueError: shapes or dtypes do not fit.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[1., 0.], [0., 1.]]), jnp.array([[1., 0., 0.], [1., 0., 0.]])
    >>> print(similarity_preserving(student, teacher))
    0.293

    Reference:
      Tung, Mori. Similarity-Preserving Knowledge Distillation. 2019. https://arxiv.org/abs/1907.09682
    """
    student, teacher, where = embeddings('similarity_preserving', student, teacher, axis, where)

    def similarities(x: jax.Array) -> jax.Array:
        x = numerics.unit_scale(x, axis=(0, 1))
        return numerics.l2_normalize(jnp.matmul(x, x.T, precision=jax.lax.Precision.HIGHEST), axis=1)

    return jnp.sum(jnp.square(similarities(teacher) - similarities(student))) / count(student, where) ** 2


@on_any_mesh
def pkt(
    student: ArrayLike, teacher: ArrayLike, *, epsilon: float = 1e-7, axis: int = -1, where: ArrayLike | None = None
) -> jax.Array:
    """Divergence of the student's neighbourhoods in the batch from the teacher's, a scalar [30000].

    Σ_ij p_t log((p_t + ε) / (p_s + ε)) / B², with p_ij = k_ij / Σ_j k_ij and k = (cosine + 1) / 2. An example is a neighbour of
    itself. The mean is over B², as in published code that goes with the weight: B times less than the mean over examples.

    Args:
      student: embeddings [batch, ..., channels], floating point of any precision; arithmetic is in float32.
      teacher: embeddings with the same batch size; the other sizes may differ.
      epsilon: ε > 0.
      axis: the channel axis.
      where: boolean [batch] or [batch, positions]: what to keep. Examples of which nothing is kept are as if sliced away.

    Returns:
      float32 scalar, in nats, not negative but for ε; 0 where no example is kept. An example whose embedding is zero has
      cosine 0 to all.

    Raises:
      ValueError: shapes or dtypes do not fit, or epsilon is not positive.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[1., 0.], [0., 1.]]), jnp.array([[1., 0., 0.], [1., 0., 0.]])
    >>> print(pkt(student, teacher))
    0.0294

    Reference:
      Passalis, Tefas. Learning Deep Representations with Probabilistic Knowledge Transfer. 2018.
      https://arxiv.org/abs/1803.10837
    """
    numerics.check_positive('pkt', epsilon=epsilon)
    student, teacher, where = embeddings('pkt', student, teacher, axis, where)
    pairs = None if where is None else where[:, None] & where[None, :]

    def log_neighbours(x: jax.Array) -> jax.Array:
        x = numerics.l2_normalize(x, axis=1)
        # Rounding takes the cosine of opposite examples below -1.
        kernel = jnp.maximum((jnp.matmul(x, x.T, precision=jax.lax.Precision.HIGHEST) + 1) / 2, 0.0)
        total = jnp.sum(kernel, axis=1, keepdims=True, where=pairs)
        return jnp.log(kernel / numerics.nonzero(total) + jnp.float32(epsilon))

    log_t, log_s = log_neighbours(teacher), log_neighbours(student)
    # p_t = (p_t + ε) - ε. The first sums to the same for both networks, which `divergence` wants for its precision.
    total = jnp.sum(numerics.divergence(log_t, log_s, pairs)) - jnp.float32(epsilon) * jnp.sum(log_t - log_s, where=pairs)
    return total / count(student, where) ** 2


@on_any_mesh
def rkd_distance(student: ArrayLike, teacher: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None) -> jax.Array:
    """Difference of the distances between the examples, each network's in units of their mean, a scalar [25].

    Σ_ij huber(d_s - d_t) / B², with d_ij = ||x_i - x_j|| / μ, μ the mean of the distances that are positive, and
    huber(z) = z² / 2 up to |z| = 1, |z| - ½ beyond. Rotating, shifting or scaling either embedding changes nothing. Distances
    are norms of differences: published code takes them from inner products, which loses those of near examples.

    Args:
      student: embeddings [batch, ..., channels], floating point of any precision; arithmetic is in float32.
      teacher: embeddings with the same batch size; the other sizes may differ.
      axis: the channel axis.
      where: boolean [batch] or [batch, positions]: what to keep. Examples of which nothing is kept are as if sliced away.

    Returns:
      float32 scalar, without unit; 0 where no example is kept. At distance 0 the gradient is 0.

    Raises:
      ValueError: shapes or dtypes do not fit.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[0.], [1.], [2.]]), jnp.array([[0.], [1.], [9.]])
    >>> print(rkd_distance(student, teacher))
    0.0756

    Reference:
      Park, Kim, Lu, Cho. Relational Knowledge Distillation. 2019. https://arxiv.org/abs/1904.05068
    """
    student, teacher, where = embeddings('rkd_distance', student, teacher, axis, where)

    def relative_distances(x: jax.Array) -> jax.Array:
        distances = numerics.root(squared_distances(numerics.unit_scale(x, axis=(0, 1)), where))
        return distances / numerics.nonzero(numerics.masked_mean(distances, (0, 1), distances != 0))

    return jnp.sum(_huber(relative_distances(student) - relative_distances(teacher))) / count(student, where) ** 2


@on_any_mesh
def rkd_angle(student: ArrayLike, teacher: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None) -> jax.Array:
    """Difference of the angles at which each example sees the others, a scalar [50].

    Σ_ijk huber(a_s - a_t) / B³, with a_ijk the cosine of the angle at x_i between x_j and x_k, 0 where either coincides with
    x_i, and huber(z) = z² / 2 up to |z| = 1, |z| - ½ beyond. Rotating, shifting or scaling either embedding changes nothing.

    The B³ cosines never exist at once: n examples x_i are taken at a time, forward and backward, which needs arrays of
    n · B · max(B, channels) numbers; n is the most, though at least 1, for which that is 2²⁰ numbers, 4 MB.

    Args:
      student: embeddings [batch, ..., channels], floating point of any precision; arithmetic is in float32.
      teacher: embeddings with the same batch size; the other sizes may differ.
      axis: the channel axis.
      where: boolean [batch] or [batch, positions]: what to keep. Examples of which nothing is kept are as if sliced away.

    Returns:
      float32 scalar, without unit, at most 1.5; 0 where no example is kept. At distance 0 the gradient is 0.

    Raises:
      ValueError: shapes or dtypes do not fit.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[0.], [1.], [2.]]), jnp.array([[0.], [9.], [1.]])
    >>> print(rkd_angle(student, teacher))
    0.222

    Reference:
      Park, Kim, Lu, Cho. Relational Knowledge Distillation. 2019. https://arxiv.org/abs/1904.05068
    """
    student, teacher, where = embeddings('rkd_angle', student, teacher, axis, where)

    def cosines(x: jax.Array, anchor: jax.Array) -> jax.Array:
        directions = numerics.l2_normalize(differences(x, anchor[None]), axis=1)
        if where is not None:
            directions = jnp.where(where[:, None], directions, 0.0)
        return jnp.matmul(directions, directions.T, precision=jax.lax.Precision.HIGHEST)

    def at_anchor(student_anchor: jax.Array, teacher_anchor: jax.Array) -> jax.Array:
        return jnp.sum(_huber(cosines(student, student_anchor) - cosines(teacher, teacher_anchor)))

    return jnp.sum(map_anchors(at_anchor, student, teacher), where=where) / count(student, where) ** 3


@on_any_mesh
def correlation_congruence(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    gamma: ArrayLike = 0.4,
    order: int = 2,
    variant: Literal['kernel', 'adjacent'] = 'kernel',
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Squared difference of the two networks' kernel matrices over the batch, a scalar [0.02].

    Σ_ij (k_t - k_s)² / B², with k(x, y) = e^(-2γ) Σ_p (2γ)^p / p! ⟨x, y⟩^p for p = 0 ... order, after each embedding has been
    divided by its L2 norm. Only then are these the first terms of the kernel exp(-γ ||x - y||²); some code leaves that out.

    `variant='adjacent'`, another loss under the same name in much published code: the mean over i of Σ_d δ_i δ_{i+1}, with
    δ = |f_s - f_t| for embeddings of the same width as they come, i = 1 ... B - 1. It depends on the order of the examples.

    Args:
      student: embeddings [batch, ..., channels], floating point of any precision; arithmetic is in float32.
      teacher: embeddings with the same batch size; the other sizes may differ for `'kernel'`.
      gamma: γ > 0, a number or a traced scalar, for `'kernel'`.
      order: the highest power of the inner product, at least 1, for `'kernel'`.
      variant: `'kernel'` or `'adjacent'`.
      axis: the channel axis.
      where: boolean [batch] or [batch, positions]: what to keep. Examples of which nothing is kept are as if sliced away.

    Returns:
      float32 scalar, without unit for `'kernel'` and in squared units of the embedding for `'adjacent'`; 0 where no example,
      or no two adjacent ones, are kept.

    Raises:
      ValueError: shapes or dtypes do not fit, or a hyperparameter is out of range.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[1., 0.], [0., 1.]]), jnp.array([[1., 0.], [1., 0.]])
    >>> print(correlation_congruence(student, teacher), correlation_congruence(student, teacher, variant='adjacent'))
    0.127 0.0

    Reference:
      Peng, Jin, Liu, Zhou, Wu, Liu, Zhou, Zhang. Correlation Congruence for Knowledge Distillation. 2019.
      https://arxiv.org/abs/1904.01802
    """
    numerics.check_positive('correlation_congruence', gamma=gamma, order=order)
    if variant not in ('kernel', 'adjacent'):
        raise ValueError(f"correlation_congruence: variant must be 'kernel' or 'adjacent', got {variant!r}")
    shapes = jnp.shape(student), jnp.shape(teacher)
    student, teacher, where = embeddings('correlation_congruence', student, teacher, axis, where)
    if variant == 'adjacent':
        if student.shape != teacher.shape:
            raise ValueError(
                f'correlation_congruence: student {shapes[0]} and teacher {shapes[1]} must have the same width for '
                "variant='adjacent'"
            )
        return _adjacent_products(jnp.abs(student - teacher), where)
    scale = 2 * jnp.asarray(gamma, jnp.float32)

    def kernel(x: jax.Array) -> jax.Array:
        x = numerics.l2_normalize(x, axis=1)
        products = scale * jnp.matmul(x, x.T, precision=jax.lax.Precision.HIGHEST)
        series = jnp.ones_like(products)
        for power in range(order, 0, -1):
            series = 1 + products * series / power
        return jnp.exp(-scale) * series

    return jnp.sum(jnp.square(kernel(teacher) - kernel(student))) / count(student, where) ** 2


def embeddings(
    loss: str, student: ArrayLike, teacher: ArrayLike, axis: int, where: ArrayLike | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Student and teacher as [batch, features] in float32, zero outside `where`, and the examples of which anything is kept."""
    sides = [numerics.as_float32(f'{loss}: student', student), numerics.as_float32(f'{loss}: teacher', teacher)]
    shapes = tuple(x.shape for x in sides)
    if min(x.ndim for x in sides) < 2:
        raise ValueError(f'{loss}: student {shapes[0]} and teacher {shapes[1]} must be [batch, ...]')
    for shape in shapes:
        numerics.check_axis(loss, axis, shape)
    sides = [numerics.finite_or_nan(jnp.moveaxis(x, axis, -1)) for x in sides]
    batch = sides[0].shape[0]
    if sides[1].shape[0] != batch:
        raise ValueError(f'{loss}: student {shapes[0]} and teacher {shapes[1]} must have the same number of examples')
    if where is not None:
        sides = [jnp.where(numerics.leading_mask(loss, where, x.shape), x, 0.0) for x in sides]
        where = numerics.leading_mask(loss, where, (batch, 1))[:, 0]
    student, teacher = (x.reshape(batch, math.prod(x.shape[1:])) for x in sides)
    return student, teacher, where


def count(x: jax.Array, where: jax.Array | None) -> jax.Array:
    """The number of examples kept, or 1 for a safe division where none is."""
    kept = jnp.float32(x.shape[0]) if where is None else jnp.sum(where, dtype=jnp.float32)
    return jnp.maximum(kept, 1.0)


def squared_distances(x: jax.Array, where: jax.Array | None) -> jax.Array:
    """||x_i - x_j||² for [batch, features], 0 where i or j is outside `where`."""
    squares = map_anchors(lambda anchor: jnp.sum(jnp.square(differences(x, anchor[None])), axis=1), x)
    return squares if where is None else jnp.where(where[:, None] & where[None, :], squares, 0.0)


def map_anchors(function: Callable[..., jax.Array], *embeddings: jax.Array) -> jax.Array:
    """`function` of each example [features] of the embeddings, stacked; a few at a time, and again in the backward pass."""
    batch = embeddings[0].shape[0]
    size = batch * max(batch, *(x.shape[1] for x in embeddings))
    step = jax.checkpoint(lambda anchors: function(*anchors), prevent_cse=False)
    return jax.lax.map(step, embeddings, batch_size=max(1, min(batch, _CHUNK // max(1, size))))


def differences(x: jax.Array, y: jax.Array) -> jax.Array:
    """The differences x - y, [batch, features]; exactly 0 for an example in which the two agree up to rounding.

    XLA may compute what is one number twice, with and without fusing the product that it comes from into the difference: an
    example would have a distance from itself that is positive, and a direction.
    """
    difference = x - y
    together = jnp.abs(difference) <= 2.0**-22 * jnp.maximum(jnp.abs(x), jnp.abs(y))
    return jnp.where(jnp.all(together, axis=1, keepdims=True), 0.0, difference)


def _huber(x: jax.Array) -> jax.Array:
    magnitude = jnp.abs(x)
    return jnp.where(magnitude < 1, jnp.square(x) / 2, magnitude - 0.5)


def _adjacent_products(differences: jax.Array, where: jax.Array | None) -> jax.Array:
    """The mean over neighbouring examples, among those kept, of the inner products of their differences."""
    if where is None:
        where = jnp.ones(differences.shape[0], jnp.bool_)
    # Brings those that are kept to the front, in their order.
    order = jnp.argsort(~where, stable=True)
    differences, where = differences[order], where[order]
    return numerics.masked_mean(jnp.sum(differences[:-1] * differences[1:], axis=1), 0, where[1:])
