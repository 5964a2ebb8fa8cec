"""Losses between networks with other tokens, over spans of text at whose ends both have one: see `kdjax.data.align_tokens`."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import numerics
from kdjax.losses._sampled import of_tokens
from kdjax.losses._universal_logit import difference_when_sorted
from kdjax.meshes import on_any_mesh

# The distance of a float32 below 1 from 1: no softmax says more of how sure it is.
_SMALLEST = 2.0**-24


@on_any_mesh
def span_log_probabilities(log_probabilities: ArrayLike, spans: ArrayLike, number: int) -> jax.Array:
    """Log-probabilities of spans of tokens: the sums of those of their tokens, each given all before it.

    log p(span) = Σ_i log p(y_i | y_<i) over its tokens: the probabilities are multiplied. What one network says of a span
    compares with what another says of the same text in tokens of its own.

    Args:
      log_probabilities: [..., length] of the tokens themselves, floating point; arithmetic is in float32.
      spans: integers [..., length], the span of each token as `data.align_tokens` numbers them; one outside of [0, number) is
        none, and what stands there is not seen.
      number: how many spans to return.

    Returns:
      float32 [..., number], in nats; 0 where no token is of a span.

    Raises:
      ValueError: shapes or dtypes do not fit.

    >>> import jax.numpy as jnp
    >>> tokens = jnp.log(jnp.array([[0.9, 0.5, 0.5, 0.5]]))
    >>> print(jnp.exp(span_log_probabilities(tokens, jnp.array([[-1, 0, 0, 1]]), 2)))
    [[0.25 0.5 ]]
    """
    log_p = numerics.floating('span_log_probabilities', log_probabilities)
    spans = _check_spans('span_log_probabilities', 'spans', spans, log_p.shape)
    return _sums(log_p, spans, number)


@on_any_mesh
def approximate_likelihood_matching(
    student: ArrayLike, teacher: ArrayLike, *, temperature: ArrayLike = 1.0, where: ArrayLike | None = None
) -> jax.Array:
    """ALM: divergence between what both networks say of a span of text, that it comes or that another does, per span.

    p_t log (p_t / p_s) + (1 - p_t) log ((1 - p_t) / (1 - p_s)) with the probabilities p = p(span)^(1 / T). Only the text itself
    is compared, so that tokens may differ; a T far above 1, such as 100, compares log-probabilities rather than probabilities,
    which those of long spans are all near 0 of. Published code has the cross-entropy, which has the same gradient.

    Args:
      student: log-probabilities of spans, [...], from `span_log_probabilities`; floating point, arithmetic is in float32.
      teacher: log-probabilities of the same spans.
      temperature: T > 0, a number or a traced scalar; there is no factor for it.
      where: boolean, broadcastable to them: spans to keep.

    Returns:
      float32 of that shape, in nats, never negative; 0 where a span is not kept.

    Raises:
      ValueError: the shapes differ, a dtype is not floating point, the temperature does not fit, or a log-probability that is
        known is above 0.

    >>> import jax.numpy as jnp
    >>> print(approximate_likelihood_matching(jnp.log(jnp.array([0.5])), jnp.log(jnp.array([0.25]))))
    [0.131]

    Reference:
      Minixhofer, Vulić, Ponti. Universal Cross-Tokenizer Distillation via Approximate Likelihood Matching. 2025.
      https://arxiv.org/abs/2503.20083
    """
    numerics.check_positive('approximate_likelihood_matching', temperature=temperature)
    pair = of_tokens('approximate_likelihood_matching', student, teacher, where, smallest=numerics.LOG_ZERO)
    sides = []
    for log_p in pair[:2]:
        scaled = jnp.minimum(log_p, -_SMALLEST) / jnp.asarray(temperature, jnp.float32)
        sides.append(jnp.stack([scaled, jnp.log(-jnp.expm1(scaled))], axis=-1))
    values = numerics.divergence(sides[1], sides[0])
    return values if pair[2] is None else jnp.where(pair[2], values, 0.0)


@on_any_mesh
def span_universal_logit(
    student: ArrayLike,
    teacher: ArrayLike,
    student_labels: ArrayLike,
    teacher_labels: ArrayLike,
    student_spans: ArrayLike,
    teacher_spans: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
) -> jax.Array:
    """GOLD's form of ULD: difference of both networks' sorted probabilities at spans of text, whatever their tokens, per span.

    Σ_i |P_s(i) - P_t(i)| as in `universal_logit`, where P is what a network says at the first token of a span, times the
    probabilities of the actual tokens that follow in it: P(v) = p(v) · Π_{j > 1} p(y_j | y_<j). At the actual first token it is
    the probability of the span; at others it is too small or too large, since what would follow them is not known, and the sum
    is below 1. Where all spans are single tokens of both sides it is `universal_logit`. GOLD compares the tokens that both
    vocabularies have by name with GKD's divergence instead, and takes the mean over spans in each text, then over texts.

    Args:
      student: logits [..., length, classes], floating point of any precision; arithmetic is in float32.
      teacher: logits [..., other length, other classes].
      student_labels: integers [..., length], the token that each position of the student's logits says the probability of.
      teacher_labels: integers [..., other length].
      student_spans: integers [..., length], the span of each label as `data.align_tokens` numbers them; those outside of
        [0, spans) are none. What stands there is not seen.
      teacher_spans: integers [..., other length].
      temperature: T > 0 of both, a number or a traced scalar.

    Returns:
      float32 [..., spans], from 0 to 2, with as many spans as the shorter side has tokens; 0 where a side has none of a span.

    Raises:
      ValueError: shapes or dtypes do not fit, a label that is known is beyond the classes, there is a single class, or the
        temperature does not fit.

    >>> import jax.numpy as jnp
    >>> student = jnp.log(jnp.array([[[0.5, 0.5], [0.5, 0.5]]]))
    >>> teacher = jnp.log(jnp.array([[[0.5, 0.25, 0.25]]]))
    >>> labels, spans = (jnp.array([[0, 1]]), jnp.array([[2]])), (jnp.array([[0, 0]]), jnp.array([[0]]))
    >>> print(span_universal_logit(student, teacher, *labels, *spans))
    [[0.5]]

    References:
      Patiño, Rasul, Gallouédec et al. Unlocking On-Policy Distillation for Any Model Family. 2025.
      https://huggingface.co/spaces/HuggingFaceH4/general-on-policy-logit-distillation
      Boizard, El Haddad, Hudelot, Colombo. Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for
      LLMs. 2024. https://arxiv.org/abs/2402.12030
    """
    loss = 'span_universal_logit'
    numerics.check_positive(loss, temperature=temperature)
    zero = numerics.log_zero(student, teacher)
    shapes = jnp.shape(student), jnp.shape(teacher)
    if min(map(len, shapes)) < 2 or shapes[0][:-2] != shapes[1][:-2]:
        raise ValueError(
            f'{loss}: student {shapes[0]} and teacher {shapes[1]} must be [..., length, classes], alike before these'
        )
    number = min(shapes[0][-2], shapes[1][-2])
    given = (
        ('student', student, student_labels, student_spans),
        ('teacher', teacher, teacher_labels, teacher_spans),
    )
    there, sides, wrong = jnp.bool_(True), [], jnp.bool_(False)
    for side, logits, labels, spans in given:
        logits = numerics.as_float32(f'{loss}: {side}', logits)
        numerics.check_classes(loss, logits.shape)
        spans = _check_spans(loss, f'{side}_spans', spans, logits.shape[:-1])
        inside = (spans >= 0) & (spans < number)
        # Labels of no span may be anything; those of one must be classes.
        labels = numerics.check_labels(loss, labels, logits.shape[:-1])
        labels = numerics.check_labels(loss, jnp.where(inside, labels, -1), labels.shape, logits.shape[-1])
        log_p = numerics.log_softmax(jnp.where(inside[..., None], logits, 0.0), temperature, zero=zero)
        first = _first(spans, number)
        actual = jnp.take_along_axis(log_p, jnp.clip(labels, 0, logits.shape[-1] - 1)[..., None], axis=-1)[..., 0]
        index = jnp.arange(spans.shape[-1], dtype=jnp.int32)
        begins = _take(first, jnp.clip(spans, 0, number - 1)) == index.reshape((1,) * (spans.ndim - 1) + index.shape)
        rest = _sums(jnp.where(begins, 0.0, actual), spans, number)
        at_first = jnp.take_along_axis(log_p, jnp.minimum(first, len(index) - 1)[..., None], axis=-2)
        sides.append(jnp.exp(at_first + rest[..., None]))
        there = there & (first < len(index))
        wrong = wrong | (_sums((inside & ((labels < 0) | (labels >= logits.shape[-1]))).astype(jnp.float32), spans, number) > 0)
    values = difference_when_sorted(*sides)
    return jnp.where(there, jnp.where(wrong, jnp.nan, values), 0.0)


def _check_spans(loss: str, name: str, spans: ArrayLike, shape: tuple[int, ...]) -> jax.Array:
    spans = jnp.asarray(spans)
    if not jnp.issubdtype(spans.dtype, jnp.integer) or spans.shape != shape:
        raise ValueError(
            f'{loss}: {name} must be integers of the shape of the tokens, {shape}, got {spans.dtype} {spans.shape}'
        )
    return spans.astype(jnp.int32)


def _sums(x: jax.Array, spans: jax.Array, number: int) -> jax.Array:
    """Sums [..., number] of values [..., length] over the tokens of each span."""
    inside = (spans >= 0) & (spans < number)
    rows = jnp.arange(x[..., 0].size, dtype=jnp.int32)[:, None]
    columns = jnp.where(inside, spans, number).reshape(len(rows), -1)
    values = jnp.where(inside, x, 0.0).reshape(columns.shape)
    sums = jnp.zeros((len(rows), number), x.dtype).at[rows, columns].add(values, mode='drop')
    return sums.reshape(*x.shape[:-1], number)


def _first(spans: jax.Array, number: int) -> jax.Array:
    """The first token [..., number] of each span, and the length where there is none."""
    length = spans.shape[-1]
    rows = jnp.arange(spans[..., 0].size, dtype=jnp.int32)[:, None]
    columns = jnp.where((spans >= 0) & (spans < number), spans, number).reshape(len(rows), -1)
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], columns.shape)
    first = jnp.full((len(rows), number), length, jnp.int32).at[rows, columns].min(index, mode='drop')
    return first.reshape(*spans.shape[:-1], number)


def _take(x: jax.Array, indices: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, indices, axis=-1)
