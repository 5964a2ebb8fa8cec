"""Losses on the channels of activations against float64 oracles from the papers' formulas, and what these losses promise."""

import functools

import numpy as np
import pytest
from helpers.feature_checks import activations, check_against_oracle, pool_to_smaller
from helpers.gradient_checks import central_difference, value_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kdjax import losses

BATCH = 2
EXAMPLES = settings(max_examples=10, deadline=None, derandomize=True, database=None)


def pearson_features_oracle(s, t, where):
    """Half the mean over what is kept of an example of (ŝ - t̂)²; constant channels are zero."""

    def standardize(x):
        standardized = np.zeros(x.shape)
        for channel in range(x.shape[-1]):
            kept = where[..., channel]
            values = x[..., channel][kept]
            if values.size and np.ptp(values) > 0:
                standardized[..., channel][kept] = (values - values.mean()) / np.sqrt(np.mean((values - values.mean()) ** 2))
        return standardized

    squares = (standardize(s) - standardize(t)) ** 2
    return np.array([np.mean(x[kept]) / 2 if kept.any() else 0.0 for x, kept in zip(squares, where, strict=True)])


def check_batch_oracle(oracle, arrays, computed, rtol=1e-4):
    """Values, and gradients of their sum, by central differences of an oracle of the whole batch."""
    exact = [x.astype(np.float64) if np.issubdtype(x.dtype, np.floating) else x for x in arrays]
    values, *gradients = computed
    np.testing.assert_allclose(values, oracle(*exact), rtol=rtol, atol=rtol / 10)
    for i, gradient in enumerate(gradients):
        expected = central_difference(lambda x, i=i: np.sum(oracle(*exact[:i], x, *exact[i + 1 :])), exact[i])
        np.testing.assert_allclose(gradient, expected, rtol=rtol, atol=rtol * max(1.0, np.abs(expected).max()))


@EXAMPLES
@given(st.integers(0, 2**32 - 1), arrays(np.bool_, (BATCH, 3, 2, 2)))
def test_pearson_features_equal_the_oracle_under_any_mask(seed, where):
    student, teacher = np.random.default_rng(seed).normal(size=(2, BATCH, 3, 2, 2)).astype(np.float32)
    # Two numbers are standardized to -1 and 1 whatever they are, up to where they meet.
    where = where | (np.indices(where.shape).sum(axis=0) % 2 == 0)
    for mask in (where, np.ones_like(where)):
        computed = value_and_gradients('pearson_features', student, teacher, where=mask)
        check_batch_oracle(pearson_features_oracle, (student, teacher, mask), computed)


@pytest.mark.parametrize('shape', [(8, 3), (4, 5, 3), (3, 2, 2, 4), (2, 2, 2, 2, 4)])
def test_the_mean_of_pearson_features_is_one_minus_the_correlation(shape):
    """Of numpy's, over channels, for activations of any rank."""
    student, teacher = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    channels = [np.corrcoef(s, t)[0, 1] for s, t in zip(*(x.reshape(-1, shape[-1]).T for x in (student, teacher)), strict=True)]
    values = losses.pearson_features(student, teacher)
    np.testing.assert_allclose(np.mean(values), 1 - np.mean(channels), rtol=1e-5)
    assert np.ptp(values) > 1e-3


@EXAMPLES
@given(st.integers(0, 2**32 - 1), arrays(np.float32, (2, 2, 3), elements=st.sampled_from(np.float32([0.25, 1, 3, 64]))))
def test_pearson_features_do_not_see_level_and_positive_scale_of_channels(seed, changes):
    student, teacher = np.random.default_rng(seed).normal(size=(2, BATCH, 3, 2, 3)).astype(np.float32)
    values, *_ = value_and_gradients('pearson_features', student, teacher)
    changed = [scale * x + level for x, (scale, level) in zip((student, teacher), changes, strict=True)]
    np.testing.assert_allclose(value_and_gradients('pearson_features', *changed)[0], values, rtol=1e-3, atol=1e-4)
    for result in value_and_gradients('pearson_features', student, student):
        np.testing.assert_array_equal(result, np.zeros(result.shape))
    np.testing.assert_allclose(np.mean(value_and_gradients('pearson_features', student, -student)[0]), 2.0, rtol=1e-5)


@pytest.mark.parametrize('level', [0.0, 0.1, -1e4, 1e30])
def test_pearson_features_of_constant_channels_are_zero(level):
    """A dead channel has nothing to say, not even by the rounding of its mean, and no gradient that explodes."""
    teacher = np.random.default_rng(0).normal(size=(3, 5, 7, 2)).astype(np.float32)
    student = np.full_like(teacher, level)
    for result in value_and_gradients('pearson_features', student, student + np.float32(1)):
        np.testing.assert_array_equal(result, np.zeros(result.shape))
    # Nor by the last bit, which products have that are one number but for the order of their sums.
    noisy = np.where(teacher > 0, student, np.nextafter(student, np.float32(np.inf))) if level else student
    for dead in (student, noisy):
        values, gradient, _ = value_and_gradients('pearson_features', dead, teacher)
        np.testing.assert_allclose(np.mean(values), 0.5, rtol=1e-5)
        np.testing.assert_array_equal(gradient, np.zeros(gradient.shape))


