"""CRD, contrastive representation distillation, and the memory bank, the negatives and the constant that it needs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kdjax import numerics
from kdjax.losses._embeddings import count, unit_embeddings
from kdjax.meshes import on_any_mesh


@on_any_mesh
def crd(
    student: ArrayLike,
    teacher: ArrayLike,
    student_memory: ArrayLike,
    teacher_memory: ArrayLike,
    *,
    examples: int,
    student_normalizer: ArrayLike | None = None,
    teacher_normalizer: ArrayLike | None = None,
    temperature: ArrayLike = 0.07,
    epsilon: float = 1e-7,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """CRD, contrastive representation distillation: tell an example's own row of a memory from K others, per example.

    Both directions: the student's embedding v against rows w_0 (its own) ... w_K of the teacher's bank, and the teacher's
    against the student's. Each is -log h_0 - Σ_k log(1 - h_k), with h = p / (p + K / examples + ε), p = exp(⟨v, w⟩ / T) / Z.
    Published code leaves ε out of the numerator of 1 - h. All is done in log space: h is the sigmoid of a difference of logs.

    Z is published as `examples` times the mean exponential of the first batch, never changed after it: compute it once with
    `crd_normalizer` and hand it on. With None it is that of this batch, without a gradient. The banks have none either where
    they are the state of a training run.

    Args:
      student: embeddings [batch, ..., channels], floating point of any precision; arithmetic is in float32. They are divided
        by their L2 norms here.
      teacher: embeddings of the same width.
      student_memory: rows of the student's bank, [batch, 1 + K, channels]: each example's own, then its negatives. Taken as
        they are: `crd_update_memory` keeps their norms at 1.
      teacher_memory: rows of the teacher's bank for the same examples, of the same shape.
      examples: how many rows a bank has.
      student_normalizer: Z of the student's embeddings against the teacher's bank, a scalar.
      teacher_normalizer: Z of the teacher's embeddings against the student's bank, a scalar.
      temperature: T > 0, a number or a traced scalar.
      epsilon: ε > 0.
      axis: the channel axis of student and teacher.
      where: boolean [batch] or [batch, positions]: what to keep, as in `info_nce`.

    Returns:
      float32 [batch], in nats, never negative; 0 for examples that are not kept. NaN where an embedding or a row is, for all of
      the batch where Z is the batch's.

    Raises:
      ValueError: shapes or dtypes do not fit, or a hyperparameter is not positive.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[1., 0.]]), jnp.array([[0., 2.]])
    >>> memory = jnp.array([[[1., 0.], [0., 1.], [-1., 0.]]])
    >>> print(crd(student, teacher, memory, memory, examples=10, temperature=1.0))
    [3.454]

    Reference:
      Tian, Krishnan, Isola. Contrastive Representation Distillation. 2020. https://arxiv.org/abs/1910.10699
    """
    numerics.check_positive('crd', examples=examples, temperature=temperature, epsilon=epsilon)
    for name, normalizer in (('student_normalizer', student_normalizer), ('teacher_normalizer', teacher_normalizer)):
        numerics.check_scalars('crd', **{name: 1.0 if normalizer is None else normalizer})
    student, teacher, where = unit_embeddings('crd', student, teacher, axis, where)
    total = jnp.zeros(student.shape[0], jnp.float32)
    for embedding, name, memory, normalizer in (
        (student, 'teacher_memory', teacher_memory, student_normalizer),
        (teacher, 'student_memory', student_memory, teacher_normalizer),
    ):
        scores = _scores('crd', embedding, name, memory, temperature, where)
        if normalizer is None:
            log_normalizer = jax.lax.stop_gradient(_log_normalizer(scores, examples, where))
        else:
            log_normalizer = jnp.log(jnp.asarray(normalizer, jnp.float32))
        noise = (scores.shape[1] - 1) / examples + epsilon
        odds = scores - log_normalizer - jnp.log(jnp.float32(noise))
        total -= jax.nn.log_sigmoid(odds[:, 0]) + jnp.sum(jax.nn.log_sigmoid(-odds[:, 1:]), axis=1)
    return total if where is None else jnp.where(where, total, 0.0)


@on_any_mesh
def crd_normalizer(
    embedding: ArrayLike,
    memory: ArrayLike,
    *,
    examples: int,
    temperature: ArrayLike = 0.07,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """The constant Z of `crd` from a first batch, a scalar: `examples` times the mean of exp(⟨v, w⟩ / T).

    float32 holds it for T above 0.015 or so.

    Args:
      embedding: one network's embeddings [batch, ..., channels]; they are divided by their L2 norms here.
      memory: rows of the other network's bank, [batch, 1 + K, channels].
      examples: how many rows a bank has.
      temperature: T > 0.
      axis: the channel axis of the embedding.
      where: boolean [batch] or [batch, positions]: what to keep, as in `info_nce`.

    Returns:
      float32 scalar, without a gradient.

    Raises:
      ValueError: shapes or dtypes do not fit, or a hyperparameter is not positive.

    >>> import jax.numpy as jnp
    >>> print(crd_normalizer(jnp.array([[5., 0.]]), jnp.array([[[1., 0.], [0., 1.]]]), examples=10, temperature=1.0))
    18.59
    """
    numerics.check_positive('crd_normalizer', examples=examples, temperature=temperature)
    embedding, _, where = unit_embeddings('crd_normalizer', embedding, embedding, axis, where)
    scores = _scores('crd_normalizer', embedding, 'memory', memory, temperature, where)
    return jax.lax.stop_gradient(jnp.exp(_log_normalizer(scores, examples, where)))


class ClassIndex(NamedTuple):
    """The training examples sorted by class, as `class_index` makes it: all that `crd_negatives` needs to know of the labels.

    `order` are the examples sorted by class. The class of example i is at `order[starts[i] : starts[i] + counts[i]]`.
    """

    order: jax.Array
    starts: jax.Array
    counts: jax.Array


def class_index(labels: ArrayLike) -> ClassIndex:
    """Sorts the labels of all training examples, once, for `crd_negatives`. An example without a label is a class of its own.

    Args:
      labels: integers [examples]; negative where unknown.

    Returns:
      Three int32 arrays [examples].

    Raises:
      ValueError: the labels are not integers [examples], or all examples are of one class, which leaves no negatives.

    >>> print(class_index([1, 0, 1, -1]).counts)
    [2 1 2 1]
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f'class_index: labels must be integers [examples], got {labels.dtype} {labels.shape}')
    labels = labels.astype(np.int64)
    unknown = np.flatnonzero(labels < 0)
    labels[unknown] = -1 - unknown
    _, classes, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    if len(sizes) < 2:
        raise ValueError('class_index: all examples are of one class, so that none has a negative')
    starts = np.cumsum(sizes) - sizes
    columns = np.argsort(classes, kind='stable'), starts[classes], sizes[classes]
    return ClassIndex(*(jnp.asarray(column, jnp.int32) for column in columns))


