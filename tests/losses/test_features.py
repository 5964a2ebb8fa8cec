"""Losses on features against float64 oracles written from the papers' formulas, and the properties that these promise."""

import functools

import jax
import numpy as np
import pytest
from helpers.feature_checks import activations, by_examples, check_against_oracle, pool_oracle, window
from helpers.gradient_checks import value_and_gradients
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kdjax import losses
from kdjax.pooling import average_pool

BATCH = 2
EXAMPLES = settings(max_examples=25, deadline=None, derandomize=True, database=None)
MEAN_SQUARES = pytest.mark.parametrize('name', ['hint', 'masked_generation'])
VARIANTS = pytest.mark.parametrize('variant', ['mean_square', 'norm'])


def hint_oracle(s, t, where):
    """The mean of (f_s - f_t)² over the kept elements of one example."""
    return np.mean((s - t)[where] ** 2) if where.any() else 0.0


def attention_transfer_oracle(s, t, where, *, power=2, variant='mean_square'):
    """Q = vec(mean_c |f|^p) / ||·|| over the kept positions of one example, the larger activation pooled to the smaller."""
    height, width = np.minimum(s.shape[:2], t.shape[:2])
    pooled = (np.stack([pool_oracle(channel, height, width) for channel in np.moveaxis(x, -1, 0)], -1) for x in (s, t))
    q_s, q_t = (np.mean(np.abs(x) ** power, axis=-1)[where] for x in pooled)
    if not where.any():
        return 0.0
    difference = q_s / np.linalg.norm(q_s) - q_t / np.linalg.norm(q_t)
    return np.mean(difference**2) if variant == 'mean_square' else np.linalg.norm(difference)


def hierarchical_context_oracle(s, t, where):
    """The mean squared difference, and half as much for each next pooled size that is smaller than the height."""
    terms, weights = [hint_oracle(s, t, where)], [1.0]
    height, width, channels = s.shape
    for side in (4, 2, 1):
        if side < height:
            pooled = [
                np.mean((s - t)[rows, columns, channel][kept])
                for rows in (window(i, side, height) for i in range(side))
                for columns in (window(j, side, width) for j in range(side))
                for channel in range(channels)
                if (kept := where[rows, columns, channel]).any()
            ]
            terms.append(np.mean(np.square(pooled)) if pooled else 0.0)
            weights.append(weights[-1] / 2)
    return np.average(terms, weights=weights)


def channel_wise_oracle(s, t, where, *, temperature=4.0):
    """T² times the mean over channels of the divergence of softmax(f / T) over the kept positions."""
    if not where.any():
        return 0.0
    p_t, p_s = (np.exp(x[where] / temperature) for x in (t, s))
    p_t, p_s = p_t / p_t.sum(axis=0), p_s / p_s.sum(axis=0)
    return temperature**2 * np.mean(np.sum(p_t * np.log(p_t / p_s), axis=0))


@MEAN_SQUARES
@EXAMPLES
@given(activations(BATCH, 2, 3, 2), activations(BATCH, 2, 3, 2), arrays(np.bool_, (BATCH, 2, 3, 2)))
def test_mean_squares_and_their_gradients_equal_the_oracle_under_any_mask(name, student, teacher, where):
    check_against_oracle(hint_oracle, (student, teacher, where), value_and_gradients(name, student, teacher, where=where))


@MEAN_SQUARES
@pytest.mark.parametrize('shape', [(3, 4), (3, 5, 4), (3, 2, 2, 4), (3, 2, 2, 2, 4)])
def test_mean_squares_take_activations_of_any_rank(name, shape):
    student, teacher = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    expected = by_examples(hint_oracle, student, teacher, np.ones(shape, bool))
    np.testing.assert_allclose(value_and_gradients(name, student, teacher)[0], expected, rtol=1e-5)


