"""Losses behind connectors against float64 oracles written from the papers' formulas, and the properties that these promise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.feature_checks import activations, check_against_oracle, pool_to_smaller
from helpers.gradient_checks import value_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import integrate, stats

from kdjax import losses

BATCH = 2
SHAPE = (BATCH, 2, 3, 2)
EXAMPLES = settings(max_examples=8, deadline=None, derandomize=True, database=None)
MASKS = arrays(np.bool_, SHAPE)
overhaul_margin = jax.jit(losses.overhaul_margin)
FACTORS = pytest.mark.parametrize('variant', ['paper', 'attention'])


def vid_oracle(mean, variance, t, where):
    """The mean over what is kept of minus the log density of a normal distribution, without its constant."""
    log_density = stats.norm.logpdf(t, mean, np.sqrt(variance)) + 0.5 * np.log(2 * np.pi)
    return np.mean(-log_density[where]) if where.any() else 0.0


def factor_transfer_oracle(s, t, where, *, variant='paper'):
    """The mean of |F_s / ||F_s|| - F_t / ||F_t||| over what is kept of the pooled factors, or of their mean squares."""
    factors = [x[where] for x in pool_to_smaller(s, t)]
    if not where.any():
        return 0.0
    if variant == 'attention':
        factors = [np.mean(x**2, axis=-1) for x in factors]
    return np.mean(np.abs(np.subtract(*[x / np.linalg.norm(x) for x in factors])))


def activation_boundary_oracle(s, t, where, *, margin=1.0):
    """||ρ(t) σ(m - s) + (1 - ρ(t)) σ(m + s)||², with ρ(t) = 1 where t > 0 and σ the ReLU."""
    on = t > 0
    distance = on * np.maximum(margin - s, 0) + (1 - on) * np.maximum(margin + s, 0)
    return np.sum(distance[where] ** 2)


def overhaul_oracle(s, t, margin, where):
    """Σ (s - t')² with t' = max(t, m), but nothing where s <= t' <= 0."""
    target = np.maximum(t, margin)
    partial = [0.0 if x <= y <= 0 else (x - y) ** 2 for x, y in zip(s[where], target[where], strict=True)]
    return np.sum(partial)


@EXAMPLES
@given(activations(*SHAPE), arrays(np.float32, SHAPE, elements=st.sampled_from([0.5, 1.0, 3.0])), activations(*SHAPE), MASKS)
def test_vid_values_and_gradients_equal_the_oracle_under_any_mask(mean, variance, teacher, where):
    """The gradient with respect to the variance among them."""
    computed = value_and_gradients('vid', mean, variance, teacher, where=where)
    check_against_oracle(vid_oracle, (mean, variance, teacher, where), computed)


@pytest.mark.parametrize('axis', [-1, 1])
def test_vid_takes_one_variance_for_each_channel_wherever_the_channels_are(axis):
    mean, teacher = np.random.default_rng(0).normal(size=(2, BATCH, 3, 2, 3)).astype(np.float32)
    variance = np.array([0.5, 1.0, 3.0], np.float32)
    shape = [3 if i == axis % 4 else 1 for i in range(4)]
    whole = np.broadcast_to(variance.reshape(shape), mean.shape)
    values, _, gradient, _ = value_and_gradients('vid', mean, variance, teacher, axis=axis)
    expected, _, whole_gradient, _ = value_and_gradients('vid', mean, whole, teacher, axis=axis)
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    summed = np.sum(whole_gradient, axis=tuple(i for i in range(4) if i != axis % 4))
    np.testing.assert_allclose(gradient, summed, rtol=1e-5, atol=1e-6)


@EXAMPLES
@given(activations(*SHAPE), activations(*SHAPE))
def test_vid_of_unit_variance_is_half_of_hint_and_the_best_variance_is_the_mean_square(mean, teacher):
    values, *gradients = value_and_gradients('vid', mean, np.float32(1), teacher)
    expected, *expected_gradients = value_and_gradients('hint', mean, teacher)
    np.testing.assert_allclose(values, expected / 2, rtol=1e-5)
    for gradient, reference in zip((gradients[0], gradients[2]), expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, reference / 2, rtol=1e-5, atol=1e-6)
    teacher = np.where(mean == teacher, teacher + 1, teacher)
    best = np.mean((mean - teacher) ** 2, axis=(1, 2, 3), keepdims=True) * np.ones_like(mean)
    lowest, _, slope, _ = value_and_gradients('vid', mean, best, teacher)
    for other in (0.5 * best, 2 * best):
        assert np.all(lowest < value_and_gradients('vid', mean, other, teacher)[0])
    np.testing.assert_allclose(np.sum(slope * best, axis=(1, 2, 3)), np.zeros(BATCH), atol=1e-5)


@pytest.mark.parametrize('variance', [0.0, -1.0, float('nan'), np.array([1.0, 0.0], np.float32)])
def test_variances_must_be_positive(variance):
    maps = np.ones(SHAPE, np.float32)
    with pytest.raises(ValueError, match=r'^vid: variance must be positive, got [^\n]+$'):
        losses.vid(maps, variance, maps)


@pytest.mark.parametrize('shape', [(3,), (1,), (3, 2), (2, 2, 3, 1)])
def test_variances_and_margins_of_other_shapes_are_refused(shape):
    maps, other = np.ones(SHAPE, np.float32), np.ones(shape, np.float32)
    for name, call in (('vid: variance', losses.vid), ('overhaul: margin', lambda s, m, t: losses.overhaul(s, t, m))):
        with pytest.raises(ValueError, match=rf'^{name} [^\n]+$') as error:
            call(maps, other, maps)
        for part in (shape, (2,), SHAPE):
            assert str(part) in str(error.value)


@FACTORS
# Other sizes too: both networks' factors are pooled.
@pytest.mark.parametrize('student_size, teacher_size', [((2, 3), (2, 3)), ((4, 2), (3, 5))])
@EXAMPLES
@given(data=st.data())
def test_factor_transfer_values_and_gradients_equal_the_oracle_under_any_mask(data, student_size, teacher_size, variant):
    # Not of multiples of 1/16: where two normalised entries are equal, |·| has no derivative.
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    channels = 2 if variant == 'paper' else 3
    student = rng.normal(size=(BATCH, *student_size, 2)).astype(np.float32)
    teacher = rng.normal(size=(BATCH, *teacher_size, channels)).astype(np.float32)
    where = data.draw(arrays(np.bool_, (BATCH, *map(min, student_size, teacher_size))))
    # 'paper' is the default.
    options = {} if variant == 'paper' else {'variant': variant}
    computed = value_and_gradients('factor_transfer', student, teacher, where=where[..., None], **options)
    oracle = functools.partial(factor_transfer_oracle, variant=variant)
    check_against_oracle(oracle, (student, teacher, where), computed)


@FACTORS
@EXAMPLES
@given(
    activations(*SHAPE), activations(*SHAPE), arrays(np.float32, (2, BATCH, 1, 1, 1), elements=st.sampled_from([1e-3, 2, 1e5]))
)
def test_factor_transfer_does_not_see_scales_and_stays_within_its_bound(variant, student, teacher, scales):
    values, *_ = value_and_gradients('factor_transfer', student, teacher, variant=variant)
    scaled, *_ = value_and_gradients('factor_transfer', scales[0] * student, scales[1] * teacher, variant=variant)
    np.testing.assert_allclose(scaled, values, rtol=1e-5, atol=1e-6)
    entries = np.size(student[0]) if variant == 'paper' else np.size(student[0, ..., 0])
    assert np.all(values <= 2 / np.sqrt(entries) + 1e-6)
    equal, *gradients = value_and_gradients('factor_transfer', student, student, variant=variant)
    np.testing.assert_allclose(equal, np.zeros(BATCH), atol=1e-7)
    assert np.all(np.isfinite(gradients))


@EXAMPLES
@given(activations(*SHAPE), activations(*SHAPE))
def test_the_attention_of_factors_does_not_see_the_sign_or_the_order_of_channels(student, teacher):
    """The factors themselves do: a factor and its negative are as far apart as can be."""
    values, *_ = value_and_gradients('factor_transfer', student, teacher, variant='attention')
    other, *_ = value_and_gradients('factor_transfer', -student, teacher[..., ::-1], variant='attention')
    np.testing.assert_allclose(other, values, rtol=1e-5, atol=1e-6)
    opposite, *_ = value_and_gradients('factor_transfer', student, -student)
    normalized = np.abs(student) / np.linalg.norm(student.reshape(BATCH, -1), axis=1)[:, None, None, None]
    np.testing.assert_allclose(opposite, 2 * np.mean(normalized, axis=(1, 2, 3)), rtol=1e-5)


@FACTORS
def test_factors_at_the_ends_of_float32_and_of_zero_have_finite_gradients(variant):
    features = np.random.default_rng(1).normal(size=(2, 2, 3))
    spike = np.zeros((2, 2, 3))
    spike[0, 0, 0] = 1.0
    rows = [np.zeros((2, 2, 3)), np.ones((2, 2, 3)), features, spike, 1e15 * features, 1e-25 * features]
    student, teacher = (np.stack(x, dtype=np.float32) for x in zip(*[(s, t) for s in rows for t in rows], strict=True))
    values, *gradients = value_and_gradients('factor_transfer', student, teacher, variant=variant)
    assert np.all(np.isfinite(values))
    assert np.all(np.isfinite(gradients))
    by_pair = values.reshape(len(rows), len(rows))
    assert by_pair[0, 0] == 0
    np.testing.assert_allclose(by_pair[4:, 2], 0, atol=1e-6)
    np.testing.assert_allclose(by_pair[4:, 1], by_pair[2, 1], rtol=1e-5)


def test_factors_refuse_unknown_variants_and_other_channels():
    two, three = np.ones((1, 2, 2, 2), np.float32), np.ones((1, 2, 2, 3), np.float32)
    with pytest.raises(ValueError, match=r"^factor_transfer: variant must be 'paper' or 'attention', got 'l1'$"):
        losses.factor_transfer(two, two, variant='l1')
    with pytest.raises(
        ValueError, match=r"^factor_transfer: variant 'paper' needs factors with the same channels, got [^\n]+$"
    ):
        losses.factor_transfer(two, three)
    np.testing.assert_allclose(losses.factor_transfer(two, three, variant='attention'), [0.0], atol=1e-6)


@pytest.mark.parametrize('margin', [1.0, 0.5])
@EXAMPLES
@given(activations(*SHAPE), activations(*SHAPE), MASKS)
def test_activation_boundary_values_and_gradients_equal_the_oracle_under_any_mask(margin, student, teacher, where):
    oracle = functools.partial(activation_boundary_oracle, margin=margin)
    # 1 is the default.
    options = {} if margin == 1 else {'margin': margin}
    computed = value_and_gradients('activation_boundary', student, teacher, where=where, **options)
    check_against_oracle(oracle, (student, teacher, where), computed)


@EXAMPLES
@given(activations(*SHAPE), activations(*SHAPE))
def test_activation_boundary_asks_for_the_teachers_side_and_a_margin_and_no_more(student, teacher):
    """It sees the teacher's sign alone, and is a sum."""
    values, *_ = value_and_gradients('activation_boundary', student, teacher)
    np.testing.assert_array_equal(value_and_gradients('activation_boundary', student, np.sign(teacher))[0], values)
    for result in value_and_gradients('activation_boundary', np.sign(teacher) * (1 + np.abs(student)), teacher):
        np.testing.assert_array_equal(result, np.zeros(result.shape))
    twice = [np.concatenate([x, x], axis=1) for x in (student, teacher)]
    np.testing.assert_allclose(losses.activation_boundary(*twice), 2 * values, rtol=1e-6)


def test_a_neuron_of_the_teacher_at_zero_is_off():
    student = np.array([[0.5], [-0.5]], np.float32)
    np.testing.assert_allclose(losses.activation_boundary(student, np.zeros((2, 1), np.float32)), [2.25, 0.25])


@pytest.mark.parametrize('margin', [0.0, -1.0, float('nan')])
def test_the_margin_of_a_boundary_must_be_positive(margin):
    maps = np.ones(SHAPE, np.float32)
    with pytest.raises(ValueError, match=r'^activation_boundary: margin must be positive, got [^\n]+$'):
        losses.activation_boundary(maps, maps, margin=margin)


@EXAMPLES
@given(activations(*SHAPE), activations(*SHAPE), MASKS)
def test_overhaul_values_and_gradients_equal_the_oracle_under_any_mask(student, teacher, where):
    """A margin of its own for each channel, at which no activation lies."""
    margin = np.array([-1.0, -0.5], np.float32)
    values, *gradients = value_and_gradients('overhaul', student, teacher, margin, where=where)
    whole = np.broadcast_to(margin, SHAPE)
    check_against_oracle(overhaul_oracle, (student, teacher, whole, where), (values, *gradients[:2]))


@EXAMPLES
@given(activations(*SHAPE), activations(*SHAPE))
def test_overhaul_is_off_exactly_where_both_are_off(student, teacher):
    """That is s <= t' <= 0, with t' the teacher from the margin up. Where the teacher is on, it is the plain square."""
    _, student_gradient, teacher_gradient, _ = value_and_gradients('overhaul', student, teacher, np.float32(-1))
    target = np.maximum(teacher, -1)
    off = (student <= target) & (target <= 0)
    np.testing.assert_array_equal(student_gradient, np.where(off, 0, 2 * (student - target)))
    np.testing.assert_array_equal(teacher_gradient, np.where(off | (teacher < -1), 0, 2 * (target - student)))
    on = np.abs(teacher)
    values, *_ = value_and_gradients('overhaul', student, on, np.float32(-1))
    np.testing.assert_allclose(values, np.sum((student - on) ** 2, axis=(1, 2, 3)), rtol=1e-5)
    for result in value_and_gradients('overhaul', on, on, np.float32(-1)):
        np.testing.assert_array_equal(result, np.zeros(result.shape))


def test_overhaul_takes_margins_wherever_the_channels_are():
    student, teacher = np.random.default_rng(2).normal(size=(2, BATCH, 3, 4, 2)).astype(np.float32)
    margin = np.array([-0.2, -0.6, -1.5], np.float32)
    last = losses.overhaul(np.moveaxis(student, 1, -1), np.moveaxis(teacher, 1, -1), margin)
    np.testing.assert_allclose(losses.overhaul(student, teacher, margin, axis=1), last, rtol=1e-6)
    whole = np.broadcast_to(margin[:, None, None], student.shape)
    np.testing.assert_allclose(losses.overhaul(student, teacher, whole, axis=1), last, rtol=1e-6)


@pytest.mark.parametrize('mean', [-3.0, -0.5, 0.0, 0.5, 2.0, 4.6])
def test_overhaul_margin_is_the_mean_of_what_is_negative(mean):
    """By integration. The last has P(x < 0) = 0.0011."""
    density = stats.norm(mean, 1.5).pdf
    weighted, _ = integrate.quad(lambda x: x * density(x), mean - 30, 0, points=[min(mean, -1.5)])
    below, _ = integrate.quad(density, mean - 30, 0, points=[min(mean, -1.5)])
    for deviation in (1.5, -1.5):
        margin = overhaul_margin(jnp.array([mean]), jnp.array([deviation]))
        np.testing.assert_allclose(margin, [weighted / below], rtol=1e-5)


def test_overhaul_margin_is_minus_three_deviations_where_hardly_anything_is_negative():
    """From P(x < 0) = 0.001 down, that is from 3.09 deviations up."""
    deviation = np.array([2.0, 2.0, 0.1, 1e-30, 1e30], np.float32)
    margin = overhaul_margin(jnp.array([6.2, 1e4, 9.0, 1.0, 3e38]), deviation)
    np.testing.assert_allclose(margin, -3 * deviation, rtol=1e-6)


def test_overhaul_margin_of_a_constant_channel_is_that_constant_or_zero():
    means = jnp.array([-2.0, 0.0, 2.0])
    np.testing.assert_array_equal(overhaul_margin(means, jnp.zeros(3)), [-2.0, 0.0, 0.0])
    np.testing.assert_allclose(overhaul_margin(means, jnp.full(3, 1e-20)), [-2.0, -7.98e-21, -3e-20], rtol=1e-3)
    np.testing.assert_allclose(overhaul_margin(-1e30 * jnp.ones(1), jnp.ones(1)), [-1e30], rtol=1e-6)


def test_what_a_mask_leaves_out_of_variances_and_margins_does_not_matter_and_nan_that_it_keeps_does():
    maps, where = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32), np.array([True, True, False, True])
    for name, inputs, at in (
        ('vid', (maps[0], np.ones((3, 4), np.float32), maps[1]), 1),
        ('overhaul', (*maps, -abs(maps[0])), 2),
    ):
        expected = value_and_gradients(name, *inputs, where=where)
        inputs[at][:, 2] = np.nan
        for result, reference in zip(value_and_gradients(name, *inputs, where=where), expected, strict=True):
            np.testing.assert_array_equal(result, reference)
        assert np.all(np.isnan(value_and_gradients(name, *inputs, where=~where)[0]))
    deviation = np.array([1, np.nan, 1, np.inf], np.float32)
    assert np.all(np.isnan(overhaul_margin(np.array([np.nan, 1, np.inf, 1], np.float32), deviation)))


def test_overhaul_margin_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r'^overhaul_margin: mean \(2,\) and standard_deviation \(3,\) [^\n]+$'):
        losses.overhaul_margin(jnp.ones(2), jnp.ones(3))
    with pytest.raises(ValueError, match=r'^overhaul_margin: mean must be floating point, got int32$'):
        losses.overhaul_margin(jnp.ones(2, jnp.int32), jnp.ones(2))