@on_any_mesh
def crd_negatives(key: jax.Array, indices: ArrayLike, index: ClassIndex, size: int) -> jax.Array:
    """Draws examples of other classes for each example of a batch, uniformly and with replacement.

    Costs one random integer and one look-up per negative, however many classes there are. The negatives of an unlabelled
    example are all but itself; unlabelled examples are negatives of all others.

    Args:
      key: a random key.
      indices: which training examples make up the batch, integers [batch] in [0, examples).
      index: `class_index` of the labels of all training examples.
      size: how many to draw for each, K.

    Returns:
      int32 [batch, K], indices of training examples. Where the batch's own are traced, those for one outside of [0, examples)
      are `examples`, which no row has: `jnp.take(bank, rows, axis=0, mode='fill', fill_value=jnp.nan)` has `crd` give NaN.

    Raises:
      ValueError: the indices are not integers [batch], or are known and outside of [0, examples).

    >>> index = class_index([0, 0, 1])
    >>> print(crd_negatives(jax.random.key(0), jnp.array([0, 1]), index, 3))
    [[2 2 2]
     [2 2 2]]
    """
    _check_vector('crd_negatives', indices)
    examples = index.order.shape[0]
    indices = numerics.check_indices('crd_negatives', 'indices', indices, examples)
    starts, counts = (x.at[indices].get(mode='clip')[:, None] for x in (index.starts, index.counts))
    drawn = jax.random.randint(key, (indices.shape[0], size), 0, examples - counts)
    negatives = index.order[jnp.where(drawn < starts, drawn, drawn + counts)]
    return jnp.where(indices[:, None] < examples, negatives, examples)


