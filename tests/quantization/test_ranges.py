"""Ranges against numpy in float64, and what one kind of range promises over another."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kdjax.quantization import (
    Range,
    absmax_range,
    affine_scale,
    average_range,
    minmax_range,
    moving_average_range,
    mse_range,
    percentile_range,
    symmetric_scale,
    symmetric_scale_of_range,
    union_range,
)
from kdjax.quantization._arrays import fake_quantize

checked = settings(derandomize=True, deadline=None, max_examples=25)
matrices = arrays(np.float32, (4, 6), elements=st.floats(-1e3, 1e3, width=32, allow_subnormal=False))
FUNCTIONS = [minmax_range, absmax_range, percentile_range, mse_range]


def heavy_tailed(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(3, shape).astype(np.float32)


def assert_range(actual: Range, low: object, high: object) -> None:
    np.testing.assert_allclose(actual.low, low, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(actual.high, high, rtol=1e-5, atol=1e-5)


# Against numpy.


@checked
@given(matrices, st.sampled_from([None, 0, -1]))
def test_minmax_and_absmax_are_numpys_and_hold_zero(x: np.ndarray, axis: int | None) -> None:
    others = (0, 1) if axis is None else (1 - axis % 2,)
    low, high = minmax_range(x, channel_axis=axis)
    np.testing.assert_array_equal(low, np.minimum(x.min(others, keepdims=True), 0))
    np.testing.assert_array_equal(high, np.maximum(x.max(others, keepdims=True), 0))
    largest = np.abs(x).max(others, keepdims=True)
    np.testing.assert_array_equal(absmax_range(x, channel_axis=axis), [-largest, largest])
    scale = symmetric_scale(x, channel_axis=axis)
    np.testing.assert_array_equal(symmetric_scale_of_range(low, high), scale)
    np.testing.assert_array_equal(symmetric_scale_of_range(*absmax_range(x, channel_axis=axis)), scale)


@pytest.mark.parametrize('percentile', [50, 75.5, 99, 99.9, 100])
@pytest.mark.parametrize('offset', [0.0, 7.0, -7.0])
def test_percentiles_are_numpys_widened_to_zero(percentile: float, offset: float) -> None:
    x = heavy_tailed((40, 5)) + np.float32(offset)
    low, high = (np.percentile(x.astype(np.float64), p, axis=0, keepdims=True) for p in (100 - percentile, percentile))
    assert_range(percentile_range(x, percentile, channel_axis=1), np.minimum(low, 0), np.maximum(high, 0))
    low, high = (np.percentile(x.astype(np.float64), p, keepdims=True) for p in (100 - percentile, percentile))
    assert_range(percentile_range(x, percentile), np.minimum(low, 0), np.maximum(high, 0))


def test_percentiles_clip_as_many_numbers_as_they_say_and_a_hundred_clips_none() -> None:
    x = heavy_tailed((1000,))
    low, high = percentile_range(x, 99)
    assert np.sum(x < low) == np.sum(x > high) == 10
    np.testing.assert_array_equal(percentile_range(x, 100), minmax_range(x))


def error_by_numpy(x: np.ndarray, low: float, high: float, bits: int, symmetric: bool) -> float:
    x = x.astype(np.float64)
    levels = 2 ** (bits - 1)
    if symmetric:
        scale, zero_point, smallest = max(-low, high) / (levels - 1), 0.0, 1 - levels
    else:
        scale, smallest = (high - low) / (2 * levels - 1), -levels
        zero_point = np.clip(np.rint(smallest - low / scale), smallest, levels - 1)
    q = np.clip(np.rint(x / scale) + zero_point, smallest, levels - 1)
    return np.sum((x - (q - zero_point) * scale) ** 2)


@pytest.mark.parametrize('bits', [2, 4, 8])
@pytest.mark.parametrize('symmetric', [True, False])
def test_mse_range_is_the_best_of_all_shrunk_ranges(bits: int, symmetric: bool) -> None:
    x = np.stack([heavy_tailed((200,)), np.abs(heavy_tailed((200,), 1)), heavy_tailed((200,), 2) * 10], axis=1)
    found = mse_range(x, bits=bits, symmetric=symmetric, channel_axis=1)
    assert found.low.shape == found.high.shape == (1, 3)
    for j in range(3):
        low, high = (-np.abs(x[:, j]).max(), np.abs(x[:, j]).max()) if symmetric else (min(x[:, j].min(), 0), x[:, j].max())
        errors = [error_by_numpy(x[:, j], low * i / 100, high * i / 100, bits, symmetric) for i in range(1, 101)]
        error = error_by_numpy(x[:, j], float(found.low[0, j]), float(found.high[0, j]), bits, symmetric)
        assert error <= min(errors) * (1 + 1e-4)
        assert bits == 8 or error < errors[-1]
        np.testing.assert_allclose(found.high[0, j] * 100 / high, np.rint(found.high[0, j] * 100 / high), rtol=1e-4)


def test_mse_range_of_groups_and_of_all_numbers_never_loses_to_the_widest_range() -> None:
    x = heavy_tailed((16, 3))
    for grouping in ({}, {'channel_axis': -1}, {'channel_axis': -1, 'group_size': 8}):
        scale = symmetric_scale_of_range(*mse_range(x, bits=3, **grouping), bits=3)
        assert scale.shape == symmetric_scale(x, **grouping).shape
        errors = [
            jnp.sum((fake_quantize(x, candidate, bits=3) - x) ** 2)
            for candidate in (scale, symmetric_scale(x, bits=3, **grouping))
        ]
        assert errors[0] < errors[1]


def test_mse_range_takes_the_widest_of_equally_good_ranges() -> None:
    # On the range to 2 the one becomes zero, on the range to 1 the two becomes one: both are off by 1.
    np.testing.assert_array_equal(mse_range(jnp.array([2.0, 1.0]), bits=2, candidates=2), [[-2], [2]])
    on_grid = jnp.array([0.0, 4.0, -4.0])
    np.testing.assert_array_equal(mse_range(on_grid, bits=2), [[-4], [4]])
    for symmetric in (True, False):
        np.testing.assert_array_equal(mse_range(jnp.zeros(5), symmetric=symmetric), [[0], [0]])
    np.testing.assert_array_equal(mse_range(on_grid, candidates=1), absmax_range(on_grid))


def test_a_finer_search_finds_no_worse_range() -> None:
    x = heavy_tailed((500,))
    errors = [error_by_numpy(x, *(float(end[0]) for end in mse_range(x, bits=4, candidates=n)), 4, True) for n in (1, 10, 100)]
    assert errors[0] > errors[1] >= errors[2] * (1 - 1e-5)


# Several batches.


@checked
@given(arrays(np.float32, (3, 4, 2), elements=st.floats(-1e3, 1e3, width=32, allow_subnormal=False)))
def test_union_of_batches_is_the_range_of_all_their_numbers(batches: np.ndarray) -> None:
    for function in (minmax_range, absmax_range):
        ranges = [function(batch, channel_axis=-1) for batch in batches]
        np.testing.assert_array_equal(union_range(ranges), function(batches.reshape(12, 2), channel_axis=-1))
    low, high = average_range(ranges)
    np.testing.assert_allclose(
        low, np.mean([np.asarray(ends.low, np.float64) for ends in ranges], axis=0), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        high, np.mean([np.asarray(ends.high, np.float64) for ends in ranges], axis=0), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(union_range(ranges[:1]), ranges[0])


def test_moving_average_is_the_weighted_sum_of_all_batches() -> None:
    batches, decay = heavy_tailed((6, 8, 3)), 0.7
    average = minmax_range(batches[0], channel_axis=-1)
    step = jax.jit(functools.partial(moving_average_range, decay=decay, channel_axis=-1))
    for batch in batches[1:]:
        average = step(average, batch)
    weights = np.array([decay**5] + [(1 - decay) * decay ** (5 - i) for i in range(1, 6)])
    lows, highs = np.minimum(batches, 0).min(1), np.maximum(batches, 0).max(1)
    assert_range(average, (weights @ lows)[None], (weights @ highs)[None])


def test_moving_average_of_one_batch_again_and_again_stays_and_decay_ends_are_old_and_new() -> None:
    first, second = jnp.array([-1.0, 2.0]), jnp.array([-3.0, 1.0])
    start = minmax_range(first)
    assert_range(moving_average_range(start, first, decay=0.99), [-1], [2])
    np.testing.assert_array_equal(moving_average_range(start, second, decay=1), start)
    np.testing.assert_array_equal(moving_average_range(start, second, decay=0), minmax_range(second))
    scanned, _ = jax.lax.scan(
        lambda ends, x: (moving_average_range(ends, x, decay=0.5), None), start, jnp.stack([first, second])
    )
    assert_range(scanned, [-2], [1.5])


# All of them.


@pytest.mark.parametrize('function', FUNCTIONS, ids=lambda function: function.__name__)
def test_ranges_are_the_same_under_jit_and_vmap_and_a_channel_is_as_if_alone(function: object) -> None:
    x = jnp.asarray(heavy_tailed((12, 3)))
    eager = function(x, channel_axis=-1)
    assert isinstance(eager, Range)
    assert np.all(eager.low <= 0)
    assert np.all(eager.high >= 0)
    assert_range(jax.jit(functools.partial(function, channel_axis=-1))(x), *eager)
    alone = jax.vmap(function, in_axes=1, out_axes=1)(x)
    assert_range(alone, *eager)
    assert_range(function(x), *(np.asarray(end) for end in function(x.reshape(1, 36))))
    grouped = function(x, channel_axis=-1, group_size=4)
    assert grouped.low.shape == grouped.high.shape == (3, 3)
    assert_range(Range(grouped.low[1:2], grouped.high[1:2]), *function(x[4:8], channel_axis=-1))


@pytest.mark.parametrize('function', FUNCTIONS, ids=lambda function: function.__name__)
def test_half_precision_is_widened_and_nan_is_not_hidden(function: object) -> None:
    x = jnp.asarray(heavy_tailed((12, 3)), jnp.bfloat16)
    ends = function(x)
    assert ends.low.dtype == ends.high.dtype == jnp.float32
    np.testing.assert_array_equal(ends, function(x.astype(jnp.float32)))
    spoilt = function(x.astype(jnp.float32).at[0, 0].set(jnp.nan), channel_axis=1)
    np.testing.assert_array_equal(np.isnan(spoilt), [[[True, False, False]]] * 2)


def test_ranges_make_scales_whose_grid_reaches_their_ends() -> None:
    x = jnp.asarray(heavy_tailed((50, 3)) + np.array([0, 3, -3], np.float32))
    for ends in (minmax_range(x, channel_axis=-1), percentile_range(x, 95, channel_axis=-1)):
        scale, zero_point = affine_scale(*ends)
        for end in ends:
            assert np.all(np.abs(fake_quantize(end, scale, zero_point) - end) <= scale / 2 * (1 + 1e-4))
        clipped = fake_quantize(x, scale, zero_point)
        assert np.all(clipped >= ends.low - scale)
        assert np.all(clipped <= ends.high + scale)


# Errors.


@pytest.mark.parametrize('function', [*FUNCTIONS, moving_average_range], ids=lambda function: function.__name__)
def test_integers_and_axes_that_do_not_exist_are_an_error(function: object) -> None:
    call = functools.partial(function, minmax_range(jnp.ones(3))) if function is moving_average_range else function
    with pytest.raises(ValueError, match=f'{function.__name__}: x must be floating point, got int32'):
        call(jnp.arange(3))
    with pytest.raises(ValueError, match='_range: channel_axis 1 is out of range for an array of rank 1'):
        call(jnp.ones(3), channel_axis=1)


def test_arguments_out_of_range_are_an_error() -> None:
    x, ends = jnp.ones(3), minmax_range(jnp.ones(3))
    for percentile in (49.9, 100.1, -1):
        with pytest.raises(ValueError, match=f'percentile_range: percentile must be between 50 and 100, got {percentile}'):
            percentile_range(x, percentile)
    with pytest.raises(ValueError, match=r'percentile_range: an array of shape \(0, 2\) has no percentiles'):
        percentile_range(jnp.ones((0, 2)), channel_axis=1)
    with pytest.raises(ValueError, match='mse_range: candidates must be at least 1, got 0'):
        mse_range(x, candidates=0)
    with pytest.raises(ValueError, match='bits must be between 2 and 8, got 1'):
        mse_range(x, bits=1)
    for decay in (-0.1, 1.5):
        with pytest.raises(ValueError, match=f'moving_average_range: decay must be between 0 and 1, got {decay}'):
            moving_average_range(ends, x, decay=decay)
    with pytest.raises(
        ValueError, match=r'moving_average_range: the average has shape \(1,\), the range of the batch \(1, 3\)'
    ):
        moving_average_range(ends, jnp.ones((2, 3)), channel_axis=1)
    for merge in (union_range, average_range):
        with pytest.raises(ValueError, match=f'{merge.__name__}: the ends must be of one shape, got no ranges'):
            merge([])
        with pytest.raises(ValueError, match=f'{merge.__name__}: the ends must be of one shape, got .*1, 1'):
            merge([ends, minmax_range(jnp.ones((2, 2)))])
