"""Losses over spans of text, between networks with other tokens, against float64 numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.oracles import log_softmax

from kdjax import losses

RNG = np.random.default_rng(0)
STUDENT, TEACHER = (2 * RNG.normal(size=shape).astype(np.float32) for shape in ((2, 6, 5), (2, 5, 7)))
LABELS = RNG.integers(0, 5, (2, 6)).astype(np.int32), RNG.integers(0, 7, (2, 5)).astype(np.int32)
SPANS = (
    np.array([[-1, 0, 0, 1, 2, -1], [0, 0, 0, 1, -1, 1]], np.int32),
    np.array([[0, 1, -1, 1, 2], [0, -1, 1, 1, 2]], np.int32),
)


def merged(logits, labels, spans, span, temperature):
    """The distribution at the first token of a span, times what is said of those that follow; None where there are none."""
    tokens = np.flatnonzero(spans == span)
    if not len(tokens):
        return None
    p = np.exp(log_softmax(logits.astype(np.float64), temperature))
    return p[tokens[0]] * np.prod([p[i, labels[i]] for i in tokens[1:]])


def span_universal_logit(student, teacher, labels=LABELS, spans=SPANS, temperature=1.0):
    values = np.zeros((len(student), min(student.shape[1], teacher.shape[1])))
    for i, span in np.ndindex(values.shape):
        sides = [merged(x[i], y[i], z[i], span, temperature) for x, y, z in zip((student, teacher), labels, spans, strict=True)]
        if all(side is not None for side in sides):
            size = max(map(len, sides))
            one, other = (np.pad(np.sort(side)[::-1], (0, size - len(side))) for side in sides)
            values[i, span] = np.abs(one - other).sum()
    return values


@functools.partial(jax.jit, static_argnums=0)
def compiled(direct, student, teacher, labels, spans, temperature, weights):
    """Values, and gradients of their weighted sum by both networks, over spans or token by token."""

    def loss(student, teacher):
        if direct:
            values = losses.universal_logit(student, teacher, temperature=temperature)
        else:
            values = losses.span_universal_logit(student, teacher, *labels, *spans, temperature=temperature)
        return jnp.sum(weights * values), values

    (_, values), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(student, teacher)
    return values, gradients


WEIGHTS = np.array([[1.0, 0.5, 0.0, 2.0, 1.0]] * 2, np.float32)


@pytest.mark.parametrize('temperature', [1.0, 2.0])
def test_merged_distributions_are_those_of_float64(temperature):
    values, gradients = compiled(False, STUDENT, TEACHER, LABELS, SPANS, np.float32(temperature), WEIGHTS)
    expected = span_universal_logit(STUDENT, TEACHER, temperature=temperature)
    assert (expected > 0).sum() == 5
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-7)
    # By differences, at some places.
    for side, arrays in enumerate((STUDENT, TEACHER)):
        for place in [(0, 1, 2), (0, 4, 0), (1, 0, 1), (1, 2, 3), (1, 3, 4)]:
            moved = [arrays.astype(np.float64), arrays.astype(np.float64)]
            moved[0][place] += 1e-5
            moved[1][place] -= 1e-5
            pairs = [(x, TEACHER) if side == 0 else (STUDENT, x) for x in moved]
            up, down = ((WEIGHTS * span_universal_logit(*pair, temperature=temperature)).sum() for pair in pairs)
            np.testing.assert_allclose(gradients[side][place], (up - down) / 2e-5, rtol=1e-3, atol=1e-6)


def test_single_tokens_on_both_sides_are_the_loss_of_each_token():
    teacher, spans = np.concatenate([TEACHER, TEACHER[:, :1]], axis=1), np.tile(np.arange(6, dtype=np.int32), (2, 1))
    labels, weights = (LABELS[0], np.pad(LABELS[1], ((0, 0), (0, 1)))), np.ones((2, 6), np.float32)
    values, gradients = compiled(False, STUDENT, teacher, labels, (spans, spans), np.float32(1.5), weights)
    expected, of_tokens = compiled(True, STUDENT, teacher, labels, (spans, spans), np.float32(1.5), weights)
    np.testing.assert_array_equal(values, expected)
    for one, other in zip(gradients, of_tokens, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)


def test_what_is_of_no_span_is_never_seen():
    """Tokens outside of spans may hold anything, and get no gradient; spans of one side alone are none."""
    expected, of_both = compiled(False, STUDENT, TEACHER, LABELS, SPANS, np.float32(1.0), WEIGHTS)
    student, teacher = (np.where(x[..., None] < 0, np.nan, y) for x, y in zip(SPANS, (STUDENT, TEACHER), strict=True))
    labels = [np.where(x < 0, 99, y).astype(np.int32) for x, y in zip(SPANS, LABELS, strict=True)]
    spans = [np.where(x < 0, 77, x).astype(np.int32) for x in SPANS]
    values, gradients = compiled(False, student, teacher, tuple(labels), tuple(spans), np.float32(1.0), WEIGHTS)
    np.testing.assert_array_equal(values, expected)
    for one, other, numbers in zip(gradients, of_both, SPANS, strict=True):
        np.testing.assert_array_equal(one, other)
        assert np.all(np.asarray(one)[numbers < 0] == 0)
    assert values[1, 2] == 0  # the teacher alone has it


def test_extremes_have_finite_values_and_gradients_and_nan_stays_nan():
    student = STUDENT.copy()
    student[0, 1, 0] = student[0, 2, LABELS[0][0, 2]] = -np.inf
    student[1] *= 1e4
    values, gradients = compiled(False, student, TEACHER, LABELS, SPANS, np.float32(1.0), WEIGHTS)
    np.testing.assert_allclose(values[0], span_universal_logit(student, TEACHER)[0], rtol=1e-5, atol=1e-7)
    assert all(np.isfinite(x).all() for x in (values, *gradients))
    student[0, 4, 0] = np.nan
    values, _ = compiled(False, student, TEACHER, LABELS, SPANS, np.float32(1.0), WEIGHTS)
    assert np.isnan(values[0, 2])
    assert np.isfinite(values[0, :2]).all()
    # A traced label beyond the classes is no plausible number; one that is known is an error.
    labels = LABELS[0].copy(), LABELS[1]
    labels[0][0, 3] = 5
    values, _ = compiled(False, STUDENT, TEACHER, labels, SPANS, np.float32(1.0), WEIGHTS)
    assert np.isnan(values[0, 1])
    assert np.isfinite(values[0, 0])
    with pytest.raises(ValueError, match=r'^span_universal_logit: labels must be below the number of classes, 5, got 5'):
        losses.span_universal_logit(STUDENT, TEACHER, *labels, *SPANS)


def test_log_probabilities_of_spans_are_sums():
    log_p = -RNG.exponential(size=(2, 6)).astype(np.float32)
    expected = [[row[numbers == span].sum() for span in range(4)] for row, numbers in zip(log_p, SPANS[0], strict=True)]
    np.testing.assert_allclose(losses.span_log_probabilities(log_p, SPANS[0], 4), expected, rtol=1e-6)
    hidden = np.where(SPANS[0] < 0, np.nan, log_p)
    np.testing.assert_allclose(losses.span_log_probabilities(hidden, SPANS[0], 4), expected, rtol=1e-6)
    np.testing.assert_allclose(losses.span_log_probabilities(log_p[0], SPANS[0][0], 4), expected[0], rtol=1e-6)


def binary_divergence(s, t, temperature):
    s, t = (np.float64(x) / temperature for x in (s, t))
    p, q = np.exp(t), np.exp(s)
    return p * (t - s) + (1 - p) * (np.log1p(-p) - np.log1p(-q))


@pytest.mark.parametrize('temperature', [1.0, 100.0])
def test_likelihoods_of_spans_are_matched_as_float64_has_it(temperature):
    s, t = (-RNG.exponential(size=(2, 9)) * np.logspace(-5, 1.2, 9)).astype(np.float32)
    loss = jax.jit(functools.partial(losses.approximate_likelihood_matching, temperature=temperature))
    np.testing.assert_allclose(loss(s, t), binary_divergence(s, t, temperature), rtol=2e-3)
    np.testing.assert_array_equal(loss(s, s), np.zeros(9))
    gradient = jax.grad(lambda s: loss(s, t).sum())(s)
    step = 1e-4 * np.abs(np.float64(s))
    expected = (binary_divergence(s + step, t, temperature) - binary_divergence(s - step, t, temperature)) / (2 * step)
    np.testing.assert_allclose(gradient, expected, rtol=1e-3)


def test_sure_and_impossible_spans_cost_finite_numbers():
    s, t = (np.array(x, np.float32) for x in ([0, 0, -1e4, -1, -1e30], [0, -1, -1, -1e4, -1]))
    values, gradients = jax.value_and_grad(lambda s: losses.approximate_likelihood_matching(s, t).sum())(s)
    assert np.isfinite(values)
    assert np.isfinite(gradients).all()
    assert losses.approximate_likelihood_matching(s, t)[1] > 5
    where = np.array([True, False, True, True, True])
    np.testing.assert_array_equal(
        losses.approximate_likelihood_matching(np.where(where, s, np.nan), t, where=where),
        np.where(where, losses.approximate_likelihood_matching(s, t), 0),
    )
    with pytest.raises(ValueError, match=r'^approximate_likelihood_matching: student must be log probabilities'):
        losses.approximate_likelihood_matching(-s, t)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r'^span_universal_logit: student .* must be \[..., length, classes\], alike before'):
        losses.span_universal_logit(STUDENT[:1], TEACHER, *LABELS, *SPANS)
    with pytest.raises(ValueError, match=r'^span_universal_logit: teacher_spans must be integers of the shape of the tokens'):
        losses.span_universal_logit(STUDENT, TEACHER, *LABELS, SPANS[0], SPANS[0])
    with pytest.raises(ValueError, match=r'^span_universal_logit: labels .* must have the shape of the logits'):
        losses.span_universal_logit(STUDENT, TEACHER, LABELS[1], LABELS[1], *SPANS)
    with pytest.raises(ValueError, match=r'^span_log_probabilities: spans must be integers'):
        losses.span_log_probabilities(np.zeros((2, 6), np.float32), SPANS[0].astype(np.float32), 3)
