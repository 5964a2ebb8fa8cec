"""Losses for large vocabularies against float64 oracles, against `soft_targets` of all logits, and what they promise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.logit_checks import EXTREME_ROWS, assert_slope, doubles, random
from helpers.oracles import kl, log_softmax
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kdjax import losses

ROWS, CLASSES = 4, 6
INF = float('inf')
EXAMPLES = settings(max_examples=25, deadline=None, derandomize=True, database=None)
LOGITS = arrays(np.float32, (ROWS, CLASSES), elements=st.floats(-8, 8, width=32))
TEMPERATURES = st.sampled_from([0.5, 1.0, 4.0])


def logsumexp(z):
    """log Σ exp z over the last axis; -inf for nothing."""
    return np.log(np.sum(np.exp(z), axis=-1))


def values_and_gradients(loss, *arguments):
    """The values, and the gradients of their sum with respect to all arguments."""
    values, pullback = jax.vjp(loss, *arguments)
    return values, pullback(jnp.ones_like(values))


@jax.jit
def soft_targets(student, teacher, temperature):
    """That of all logits."""
    loss = functools.partial(losses.soft_targets, temperature=temperature)
    return values_and_gradients(loss, student, teacher)


@functools.partial(jax.jit, static_argnames='k')
def top_k(student, teacher, temperature, k, where=None):
    """The loss of a triple that is made on the spot, with gradients through it."""

    def loss(student, teacher):
        triple = losses.top_k_logits(teacher, k, temperature=temperature, where=where)
        return losses.top_k_soft_targets(student, *triple, temperature=temperature, where=where)

    return values_and_gradients(loss, student, teacher)


def top_k_oracle(s, t, k, temperature):
    """T² · KL over the k largest and the sum of the rest."""
    # As XLA has it, 0 is larger than -0; which of equal logits is kept shows in the gradient.
    order = np.lexsort((np.signbit(t), -t), axis=-1)
    buckets = []
    for z in (t, s):
        log_p = np.take_along_axis(log_softmax(z / temperature), order, axis=-1)
        buckets.append(np.concatenate([log_p[..., :k], logsumexp(log_p[..., k:])[..., None]], axis=-1))
    return temperature**2 * kl(*buckets)


@pytest.mark.parametrize('k', [1, 3])
@EXAMPLES
@given(LOGITS, LOGITS, TEMPERATURES)
def test_top_k_equals_the_oracle(k, student, teacher, temperature):
    values, gradients = jax.device_get(top_k(student, teacher, temperature, k))
    s, t = doubles(student, teacher)
    expected = top_k_oracle(s, t, k, temperature)
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-5)
    assert_slope(lambda x: top_k_oracle(x, t, k, temperature), s, gradients[0])
    top = np.sort(t, axis=-1)[:, ::-1]
    if np.all(top[:, k - 1] - top[:, k] > 1e-4):  # else a step may change which are the largest
        assert_slope(lambda x: top_k_oracle(s, x, k, temperature), t, gradients[1], atol=1e-4)


@EXAMPLES
@given(LOGITS, LOGITS, TEMPERATURES)
def test_top_k_grows_with_k_from_zero_to_soft_targets(student, teacher, temperature):
    """Fewer buckets never tell two distributions further apart."""
    whole, gradients = jax.device_get(soft_targets(student, teacher, temperature))
    values = [jax.device_get(top_k(student, teacher, temperature, k)) for k in (1, 3, CLASSES)]
    previous = np.zeros(ROWS)
    for value, _ in values:
        assert np.all(value >= previous - 1e-5 * (1 + previous))
        previous = value
    np.testing.assert_allclose(previous, whole, rtol=1e-5, atol=1e-5)
    for x, y in zip(values[-1][1], gradients, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@EXAMPLES
@given(LOGITS, LOGITS, st.integers(-8, 0))
def test_top_k_is_never_negative_however_close(teacher, noise, exponent):
    values, _ = top_k(teacher + noise * np.float32(10.0**exponent), teacher, 4.0, 3)
    assert np.all(np.asarray(values) >= 0)


def test_top_k_of_equal_logits_is_zero_and_constants_do_not_matter():
    student, teacher = random(2, ROWS, CLASSES)
    values, gradients = top_k(teacher, teacher, 4.0, 2)
    np.testing.assert_allclose(values, 0, atol=1e-10)
    np.testing.assert_allclose(gradients, 0, atol=1e-5)
    shifted = top_k(student + 3, teacher - 5, 2.0, 2)
    np.testing.assert_allclose(shifted[0], top_k(student, teacher, 2.0, 2)[0], rtol=1e-5)


def test_top_k_logits_are_the_largest_their_classes_and_the_mass_of_the_rest_at_the_temperature():
    teacher = random(2, 2, CLASSES)
    logits, indices, rest = losses.top_k_logits(teacher, 2, temperature=3.0)
    order = np.argsort(-teacher, axis=-1)
    np.testing.assert_array_equal(indices, order[..., :2])
    np.testing.assert_array_equal(logits, np.take_along_axis(teacher, order, axis=-1)[..., :2])
    np.testing.assert_allclose(rest, logsumexp(np.take_along_axis(np.float64(teacher), order[..., 2:], -1) / 3), rtol=1e-6)
    assert (logits.dtype, indices.dtype, rest.dtype) == (jnp.float32, jnp.int32, jnp.float32)
    np.testing.assert_array_equal(losses.top_k_logits(teacher, CLASSES)[2], np.full((2, 2), -INF))
    default = losses.top_k_logits(teacher, 2)[2]
    np.testing.assert_array_equal(default, losses.top_k_logits(teacher, 2, temperature=4.0)[2])


def test_top_k_has_a_default_temperature_of_four_and_takes_other_axes_and_halves():
    student, teacher = random(2, ROWS, CLASSES)
    expected, _ = top_k(student, teacher, 4.0, 2)
    np.testing.assert_allclose(losses.top_k_soft_targets(student, *losses.top_k_logits(teacher, 2)), expected, rtol=1e-5)
    moved = losses.top_k_soft_targets(student.T, *losses.top_k_logits(teacher.T, 2, axis=0), axis=0)
    np.testing.assert_allclose(moved, expected, rtol=1e-5)
    half = [jnp.asarray(x, jnp.bfloat16) for x in (student, teacher)]
    values, gradients = top_k(*half, 4.0, 2)
    upcast, _ = top_k(*(x.astype(jnp.float32) for x in half), 4.0, 2)
    np.testing.assert_allclose(values, upcast, rtol=1e-6)
    assert values.dtype == jnp.float32
    assert all(gradient.dtype == jnp.bfloat16 for gradient in gradients)


@pytest.mark.parametrize('kept', [[0, 2, 3, 5], [1, 4], []])
def test_top_k_under_a_mask_is_that_of_the_slice(kept):
    """Also where more are asked for than are kept."""
    student, teacher = random(2, ROWS, CLASSES)
    where = np.isin(np.arange(CLASSES), kept)
    values, gradients = jax.device_get(top_k(student, teacher, 2.0, 3, where))
    if kept:
        expected, slopes = jax.device_get(top_k(student[:, kept], teacher[:, kept], 2.0, min(3, len(kept))))
        np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)
        for gradient, slope in zip(gradients, slopes, strict=True):
            np.testing.assert_allclose(gradient[:, kept], slope, rtol=1e-5, atol=1e-6)
    else:
        np.testing.assert_array_equal(values, 0)
    for gradient in gradients:
        np.testing.assert_array_equal(gradient[:, ~where], 0)


@pytest.mark.parametrize('temperature', [0.5, 4.0])
@pytest.mark.parametrize('k', [1, 2, 4])
def test_top_k_is_finite_for_every_pair_of_extreme_rows(temperature, k):
    student, teacher = (np.stack(x) for x in zip(*[(s, t) for s in EXTREME_ROWS for t in EXTREME_ROWS], strict=True))
    values, gradients = jax.device_get(top_k(student, teacher, temperature, k))
    assert np.all(np.isfinite(values))
    assert np.all(values >= 0)
    assert np.all(np.isfinite(gradients))


@pytest.mark.parametrize('temperature', [0.5, 4.0])
def test_top_k_of_all_classes_is_soft_targets_for_every_pair_of_extreme_rows(temperature):
    """There is no rest then, whatever the rows, and its bucket must not count."""
    student, teacher = (np.stack(x) for x in zip(*[(s, t) for s in EXTREME_ROWS for t in EXTREME_ROWS], strict=True))
    values, _ = top_k(student, teacher, temperature, 4)
    np.testing.assert_allclose(values, soft_targets(student, teacher, temperature)[0], rtol=1e-5, atol=1e-5)


def test_top_k_takes_classes_in_the_middle():
    student, teacher = random(2, 2, 3, CLASSES)
    logits, indices, rest = losses.top_k_logits(teacher, 2)
    expected = losses.top_k_soft_targets(student, logits, indices, rest)
    for axis in (0, 1):
        triple = losses.top_k_logits(np.moveaxis(teacher, -1, axis), 2, axis=axis)
        for x, y in zip(triple, (jnp.moveaxis(logits, -1, axis), jnp.moveaxis(indices, -1, axis), rest), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-6)
        value = losses.top_k_soft_targets(np.moveaxis(student, -1, axis), *triple, axis=axis)
        np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_classes_that_are_not_there_are_refused_and_nan_where_traced():
    student, teacher = random(2, 2, CLASSES)
    loss = jax.jit(losses.top_k_soft_targets)
    for index in (-1, CLASSES):
        indices = np.array([[0, 1], [0, index]])
        triple = teacher[:, :2], indices, teacher[:, 2]
        with pytest.raises(ValueError, match=rf'^top_k_soft_targets: top_indices must be in \[0, {CLASSES}\), got {index}$'):
            losses.top_k_soft_targets(student, *triple)
        np.testing.assert_array_equal(np.isnan(loss(student, *triple)), [False, True])
        assert np.all(np.isnan(jax.jit(losses.subset_soft_targets)(student, teacher[:, :2], indices[1])))


def test_a_single_logit_has_nothing_to_be_compared_with():
    one, two = np.ones((3, 1), np.float32), np.ones((3, 2), np.float32)
    for call in (
        lambda: losses.top_k_soft_targets(one, one, np.zeros((3, 1), int), one[:, 0]),
        lambda: losses.top_k_logits(one, 1),
        lambda: losses.subset_soft_targets(two, one, [1]),
    ):
        with pytest.raises(ValueError, match=r'^\w+: logits \(3, 1\) [^\n]+ two classes or more: [^\n]+$'):
            call()


@pytest.mark.parametrize(
    'shapes, indices, parts',
    [
        (((3, 5), (3, 2), (3,)), np.zeros((3, 3), np.int32), ['(3, 5)', '(3, 2)', '(3, 3)']),
        (((3, 5), (4, 2), (3,)), np.zeros((4, 2), np.int32), ['(3, 5)', '(4, 2)']),
        (((3, 5), (3, 2), (4,)), np.zeros((3, 2), np.int32), ['(3, 5)', '(4,)']),
        (((3, 5), (2,), (3,)), np.zeros((2,), np.int32), ['(3, 5)', '(2,)']),
        (((3, 5), (3, 2), (3,)), np.zeros((3, 2), np.float32), ['integer', 'float32']),
    ],
)
def test_triples_that_do_not_fit_are_named(shapes, indices, parts):
    student, logits, rest = (np.zeros(shape, np.float32) for shape in shapes)
    with pytest.raises(ValueError, match=r'^top_k_soft_targets: [^\n]+$') as error:
        losses.top_k_soft_targets(student, logits, indices, rest)
    assert all(part in str(error.value) for part in parts)


def test_what_is_no_logit_no_k_or_no_temperature_is_refused():
    student = np.zeros((3, 5), np.float32)
    triple = losses.top_k_logits(student, 2)
    for i, name in enumerate(('student', 'top_logits', None, 'rest')):
        arguments = [student, *triple]
        arguments[i] = np.zeros(arguments[i].shape, np.complex64)
        with pytest.raises(ValueError, match=f'^top_k_soft_targets: .*{name or "top_indices"} must be'):
            losses.top_k_soft_targets(*arguments)
    for options in ({'axis': 2}, {'temperature': 0.0}, {'where': np.ones(5)}):
        with pytest.raises(ValueError, match=r'^top_k_soft_targets: [^\n]+$'):
            losses.top_k_soft_targets(student, *triple, **options)
        with pytest.raises(ValueError, match=r'^top_k_logits: [^\n]+$'):
            losses.top_k_logits(student, 2, **options)
    for k in (0, 6):
        with pytest.raises(ValueError, match=f'^top_k_logits: k must be between 1 and the number of classes, 5, got {k}$'):
            losses.top_k_logits(student, k)
    with pytest.raises(ValueError, match=r'^top_k_logits: teacher must be floating point, got int32$'):
        losses.top_k_logits(student.astype(np.int32), 2)


@jax.jit
def subset(student, teacher, classes, temperature=4.0):
    """The loss and its gradients; `classes` are traced."""
    loss = functools.partial(losses.subset_soft_targets, classes=classes, temperature=temperature)
    return values_and_gradients(lambda s, t: loss(s, t), student, teacher)


@EXAMPLES
@given(LOGITS, LOGITS, st.permutations(range(CLASSES)), TEMPERATURES)
def test_a_subset_is_soft_targets_of_the_students_logits_of_those_classes(student, teacher, order, temperature):
    """In the teacher's order. The student's other logits have no gradient."""
    classes = np.array(order[:4])
    values, gradients = jax.device_get(subset(student, teacher[:, :4], classes, temperature))
    s, t = doubles(student[:, classes], teacher[:, :4])

    def oracle(s, t):
        return temperature**2 * kl(log_softmax(t / temperature), log_softmax(s / temperature))

    np.testing.assert_allclose(values, oracle(s, t), rtol=1e-5, atol=1e-5)
    assert_slope(lambda x: oracle(x, t), s, gradients[0][:, classes])
    assert_slope(lambda x: oracle(s, x), t, gradients[1], atol=1e-4)
    np.testing.assert_array_equal(gradients[0][:, order[4:]], 0)


def test_a_subset_may_be_a_list_an_array_or_all_classes():
    student, teacher = random(2, ROWS, CLASSES)
    values = losses.subset_soft_targets(student, teacher[:, :2], [4, 1])
    np.testing.assert_array_equal(losses.subset_soft_targets(student, teacher[:, :2], (4, 1)), values)
    np.testing.assert_array_equal(losses.subset_soft_targets(student, teacher[:, :2], jnp.array([4, 1])), values)
    np.testing.assert_allclose(subset(student, teacher[:, :2], jnp.array([4, 1]))[0], values, rtol=1e-5)
    whole = losses.subset_soft_targets(student, teacher, range(CLASSES))
    np.testing.assert_allclose(whole, losses.soft_targets(student, teacher), rtol=1e-6)


def test_a_mask_of_a_subset_is_over_the_classes_of_the_teacher():
    student, teacher = random(2, ROWS, CLASSES)
    masked = losses.subset_soft_targets(student, teacher[:, :3], [5, 0, 2], where=np.array([True, False, True]))
    sliced = losses.subset_soft_targets(student, teacher[:, [0, 2]], [5, 2])
    np.testing.assert_allclose(masked, sliced, rtol=1e-5)


@pytest.mark.parametrize(
    'classes, part',
    [([0, 0], 'repeat'), ([0, 5], 'in [0, 5)'), ([-1, 0], 'in [0, 5)'), ([[0, 1]], '(1, 2)'), ([0.0, 1.0], 'float64')],
)
def test_classes_that_cannot_be_are_refused(classes, part):
    with pytest.raises(ValueError, match=r'^subset_soft_targets: classes must [^\n]+$') as error:
        losses.subset_soft_targets(np.zeros((3, 5), np.float32), np.zeros((3, 2), np.float32), classes)
    assert part in str(error.value)
