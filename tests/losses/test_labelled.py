"""Losses with labels against float64 oracles written from the papers' formulas, and the properties that those promise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import gradient_checks
from helpers.logit_checks import EXTREME_ROWS, row_gradient
from helpers.oracles import kl, softmax
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kdjax import losses

ROWS, CLASSES = 4, 5
INF = float('inf')
EXAMPLES = settings(max_examples=25, deadline=None, derandomize=True, database=None)
LOGITS = arrays(np.float32, (ROWS, CLASSES), elements=st.floats(-8, 8, width=32))
LABELS = arrays(np.int32, (ROWS,), elements=st.integers(0, CLASSES - 1))
MASKS = arrays(np.bool_, (ROWS, CLASSES))
TEMPERATURES = st.floats(0.5, 8)


def cross_entropy(p, q):
    """-Σ p log q."""
    return -np.sum(p * np.log(q))


def decoupled_kd(s, t, label, temperature, *, alpha=1.0, beta=8.0):
    """T² (α·TCKD + β·NCKD), with the pairs [p(y), Σ_{c≠y} p(c)] and the renormalised others; pairs of one class are equal."""
    pairs, others = [], []
    for z in (t, s):
        p = softmax(z, temperature)
        rest = np.delete(p, label)
        pairs.append(np.array([p[label], rest.sum()] if rest.size else [1.0]))
        others.append(rest / rest.sum() if rest.size else rest)
    return temperature**2 * (alpha * kl(*np.log(pairs)) + beta * kl(*np.log(others)))


def normalized_kd(s, t, label, temperature, *, gamma=1.5):
    """-p_t(y) log p_s(y) + γ T² · CE of the softmax of the others."""
    target = -softmax(t)[label] * np.log(softmax(s)[label])
    others = [softmax(np.delete(z, label), temperature) for z in (t, s)]
    return target + gamma * temperature**2 * cross_entropy(*others)


def weight_of_soft_labels(s, t, label):
    """1 - exp(-CE_s / (CE_t + 1e-7)), which the published code does not differentiate."""
    of_student, of_teacher = (-np.log(softmax(z)[label]) for z in (s, t))
    return 1 - np.exp(-of_student / (of_teacher + 1e-7))


def weighted_soft_labels(s, t, label, temperature, *, weight=None):
    """T² · w · CE(p_t, p_s)."""
    weight = weight_of_soft_labels(s, t, label) if weight is None else weight
    return temperature**2 * weight * cross_entropy(softmax(t, temperature), softmax(s, temperature))


def label_free_tuning(s, t, label, temperature, *, threshold=0.2):
    """T² KL from the teacher's distribution after it has been moved toward the label, by bisection, until that leads."""
    p = softmax(t, temperature)

    def lead(share):
        moved = (1 - share) * p
        moved[label] += share
        return moved[label] - np.delete(moved, label).max(initial=0.0), moved

    low, high = 0.0, 1.0
    for _ in range(60):
        low, high = (low, (low + high) / 2) if lead((low + high) / 2)[0] >= threshold else ((low + high) / 2, high)
    moved = p if lead(0.0)[0] >= threshold else lead(high)[1]
    return temperature**2 * kl(np.log(moved), np.log(softmax(s, temperature)))


def is_smooth(s, t, label, threshold=0.2, margin=1e-3):
    del s
    p = softmax(t)
    others = np.sort(np.delete(p, label))
    leads = others.size < 2 or others[-1] - others[-2] > margin
    return leads and abs(p[label] - others.max(initial=0.0) - threshold) > margin


ORACLES = {f.__name__: f for f in (decoupled_kd, normalized_kd, weighted_soft_labels, label_free_tuning)}
every_loss = pytest.mark.parametrize('name', list(ORACLES))


def by_rows(oracle, s, t, labels, where, **each):
    """The oracle on the kept classes of every row, the label among them; `each` holds one more argument for every row."""
    values = np.zeros(len(s))
    for i, keep in enumerate(where):
        more = {key: value[i] for key, value in each.items()}
        values[i] = oracle(s[i][keep], t[i][keep], np.flatnonzero(keep).tolist().index(labels[i]), **more)
    return values