# Where the pools are 4, 2 and 1, the first of them wider than the map; 2 and 1; 1; none.
@pytest.mark.parametrize('size', [(5, 3), (4, 4), (2, 3), (1, 3)])
@settings(EXAMPLES, max_examples=5)
@given(data=st.data())
def test_hierarchical_context_values_and_gradients_equal_the_oracle_under_any_mask(data, size):
    student, teacher = (data.draw(activations(BATCH, *size, 2)) for _ in range(2))
    where = data.draw(arrays(np.bool_, (BATCH, *size, 2)))
    for mask in (where, np.ones_like(where)):
        computed = value_and_gradients('hierarchical_context', student, teacher, where=mask)
        check_against_oracle(hierarchical_context_oracle, (student, teacher, mask), computed)
    unmasked = value_and_gradients('hierarchical_context', student, teacher)
    for x, y in zip(unmasked, computed, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@EXAMPLES
@given(activations(3, 5, 4, 2), st.permutations(range(3)))
def test_hierarchical_context_of_a_shift_is_its_square(features, order):
    """At every resolution alike: the weights add up to one."""
    for result in value_and_gradients('hierarchical_context', features, features):
        np.testing.assert_array_equal(result, np.zeros(result.shape))
    shifts = np.array([0.0, 1.0, 3.0], np.float32)[np.array(order)]
    values, *_ = value_and_gradients('hierarchical_context', features, features + shifts[:, None, None, None])
    np.testing.assert_allclose(values, shifts**2, rtol=1e-5)


def test_hierarchical_context_forgives_what_averages_out():
    """A checkerboard has no mean in any pool of 4x4 of a map of 8x8: 1 at full size alone, over weights of 1.875."""
    board = np.where(np.indices((8, 8)).sum(axis=0) % 2, 1.0, -1.0).astype(np.float32)[None, ..., None]
    np.testing.assert_allclose(losses.hierarchical_context(board, np.zeros_like(board)), [1 / 1.875], rtol=1e-6)


@pytest.mark.parametrize('temperature', [1.0, 4.0])
@settings(EXAMPLES, max_examples=10)
@given(activations(BATCH, 2, 3, 2), activations(BATCH, 2, 3, 2), arrays(np.bool_, (BATCH, 2, 3)))
def test_channel_wise_values_and_gradients_equal_the_oracle_under_any_mask(temperature, student, teacher, where):
    oracle = functools.partial(channel_wise_oracle, temperature=temperature)
    # 4 is the default.
    options = {} if temperature == 4 else {'temperature': temperature}
    computed = value_and_gradients('channel_wise', student, teacher, where=where[..., None], **options)
    check_against_oracle(oracle, (student, teacher, where), computed)


@EXAMPLES
@given(activations(BATCH, 3, 2, 3), activations(BATCH, 3, 2, 3), st.permutations(range(3)), activations(2, 3))
def test_channel_wise_sees_neither_the_order_nor_the_level_of_channels(student, teacher, order, levels):
    """A common order of positions does not matter either."""
    values, *_ = value_and_gradients('channel_wise', student, teacher)
    moved = [(x + level)[:, ::-1, :, np.array(order)] for x, level in zip((student, teacher), levels, strict=True)]
    np.testing.assert_allclose(value_and_gradients('channel_wise', *moved)[0], values, rtol=1e-5, atol=1e-5)
    assert np.all(values >= 0)
    for result in value_and_gradients('channel_wise', student, student):
        np.testing.assert_allclose(result, np.zeros(result.shape), atol=1e-6)


def test_channel_wise_is_half_a_variance_at_high_temperatures():
    """Of the difference of both maps, over positions: T² keeps the loss from going to zero."""
    student, teacher = np.random.default_rng(7).normal(size=(2, BATCH, 3, 3, 2)).astype(np.float32)
    expected = np.mean(np.var(student - teacher, axis=(1, 2)), axis=-1) / 2
    np.testing.assert_allclose(losses.channel_wise(student, teacher, temperature=1e3), expected, rtol=1e-2)


@pytest.mark.parametrize('name', ['channel_wise', 'hierarchical_context'])
def test_what_needs_positions_takes_images_alone(name):
    with pytest.raises(ValueError, match=rf'^{name}: activations must be \[batch, height, width, channels\], got \(2, 3, 4\)$'):
        getattr(losses, name)(np.ones((2, 3, 4), np.float32), np.ones((2, 3, 4), np.float32))


@pytest.mark.parametrize('temperature', [0.0, -1.0, float('nan')])
def test_channel_wise_refuses_temperatures_that_are_not_positive(temperature):
    features = np.ones((1, 2, 2, 3), np.float32)
    with pytest.raises(ValueError, match=r'^channel_wise: temperature must be positive, got [^\n]+$'):
        losses.channel_wise(features, features, temperature=temperature)


@EXAMPLES
@given(activations(3, 2, 2, 2), st.permutations(range(3)))
def test_hint_of_equal_activations_is_zero_and_a_shift_costs_its_square(features, order):
    for result in value_and_gradients('hint', features, features):
        np.testing.assert_array_equal(result, np.zeros(result.shape))
    shifts = np.array([0.0, 1.0, 3.0], np.float32)[np.array(order)]
    values, *_ = value_and_gradients('hint', features, features + shifts[:, None, None, None])
    np.testing.assert_array_equal(values, shifts**2)


@pytest.mark.parametrize(
    'student_size, teacher_size, power, variant',
    [
        ((3, 2), (3, 2), 3, 'norm'),
        ((3, 3), (7, 7), 2, 'mean_square'),  # not a whole ratio
        ((6, 3), (3, 3), 4, 'norm'),  # a whole ratio, and the student is the larger
        ((7, 2), (3, 4), 1, 'mean_square'),  # each is the larger along one axis
    ],
)
@settings(EXAMPLES, max_examples=10)
@given(data=st.data())
def test_attention_transfer_values_and_gradients_equal_the_oracle(data, student_size, teacher_size, power, variant):
    """Other channels, other sizes, other powers, any mask."""
    student = data.draw(activations(BATCH, *student_size, 2))
    teacher = data.draw(activations(BATCH, *teacher_size, 3))
    where = data.draw(arrays(np.bool_, (BATCH, *map(min, student_size, teacher_size))))
    options = {'power': power, 'variant': variant}
    oracle = functools.partial(attention_transfer_oracle, **options)
    if variant == 'norm':
        # The norm of a difference has no derivative where the maps agree: there is nothing to compare then.
        values = by_examples(oracle, student.astype(np.float64), teacher.astype(np.float64), where)
        assume(np.all(values[where.any(axis=(1, 2))] > 1e-2))
    computed = value_and_gradients('attention_transfer', student, teacher, where=where[..., None], **options)
    check_against_oracle(oracle, (student, teacher, where), computed)


def test_attention_transfer_defaults_to_squares_and_their_mean():
    """The variant behind published tables, whose weight is 1000."""
    rng = np.random.default_rng(1)
    student, teacher = (rng.normal(size=(BATCH, 3, 3, channels)).astype(np.float32) for channels in (3, 4))
    expected = by_examples(attention_transfer_oracle, student, teacher, np.ones((BATCH, 3, 3), bool))
    np.testing.assert_allclose(jax.jit(losses.attention_transfer)(student, teacher), expected, rtol=1e-5)


@VARIANTS
@EXAMPLES
@given(activations(BATCH, 3, 3, 3), activations(BATCH, 3, 3, 4), st.permutations(range(3)), st.permutations(range(4)))
def test_attention_transfer_does_not_see_the_order_or_the_sign_of_channels(variant, student, teacher, first, second):
    values, *_ = value_and_gradients('attention_transfer', student, teacher, variant=variant)
    permuted, *_ = value_and_gradients(
        'attention_transfer', student[..., np.array(first)], -teacher[..., np.array(second)], variant=variant
    )
    np.testing.assert_allclose(permuted, values, rtol=1e-5, atol=1e-6)


@VARIANTS
@EXAMPLES
@given(
    activations(BATCH, 3, 3, 3),
    activations(BATCH, 3, 3, 4),
    arrays(np.float32, (2, BATCH, 1, 1, 1), elements=st.floats(np.float32(1e-3), np.float32(1e3), width=32)),
)
def test_attention_transfer_does_not_see_the_scale_of_an_example(variant, student, teacher, scales):
    values, *_ = value_and_gradients('attention_transfer', student, teacher, variant=variant)
    scaled, *_ = value_and_gradients('attention_transfer', scales[0] * student, scales[1] * teacher, variant=variant)
    np.testing.assert_allclose(scaled, values, rtol=1e-5, atol=1e-6)


@EXAMPLES
@given(activations(BATCH, 3, 3, 3), activations(BATCH, 3, 3, 4))
def test_attention_transfer_stays_within_its_bounds_and_its_variants_agree(student, teacher):
    """At most 4 / positions and 2; the squared norm is positions times the mean square."""
    mean_square, *_ = value_and_gradients('attention_transfer', student, teacher)
    norm, *_ = value_and_gradients('attention_transfer', student, teacher, variant='norm')
    assert np.all(mean_square >= 0)
    assert np.all(mean_square <= 4 / 9)
    assert np.all(norm <= 2)
    np.testing.assert_allclose(norm**2, 9 * mean_square, rtol=1e-5, atol=1e-6)


@EXAMPLES
@given(activations(3, 2, 2, 3))
def test_attention_transfer_of_equal_activations_is_zero_with_zero_gradients(features):
    """Up to the rounding with which jit may compute the two maps differently."""
    for result in value_and_gradients('attention_transfer', features, features):
        np.testing.assert_allclose(result, np.zeros(result.shape), atol=1e-6)
    norm, *gradients = value_and_gradients('attention_transfer', features, features, variant='norm')
    np.testing.assert_allclose(norm, np.zeros(3), atol=1e-6)
    assert np.all(np.isfinite(gradients))


@EXAMPLES
@given(activations(3, 2, 2, 3), activations(3, 2, 2, 3), st.permutations(range(3)))
def test_permuting_the_batch_permutes_the_values(student, teacher, order):
    order = np.array(order)
    for name in ('hint', 'attention_transfer'):
        before = value_and_gradients(name, student, teacher)
        after = value_and_gradients(name, student[order], teacher[order])
        for x, y in zip(before, after, strict=True):
            np.testing.assert_array_equal(x[order], y)


@pytest.mark.parametrize('length, target', [(7, 3), (6, 3), (5, 4), (4, 1), (3, 3)])
def test_average_pool_is_adaptive_average_pooling(length, target):
    maps = np.random.default_rng(2).normal(size=(BATCH, length, 4)).astype(np.float32)
    expected = np.stack([pool_oracle(x.astype(np.float64), target, 2) for x in maps])
    pool = jax.jit(functools.partial(average_pool, size=(target, 2)))
    np.testing.assert_allclose(pool(maps), expected, rtol=1e-5, atol=1e-6)
    channels = np.stack([maps, 2 * maps], axis=-1)
    np.testing.assert_allclose(pool(channels), np.stack([expected, 2 * expected], axis=-1), rtol=1e-5, atol=1e-6)


def extreme_features():
    """Examples [n, 2, 2, 3] at the ends of float32, with zeros among them."""
    features = np.random.default_rng(3).normal(size=(2, 2, 3)).astype(np.float32)
    spike = np.zeros_like(features)
    spike[0, 1, 2] = 1.0
    rectified = np.maximum(features, 0)
    ranging = features * np.float32(10.0) ** np.array([[-20, -10], [0, 10]], np.float32)[..., None]
    return np.stack(
        [
            *(np.zeros_like(features), np.ones_like(features), features, rectified, spike, ranging),
            *(1e15 * features, 1e15 * spike, 1e-25 * features, 1e-25 * rectified, 1e-25 * spike),
        ]
    ).astype(np.float32)


@pytest.mark.parametrize('power', [0.5, 1, 2, 4])
@VARIANTS
def test_attention_transfer_is_finite_for_every_pair_of_extreme_activations(variant, power):
    """Zero, constant, huge (1e15) and tiny (1e-25) ones, alone and side by side."""
    rows = extreme_features()
    student, teacher = (np.stack(x) for x in zip(*[(s, t) for s in rows for t in rows], strict=True))
    values, *gradients = value_and_gradients('attention_transfer', student, teacher, variant=variant, power=power)
    assert np.all(np.isfinite(values))
    assert np.all(values >= 0)
    # The first pair is two activations of zeros, where the norm's square root has an infinite derivative.
    assert values[0] == 0
    for gradient in gradients:
        assert np.all(np.isfinite(gradient))
        np.testing.assert_array_equal(gradient[0], np.zeros_like(rows[0]))


@pytest.mark.parametrize('ratio', [1e-6, 1e-7, 1e-8, 1e-10, 1e-15])
def test_attention_transfer_of_small_positions_equals_slicing_where_the_large_ones_are_masked(ratio):
    """What is masked must not set the scale either."""
    rng = np.random.default_rng(5)
    student, teacher = (rng.normal(size=(BATCH, 3, 3, channels)).astype(np.float32) for channels in (3, 4))
    student[:, :, 1:] *= np.float32(ratio)
    where = np.broadcast_to(np.array([[False], [True], [True]]), (BATCH, 3, 3, 1))
    values, gradient, _ = value_and_gradients('attention_transfer', student, teacher, where=where)
    expected, sliced, _ = value_and_gradients('attention_transfer', student[:, :, 1:], teacher[:, :, 1:])
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient[:, :, 1:] * ratio, sliced * ratio, rtol=1e-5, atol=1e-6)