@on_any_mesh
def crd_update_memory(
    bank: ArrayLike,
    indices: ArrayLike,
    embedding: ArrayLike,
    *,
    momentum: ArrayLike = 0.5,
    where: ArrayLike | None = None,
) -> jax.Array:
    """The bank with the batch's rows moved towards their new embeddings: l2norm(m · row + (1 - m) · l2norm(embedding)).

    Rows may lie on several devices, and the bank may be donated.

    Args:
      bank: float32 [examples, channels].
      indices: the examples of the batch, integers [batch] in [0, examples), each at most once among those kept.
      embedding: their embeddings [batch, channels], floating point of any precision.
      momentum: m in [0, 1].
      where: boolean [batch]: the rows of the others stay as they are.

    Returns:
      A bank of the same shape and dtype. Where the indices are traced and one that is kept is outside of [0, examples), its
      last row is NaN.

    Raises:
      ValueError: shapes or dtypes do not fit, the momentum does not, or indices are known and outside of [0, examples).

    >>> import jax.numpy as jnp
    >>> print(crd_update_memory(jnp.eye(3, 2), jnp.array([0]), jnp.array([[0., 7.]])))
    [[0.707 0.707]
     [0.    1.   ]
     [0.    0.   ]]

    Reference:
      Wu, Xiong, Yu, Lin. Unsupervised Feature Learning via Non-Parametric Instance Discrimination. 2018.
      https://arxiv.org/abs/1805.01978
    """
    numerics.check_share('crd_update_memory', momentum=momentum)
    _check_vector('crd_update_memory', indices)
    bank = jnp.asarray(bank)
    embedding = numerics.as_float32('crd_update_memory: embedding', embedding)
    batch = jnp.shape(indices)[0]
    if bank.ndim != 2 or embedding.shape != (batch, bank.shape[1]):
        raise ValueError(
            f'crd_update_memory: embedding {embedding.shape} must be [batch, channels] for {batch} indices into a '
            f'bank {bank.shape}'
        )
    where = numerics.mask('crd_update_memory', True if where is None else where, (batch,), 0)
    examples = bank.shape[0]
    indices = numerics.check_indices('crd_update_memory', 'indices', jnp.where(where, indices, 0), examples)
    momentum = jnp.asarray(momentum, jnp.float32)
    rows = bank.at[indices].get(mode='clip').astype(jnp.float32)
    rows = numerics.l2_normalize(momentum * rows + (1 - momentum) * numerics.l2_normalize(embedding, axis=1), axis=1)
    # No row has the number `examples`: what is written to it is dropped.
    bank = bank.at[jnp.where(where, indices, examples)].set(rows.astype(bank.dtype), mode='drop')
    lost = jnp.any(where & (indices == examples))
    return bank.at[jnp.where(lost, examples - 1, examples)].set(jnp.nan, mode='drop')


def _scores(
    loss: str, embedding: jax.Array, name: str, memory: ArrayLike, temperature: ArrayLike, where: jax.Array | None
) -> jax.Array:
    """⟨v, w⟩ / T, [batch, 1 + K]; 0 for examples outside `where`."""
    memory = numerics.finite_or_nan(numerics.as_float32(f'{loss}: {name}', memory))
    batch, width = embedding.shape
    if memory.ndim != 3 or memory.shape[::2] != (batch, width) or memory.shape[1] < 2:
        raise ValueError(f'{loss}: {name} {memory.shape} must be [{batch}, 1 + K, {width}] for embeddings {embedding.shape}')
    if where is not None:
        memory = jnp.where(where[:, None, None], memory, 0.0)
    products = jnp.einsum('bd,bkd->bk', embedding, memory, precision=jax.lax.Precision.HIGHEST)
    return products / jnp.asarray(temperature, jnp.float32)


def _log_normalizer(scores: jax.Array, examples: int, where: jax.Array | None) -> jax.Array:
    """The logarithm of Z; examples outside `where` are not counted."""
    kept = None if where is None else jnp.broadcast_to(where[:, None], scores.shape)
    total = jax.nn.logsumexp(scores, where=kept)
    log_mean = total - jnp.log(count(scores, where) * scores.shape[1])
    return jnp.where(jnp.isneginf(total), 0.0, log_mean) + jnp.log(jnp.float32(examples))


def _check_vector(function: str, indices: ArrayLike) -> None:
    indices = indices if isinstance(indices, jax.Array) else np.asarray(indices)
    if indices.ndim != 1 or not jnp.issubdtype(indices.dtype, jnp.integer):
        raise ValueError(f'{function}: indices must be integers [batch], got {indices.dtype} {indices.shape}')