def value_and_gradients(name, student, teacher, labels, temperature=2.0, where=None, **options):
    """With respect to student and teacher."""
    options = {key: np.float32(value) for key, value in {'temperature': temperature, **options}.items()}
    return gradient_checks.value_and_gradients(name, student, teacher, labels=labels, where=where, **options)


def values_of(name, *arguments, **options):
    """The values alone."""
    return value_and_gradients(name, *arguments, **options)[0]


@every_loss
@EXAMPLES
@given(LOGITS, LOGITS, LABELS, TEMPERATURES, MASKS)
def test_values_and_gradients_equal_the_oracle_under_any_mask(name, student, teacher, labels, temperature, where):
    """On sequences [batch, length, classes], which give [batch, length]."""
    where[np.arange(ROWS), labels] = True
    sequences = [x.reshape(2, 2, *x.shape[1:]) for x in (student, teacher, labels, where)]
    values, *gradients = value_and_gradients(name, *sequences[:3], temperature, sequences[3])
    s, t, temperature = student.astype(np.float64), teacher.astype(np.float64), float(np.float32(temperature))
    oracle = functools.partial(ORACLES[name], temperature=temperature)
    expected = by_rows(oracle, s, t, labels, where)
    assert values.shape == (2, 2)
    np.testing.assert_allclose(values.reshape(ROWS), expected, rtol=1e-5, atol=1e-5 * max(1.0, np.abs(expected).max()))
    constants = {'weight': by_rows(weight_of_soft_labels, s, t, labels, where)} if name == 'weighted_soft_labels' else {}
    oracle = functools.partial(by_rows, oracle, labels=labels, where=where, **constants)
    references = row_gradient(lambda x: oracle(x, t), s), row_gradient(lambda x: oracle(s, x), t)
    smooth = np.ones(ROWS, bool)
    if name == 'label_free_tuning':  # which has no derivative where two other classes lead, or the label just leads enough
        smooth = by_rows(is_smooth, s / temperature, t / temperature, labels, where) > 0
    for gradient, reference, kept in zip(gradients, references, (np.ones(ROWS, bool), smooth), strict=True):
        tolerance = 1e-5 * max(1.0, np.abs(reference).max())
        np.testing.assert_allclose(gradient.reshape(ROWS, CLASSES)[kept], reference[kept], rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize(
    'name, temperature, options',
    [
        ('decoupled_kd', 4.0, {'alpha': 0.7, 'beta': 3.0}),
        ('normalized_kd', 1.0, {'gamma': 0.3}),
        ('weighted_soft_labels', 2.0, {}),
        ('label_free_tuning', 1.0, {'threshold': 0.6}),
    ],
)
def test_defaults_are_the_published_ones_and_weights_weigh(name, temperature, options):
    student, teacher = np.random.default_rng(0).normal(size=(2, ROWS, CLASSES)).astype(np.float32)
    labels, where = np.array([0, 1, 2, 4]), np.ones((ROWS, CLASSES), bool)
    s, t = student.astype(np.float64), teacher.astype(np.float64)
    expected = by_rows(functools.partial(ORACLES[name], temperature=temperature), s, t, labels, where)
    np.testing.assert_allclose(getattr(losses, name)(student, teacher, labels), expected, rtol=1e-5)
    expected = by_rows(functools.partial(ORACLES[name], temperature=3.0, **options), s, t, labels, where)
    np.testing.assert_allclose(values_of(name, student, teacher, labels, 3.0, **options), expected, rtol=1e-5)


@EXAMPLES
@given(LOGITS, LABELS, TEMPERATURES)
def test_decoupled_kd_of_equal_logits_is_exactly_zero_with_zero_gradients(logits, labels, temperature):
    for result in value_and_gradients('decoupled_kd', logits, logits, labels, temperature):
        np.testing.assert_array_equal(result, 0.0)


@EXAMPLES
@given(LOGITS, LABELS)
def test_at_equal_logits_the_student_of_normalized_kd_still_wants_its_label(logits, labels):
    """∂/∂z_s of -p_t(y) log p_s(y) is -p_t(y) (1[c = y] - p_s(c)); the other term is at its minimum."""
    _, gradient, _ = value_and_gradients('normalized_kd', logits, logits, labels)
    p = softmax(logits)
    p_label = p[np.arange(ROWS), labels][:, None]
    np.testing.assert_allclose(gradient, -p_label * (np.eye(CLASSES)[labels] - p), rtol=1e-5, atol=2e-5)


@EXAMPLES
@given(LOGITS, LABELS)
def test_at_equal_logits_weighted_soft_labels_are_worth_one_less_one_over_e_and_no_gradient(logits, labels):
    values, gradient, _ = value_and_gradients('weighted_soft_labels', logits, logits, labels)
    p = softmax(logits, 2.0)
    of_label = np.array([-np.log(softmax(z)[y]) for z, y in zip(logits, labels, strict=True)])
    entropy = np.array([cross_entropy(row, row) for row in p])
    certain = of_label < 1e-3  # where the 1e-7 of the weight counts
    np.testing.assert_allclose(values[~certain], (4 * (1 - np.exp(-1)) * entropy)[~certain], rtol=1e-3)
    np.testing.assert_allclose(gradient, np.zeros_like(logits), atol=2e-6)


def test_weighted_soft_labels_weigh_little_where_the_student_beats_its_teacher():
    teacher = np.zeros((1, CLASSES), np.float32)
    confident, wrong = np.eye(CLASSES, dtype=np.float32)[[0]] * 12, np.eye(CLASSES, dtype=np.float32)[[1]] * 12
    soft = [-4 * np.log(softmax(z[0], 2.0)).mean() for z in (confident, wrong)]
    values = [values_of('weighted_soft_labels', z, teacher, np.array([0]))[0] for z in (confident, wrong)]
    assert values[0] < 1e-4 * soft[0]
    assert values[1] > 0.99 * soft[1]


@EXAMPLES
@given(LOGITS, LOGITS, LABELS, st.floats(0.1, 1e3), st.integers(-8, 0))
def test_decoupled_kd_is_never_negative_however_close(teacher, noise, labels, temperature, exponent):
    """Rounding alone turns the plain Σ p (log p - log q) negative near p = q."""
    student = teacher + noise * np.float32(10.0**exponent)
    assert np.all(values_of('decoupled_kd', student, teacher, labels, temperature) >= 0)


@every_loss
@EXAMPLES
@given(LOGITS, LOGITS, LABELS, *[arrays(np.int32, (ROWS, 1), elements=st.integers(-64, 64))] * 2)
def test_a_constant_added_to_all_logits_of_an_example_changes_nothing(name, student, teacher, labels, for_student, for_teacher):
    # On a grid of 1/64 the additions are exact.
    student, teacher = (np.round(x * 64) / np.float32(64) for x in (student, teacher))
    shifted = student + for_student.astype(np.float32), teacher + for_teacher.astype(np.float32)
    before, after = (value_and_gradients(name, *pair, labels) for pair in ((student, teacher), shifted))
    for x, y in zip(before, after, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * max(1.0, np.abs(x).max()))


@EXAMPLES
@given(LOGITS, LOGITS, LABELS, TEMPERATURES)
def test_soft_targets_is_target_class_plus_non_target_class_divergence(student, teacher, labels, temperature):
    """KD = TCKD + (1 - p_t(y))·NCKD."""
    target = values_of('decoupled_kd', student, teacher, labels, temperature, alpha=1.0, beta=0.0)
    others = values_of('decoupled_kd', student, teacher, labels, temperature, alpha=0.0, beta=1.0)
    rest = [1 - softmax(t, temperature)[y] for t, y in zip(teacher, labels, strict=True)]
    whole = jax.jit(losses.soft_targets)(student, teacher, temperature=temperature)
    np.testing.assert_allclose(whole, target + np.array(rest) * others, rtol=1e-5, atol=1e-5)


@EXAMPLES
@given(LOGITS, LOGITS, LABELS)
def test_non_target_part_is_soft_targets_with_the_labelled_class_deleted(student, teacher, labels):
    part = values_of('decoupled_kd', student, teacher, labels, 4.0, alpha=0.0, beta=1.0)
    keep = np.arange(CLASSES) != labels[:, None]
    deleted = (x[keep].reshape(ROWS, CLASSES - 1) for x in (student, teacher))
    np.testing.assert_allclose(part, jax.jit(losses.soft_targets)(*deleted), rtol=1e-5, atol=1e-5)


@EXAMPLES
@given(LOGITS, LOGITS, LABELS)
def test_confident_networks_keep_the_non_target_part(student, teacher, labels):
    """Where p(y) rounds to 1, log(1 - p(y)) would be -inf; the divergence of the others must not notice."""
    others = np.arange(CLASSES) != labels[:, None]
    confident = [np.where(others, x, np.float32(1e4)) for x in (student, teacher)]
    part = jax.jit(losses.soft_targets)(*(x[others].reshape(ROWS, CLASSES - 1) for x in (student, teacher)))
    values = values_of('decoupled_kd', *confident, labels, 4.0, alpha=1.0, beta=1.0)
    np.testing.assert_allclose(values, part, rtol=1e-5, atol=1e-5)
    entropies = [cross_entropy(*[softmax(t[keep], 4.0)] * 2) for t, keep in zip(teacher, others, strict=True)]
    values = values_of('normalized_kd', *confident, labels, 4.0, gamma=1.0)
    np.testing.assert_allclose(values, part + 16 * np.array(entropies), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize('certainty', [40.0, -40.0])
def test_target_part_sees_how_certain_a_student_is_beyond_what_one_minus_p_can_hold(certainty):
    """Where 1 - p(y) is below the last digit of 1, the teacher's other classes cost its log all the same."""
    student, teacher = np.random.default_rng(0).normal(size=(2, ROWS, CLASSES)).astype(np.float32)
    labels, where = np.array([0, 1, 2, 4]), np.ones((ROWS, CLASSES), bool)
    student += np.float32(certainty) * np.eye(CLASSES, dtype=np.float32)[labels]
    oracle = functools.partial(decoupled_kd, temperature=1.0, alpha=1.0, beta=0.0)
    expected = by_rows(oracle, student.astype(np.float64), teacher.astype(np.float64), labels, where)
    values = values_of('decoupled_kd', student, teacher, labels, 1.0, alpha=1.0, beta=0.0)
    np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_small_weights_of_soft_labels_keep_their_digits():
    """1 - exp(-x) of a student that is nearly right and a teacher that is very wrong, where x is 1e-4."""
    student, teacher = np.random.default_rng(0).normal(size=(2, ROWS, CLASSES)).astype(np.float32)
    labels, where = np.array([0, 1, 2, 4]), np.ones((ROWS, CLASSES), bool)
    of_label = np.eye(CLASSES, dtype=np.float32)[labels]
    student, teacher = student + 4 * of_label, teacher - 600 * of_label
    oracle = functools.partial(weighted_soft_labels, temperature=2.0)
    expected = by_rows(oracle, student.astype(np.float64), teacher.astype(np.float64), labels, where)
    np.testing.assert_allclose(values_of('weighted_soft_labels', student, teacher, labels, 2.0), expected, rtol=1e-5)


@every_loss
@EXAMPLES
@given(LOGITS, LOGITS, LABELS, st.permutations(range(CLASSES)))
def test_renaming_the_classes_changes_nothing(name, student, teacher, labels, order):
    order = np.array(order)
    values = values_of(name, student, teacher, labels)
    renamed = values_of(name, student[:, order], teacher[:, order], np.argsort(order)[labels].astype(np.int32))
    np.testing.assert_allclose(values, renamed, rtol=1e-5, atol=1e-5 * max(1.0, values.max()))


@every_loss
@pytest.mark.parametrize('temperature', [0.5, 4.0])
def test_values_and_gradients_are_finite_for_every_pair_of_extreme_rows(name, temperature):
    """±1e4, constant rows, and -inf; the label may be ruled out, or be the -1 of an example that has none."""
    pairs = [(s, t, y) for s in EXTREME_ROWS for t in EXTREME_ROWS for y in (0, 3, -1)]
    student, teacher, labels = (np.stack(x) for x in zip(*pairs, strict=True))
    values, *gradients = value_and_gradients(name, student, teacher, labels, temperature)
    assert np.all(np.isfinite(values))
    assert np.all(values >= 0)
    for gradient in gradients:
        assert np.all(np.isfinite(gradient))


@every_loss
def test_a_class_that_both_rule_out_is_as_good_as_sliced_away(name):
    student, teacher = np.random.default_rng(1).normal(size=(2, ROWS, CLASSES)).astype(np.float32)
    labels = np.array([0, 1, 1, 0])
    sliced = value_and_gradients(name, student[:, :3], teacher[:, :3], labels)
    student[:, 3:] = teacher[:, 3:] = -INF
    values, *gradients = value_and_gradients(name, student, teacher, labels)
    np.testing.assert_allclose(values, sliced[0], rtol=1e-6)
    for gradient, expected in zip(gradients, sliced[1:], strict=True):
        np.testing.assert_array_equal(gradient[:, 3:], 0.0)
        np.testing.assert_allclose(gradient[:, :3], expected, rtol=1e-5, atol=1e-6)


@every_loss
def test_one_example_gives_a_scalar(name):
    logits = jax.ShapeDtypeStruct((CLASSES,), jnp.float32)
    assert jax.eval_shape(getattr(losses, name), logits, logits, jax.ShapeDtypeStruct((), jnp.int32)).shape == ()


@pytest.mark.parametrize('temperature', [0.5, 1.0, 4.0])
@pytest.mark.parametrize('name', ['soft_targets', 'decoupled_kd'])
def test_where_equals_slicing_where_all_kept_classes_are_ruled_out(name, temperature):
    student, teacher = np.array([[-np.inf, -np.inf, 3, 1]], np.float32), np.array([[1, 2, 3, 1]], np.float32)
    where = np.array([True, True, False, False])
    labels = [np.array([0])] if name == 'decoupled_kd' else []
    loss = jax.jit(functools.partial(getattr(losses, name), temperature=temperature))
    np.testing.assert_allclose(
        loss(student, teacher, *labels, where=where), loss(student[:, :2], teacher[:, :2], *labels), rtol=1e-5
    )


@pytest.mark.parametrize('temperature', [0.5, 1.0, 2.0])
def test_a_row_of_minus_infinity_is_uniform_among_the_other_classes(temperature):
    student, teacher = np.full((1, 3), -np.inf, np.float32), np.array([[1, 2, 3]], np.float32)
    value = losses.decoupled_kd(student, teacher, np.array([0]), alpha=0.0, beta=1.0, temperature=temperature)
    expected = losses.soft_targets(np.zeros((1, 2), np.float32), teacher[:, 1:], temperature=temperature)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


@EXAMPLES
@given(LOGITS, LABELS, TEMPERATURES)
def test_a_student_that_leads_by_just_the_threshold_pays_nothing_for_label_free_tuning(teacher, labels, temperature):
    """The corrected distribution itself, whose label leads by τ or by the teacher's own gap."""
    corrected = np.empty((ROWS, CLASSES))
    for i, label in enumerate(labels):
        p = softmax(teacher[i], temperature)
        gap = p[label] - np.delete(p, label).max()
        share = max(0.0, (0.3 - gap) / (1 - gap)) if gap < 1 else 0.0
        corrected[i] = (1 - share) * p + share * np.eye(CLASSES)[label]
        lead = corrected[i, label] - np.delete(corrected[i], label).max()
        np.testing.assert_allclose(lead, max(0.3, gap), rtol=1e-6)
    student = (temperature * np.log(corrected)).astype(np.float32)
    values = values_of('label_free_tuning', student, teacher, labels, temperature, threshold=0.3)
    np.testing.assert_allclose(values, np.zeros(ROWS), atol=1e-5 * temperature**2)


@EXAMPLES
@given(LOGITS, LOGITS, LABELS)
def test_label_free_tuning_is_soft_targets_at_threshold_zero_of_a_teacher_that_is_right(student, teacher, labels):
    teacher[np.arange(ROWS), labels] = teacher.max(-1) + 1
    values = values_of('label_free_tuning', student, teacher, labels, 2.0, threshold=0.0)
    np.testing.assert_allclose(values, jax.jit(losses.soft_targets)(student, teacher, temperature=2.0), rtol=1e-5, atol=1e-6)


def test_label_free_tuning_at_threshold_one_is_the_cross_entropy_with_finite_gradients():
    student, teacher = np.random.default_rng(0).normal(size=(2, ROWS, CLASSES)).astype(np.float32)
    labels = np.array([0, 1, 2, 4])
    values, *gradients = value_and_gradients('label_free_tuning', student, teacher, labels, 1.0, threshold=1.0)
    expected = [-np.log(softmax(z)[y]) for z, y in zip(student, labels, strict=True)]
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    assert all(np.all(np.isfinite(gradient)) for gradient in gradients)