def test_attention_transfer_of_huge_and_tiny_activations_is_that_of_ordinary_ones():
    rng = np.random.default_rng(4)
    student, teacher = (rng.normal(size=(BATCH, 3, 3, channels)).astype(np.float32) for channels in (3, 4))
    expected, gradient, _ = value_and_gradients('attention_transfer', student, teacher)
    for scale in (1e15, 1e-25):
        values, scaled_gradient, _ = value_and_gradients('attention_transfer', student * np.float32(scale), teacher)
        np.testing.assert_allclose(values, expected, rtol=1e-5)
        np.testing.assert_allclose(scaled_gradient * np.float32(scale), gradient, rtol=1e-5, atol=1e-6)


def test_a_zero_activation_has_an_attention_map_of_zeros():
    """One that is zero costs ||Q_t||² / positions = 1 / positions and has no direction to learn; here with B = 1."""
    zero, other = np.zeros((1, 2, 2, 3), np.float32), np.ones((1, 2, 2, 3), np.float32)
    values, student_gradient, _ = value_and_gradients('attention_transfer', zero, other)
    np.testing.assert_allclose(values, [0.25], rtol=1e-6)
    np.testing.assert_array_equal(student_gradient, np.zeros_like(zero))


def test_channel_wise_is_finite_for_every_pair_of_extreme_activations():
    """Where one network is sure of one position and the other of another, too."""
    rows = extreme_features()
    student, teacher = (np.stack(x) for x in zip(*[(s, t) for s in rows for t in rows], strict=True))
    values, *gradients = value_and_gradients('channel_wise', student, teacher)
    assert np.all(np.isfinite(values))
    assert np.all(values >= 0)
    for gradient in gradients:
        assert np.all(np.isfinite(gradient))


@VARIANTS
@pytest.mark.parametrize('power', [0, -1, float('nan')])
def test_attention_transfer_refuses_powers_that_are_not_positive(variant, power):
    features = np.ones((1, 2, 2, 3), np.float32)
    with pytest.raises(ValueError, match=r'^attention_transfer: power must be positive, got [^\n]+$'):
        losses.attention_transfer(features, features, power=power, variant=variant)


def test_attention_transfer_refuses_unknown_variants():
    features = np.ones((1, 2, 2, 3), np.float32)
    with pytest.raises(ValueError, match=r"^attention_transfer: variant must be 'mean_square' or 'norm', got 'l1'$"):
        losses.attention_transfer(features, features, variant='l1')