@pytest.mark.parametrize('scale', [1e-30, 1e-10, 1e15, 1e30])
def test_pearson_features_of_any_magnitude_are_finite(scale):
    student, teacher = np.random.default_rng(1).normal(size=(2, 3, 4, 2)).astype(np.float32)
    expected, *_ = value_and_gradients('pearson_features', student, teacher)
    values, *gradients = value_and_gradients('pearson_features', np.float32(scale) * student, teacher)
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    assert all(np.all(np.isfinite(x)) for x in gradients)


def test_pearson_features_are_of_statistics_over_the_batch():
    """Not of each example, where a shift of one of them would change nothing."""
    student, teacher = np.random.default_rng(2).normal(size=(2, 3, 4, 2)).astype(np.float32)
    moved = student + np.array([0, 0, 5], np.float32)[:, None, None]
    values, others = (losses.pearson_features(x, teacher) for x in (student, moved))
    assert np.all(np.abs(values - others) > 1e-3)


def inter_channel_oracle(s, t, where, *, variant):
    """The mean, or the sum over the channels, of the squared differences of inner products, pair by pair of one example."""
    matrices = []
    for x in pool_to_smaller(s, t):
        channels = x[where].T
        products = np.array([[np.dot(a, b) for b in channels] for a in channels])
        if variant == 'normalized':
            norms = np.linalg.norm(products, axis=1, keepdims=True)
            products = products / np.where(norms > 0, norms, 1)
        matrices.append(products)
    squares = (matrices[0] - matrices[1]) ** 2
    return np.mean(squares) if variant == 'paper' else np.sum(squares) / len(squares)


VARIANTS = pytest.mark.parametrize('variant', ['paper', 'normalized'])


@VARIANTS
@pytest.mark.parametrize('student_size, teacher_size', [((2, 2), (2, 2)), ((3, 2), (3, 2)), ((2, 4), (5, 2))])
@EXAMPLES
@given(data=st.data())
def test_inter_channel_values_and_gradients_equal_the_oracle_under_any_mask(variant, student_size, teacher_size, data):
    student, teacher = (data.draw(activations(BATCH, *size, 3)) for size in (student_size, teacher_size))
    where = data.draw(arrays(np.bool_, (BATCH, *map(min, student_size, teacher_size))))
    computed = value_and_gradients('inter_channel', student, teacher, where=where[..., None], variant=variant)
    check_against_oracle(functools.partial(inter_channel_oracle, variant=variant), (student, teacher, where), computed)
    unmasked = value_and_gradients('inter_channel', student, teacher, variant=variant)
    everything = value_and_gradients('inter_channel', student, teacher, where=np.ones_like(where)[..., None], variant=variant)
    for x, y in zip(unmasked, everything, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@VARIANTS
@EXAMPLES
@given(activations(BATCH, 2, 2, 3), activations(BATCH, 2, 2, 3), st.permutations(range(4)), st.permutations(range(3)))
def test_inter_channel_sees_pairs_of_channels_and_not_where_they_are(variant, student, teacher, positions, channels):
    """A common order of channels, another order of positions in each network, and the sign of an example change nothing."""
    values, *_ = value_and_gradients('inter_channel', student, teacher, variant=variant)
    moved = student.reshape(BATCH, 4, 3)[:, np.array(positions)].reshape(student.shape)
    changed = -moved[..., np.array(channels)], teacher[..., np.array(channels)]
    np.testing.assert_allclose(value_and_gradients('inter_channel', *changed, variant=variant)[0], values, rtol=1e-5, atol=1e-6)
    for result in value_and_gradients('inter_channel', student, -student, variant=variant):
        np.testing.assert_array_equal(result, np.zeros(result.shape))
    scaled, *_ = value_and_gradients('inter_channel', 2 * student, 2 * teacher, variant=variant)
    np.testing.assert_allclose(scaled, values * (16 if variant == 'paper' else 1), rtol=1e-5)


def test_inter_channel_of_dead_channels_and_any_magnitude_is_finite():
    student, teacher = np.random.default_rng(3).normal(size=(2, 2, 3, 3, 4)).astype(np.float32)
    expected, *_ = value_and_gradients('inter_channel', student, teacher, variant='normalized')
    for scale in (1e-25, 1e25):
        values, *gradients = value_and_gradients('inter_channel', np.float32(scale) * student, teacher, variant='normalized')
        np.testing.assert_allclose(values, expected, rtol=1e-5)
        assert all(np.all(np.isfinite(x)) for x in gradients)
    student[..., 1] = 0
    student[1] = teacher[1] = 0
    for result in value_and_gradients('inter_channel', student, teacher, variant='normalized'):
        assert np.all(np.isfinite(result))
        np.testing.assert_array_equal(result[1], np.zeros(result[1].shape))


def test_inter_channel_refuses_other_channels_and_variants():
    maps = np.ones((2, 3, 3, 4), np.float32)
    with pytest.raises(ValueError, match=r'^inter_channel: [^\n]*same channels[^\n]*objectives.inter_channel[^\n]*$'):
        losses.inter_channel(maps, maps[..., :2])
    with pytest.raises(ValueError, match=r"^inter_channel: variant must be 'paper' or 'normalized', got 'code'$"):
        losses.inter_channel(maps, maps, variant='code')
