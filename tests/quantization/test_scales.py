"""Scales against the formulas in float64, and what they promise of the grid: ends, zero, error, sharing."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kdjax.quantization import (
    affine_scale,
    dequantize,
    quantize,
    shared_scale,
    symmetric_scale,
    symmetric_scale_of_range,
)

checked = settings(derandomize=True, deadline=None, max_examples=25)
ALL_BITS = list(range(2, 9))
SHAPE = (2, 6, 4)
some_zero = st.one_of(st.just(0.0), st.floats(2.0**-100, 2.0**100, width=32), st.floats(-(2.0**100), -(2.0**-100), width=32))
tensors = arrays(np.float32, SHAPE, elements=some_zero)


def scale_by_numpy(x: np.ndarray, bits: int = 8, narrow: bool = True) -> float:
    """Of all numbers of x: half the width of the integers, 127 or 127.5, stands for the largest magnitude."""
    largest = np.abs(np.asarray(x, np.float64)).max()
    half_width = ((2 ** (bits - 1) - 1) + (2 ** (bits - 1) - narrow)) / 2
    return largest / half_width if largest > 0 else 1.0


# Symmetric scales.


@checked
@given(tensors, st.sampled_from([None, 0, 1, 2, -1, -3, (0,), (0, 2), (-1, 1), (0, 1, 2), ()]))
def test_symmetric_scale_is_the_largest_magnitude_of_the_channel(x: np.ndarray, axis: int | tuple[int, ...] | None) -> None:
    scale = symmetric_scale(x, channel_axis=axis)
    kept = {i % 3 for i in ((axis,) if isinstance(axis, int) else axis or ())}
    assert scale.dtype == jnp.float32
    assert scale.shape == tuple(length if i in kept else 1 for i, length in enumerate(SHAPE))
    for index in np.ndindex(scale.shape):
        channel = x[tuple(index[i] if i in kept else slice(None) for i in range(3))]
        np.testing.assert_allclose(scale[index], scale_by_numpy(channel), rtol=1e-6)


@pytest.mark.parametrize('bits', ALL_BITS)
@pytest.mark.parametrize('narrow', [True, False])
def test_the_largest_magnitude_falls_on_the_last_level(bits: int, narrow: bool) -> None:
    x = np.linspace(-3, 3, 2001).astype(np.float32)
    scale = symmetric_scale(x, bits=bits, narrow=narrow)
    np.testing.assert_allclose(scale, [scale_by_numpy(x, bits, narrow)], rtol=1e-6)
    np.testing.assert_array_equal(symmetric_scale_of_range(-2.0, 3.0, bits=bits, narrow=narrow), scale[0])
    q = quantize(x, scale, bits=bits, narrow=narrow)
    largest = 2 ** (bits - 1) - 1
    np.testing.assert_array_equal(np.unique(q), np.arange(-largest - (not narrow), largest + 1))
    assert np.all(np.abs(np.asarray(dequantize(q, scale), np.float64) - x) <= np.float64(scale[0]) / 2 * (1 + 1e-5))


@checked
@given(arrays(np.float32, (3, 4), elements=st.floats(-1e3, 1e3, width=32)))
def test_per_channel_each_column_is_quantized_as_if_alone(x: np.ndarray) -> None:
    scale = symmetric_scale(x, channel_axis=-1)
    q = quantize(x, scale)
    for j in range(4):
        np.testing.assert_array_equal(q[:, j], np.clip(np.rint(x[:, j] / np.asarray(scale)[0, j]), -127, 127))
    error = np.abs(np.asarray(dequantize(q, scale)) - x)
    assert np.all(error <= np.asarray(scale) / 2 * (1 + 1e-5))


@pytest.mark.parametrize(
    'channel_axis,group_size,group_axis', [(-1, 3, -2), (None, 2, 2), ((0, 2), 2, 1), (0, 6, -2), (1, 1, 0)]
)
def test_a_group_has_the_scale_of_its_own_numbers(channel_axis: object, group_size: int, group_axis: int) -> None:
    x = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    scale = symmetric_scale(x, channel_axis=channel_axis, group_size=group_size, group_axis=group_axis, bits=4)
    channels = {i % 3 for i in ((channel_axis,) if isinstance(channel_axis, int) else channel_axis or ())}
    sizes = [1 if i in channels else group_size if i == group_axis % 3 else SHAPE[i] for i in range(3)]
    assert scale.shape == tuple(length // size for length, size in zip(SHAPE, sizes, strict=True))
    for index in np.ndindex(scale.shape):
        block = x[tuple(slice(i * size, (i + 1) * size) for i, size in zip(index, sizes, strict=True))]
        np.testing.assert_allclose(scale[index], scale_by_numpy(block, 4), rtol=1e-6)


def test_one_group_is_the_channel_and_groups_of_one_are_a_scale_for_every_number() -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 3)), jnp.float32)
    channel = symmetric_scale(x, channel_axis=-1)
    np.testing.assert_array_equal(symmetric_scale(x, channel_axis=-1, group_size=8), channel)
    np.testing.assert_array_equal(symmetric_scale(x, channel_axis=-1, group_size=1), symmetric_scale(x, channel_axis=(0, 1)))
    # Smaller groups have smaller scales, so the error of every number can only shrink.
    for size in (4, 2, 1):
        smaller = symmetric_scale(x, channel_axis=-1, group_size=size)
        assert np.all(np.repeat(smaller, size, axis=0) <= np.asarray(channel))
        np.testing.assert_array_equal(smaller.max(0, keepdims=True), channel)


def test_zeros_and_nothing_have_scale_one_and_stay_zero() -> None:
    x = jnp.array([[0.0, 5.0], [0.0, -1.0]])
    scale = symmetric_scale(x, channel_axis=1)
    assert scale[0, 0] == 1
    np.testing.assert_array_equal(dequantize(quantize(x, scale), scale)[:, 0], 0)
    np.testing.assert_array_equal(symmetric_scale(jnp.zeros((2, 2))), [[1]])
    np.testing.assert_array_equal(symmetric_scale(jnp.zeros((0, 2)), channel_axis=1), [[1, 1]])
    np.testing.assert_array_equal(symmetric_scale(jnp.zeros((4, 2)), channel_axis=1, group_size=2), np.ones((2, 2)))
    assert symmetric_scale(jnp.float32(-2.54)).shape == ()
    assert symmetric_scale_of_range(0.0, 0.0) == 1


def test_numbers_that_hardware_may_take_for_zero_count_as_zero() -> None:
    assert symmetric_scale(jnp.array([2.0**-127]))[0] == affine_scale(0.0, 2.0**-127)[0] == 1
    assert symmetric_scale(jnp.array([2.0**-125]))[0] == affine_scale(0.0, 2.0**-125)[0] == 2.0**-126


@pytest.mark.parametrize('largest', [1e-45, 1e-40, 1e-38, 1e-37, 1e-30, 1e30, 1e38])
@pytest.mark.parametrize('bits', [2, 8])
def test_numbers_of_any_size_are_quantized_to_numbers(largest: float, bits: int) -> None:
    x = jnp.array([-largest, 0.0, largest / 2, largest])
    narrow = symmetric_scale(x, bits=bits)
    affine, zero_point = affine_scale(-jnp.float32(largest), jnp.float32(largest), bits=bits)
    for scale, offset in ((narrow, None), (affine, zero_point)):
        assert np.all(np.isfinite(scale))
        assert np.all(scale > 0)
        y = dequantize(quantize(x, scale, offset, bits=bits), scale, offset)
        assert y[1] == 0
        assert not np.any(np.isnan(y))
        assert np.all(np.abs(np.asarray(y, np.float64) - x) <= np.float64(scale) * (1 + 1e-5))


def test_nan_is_not_hidden() -> None:
    x = jnp.array([jnp.nan, 1.0])
    assert np.isnan(symmetric_scale(x)[0])
    assert np.isnan(shared_scale([jnp.ones(2), x]))
    assert np.isnan(affine_scale(jnp.nan, 1.0)[0])


# Affine scales.


@checked
@given(
    arrays(np.float32, 7, elements=st.floats(-1e3, 1e3, width=32, allow_subnormal=False)),
    arrays(np.float32, 7, elements=st.floats(-1e3, 1e3, width=32, allow_subnormal=False)),
    st.sampled_from(ALL_BITS),
)
def test_affine_grid_spans_the_range_with_zero_on_it(one: np.ndarray, other: np.ndarray, bits: int) -> None:
    low, high = np.minimum(one, other), np.maximum(one, other)
    scale, zero_point = affine_scale(low, high, bits=bits)
    assert (scale.dtype, zero_point.dtype) == (jnp.float32, jnp.int8)
    wide_low, wide_high = np.minimum(low, 0).astype(np.float64), np.maximum(high, 0).astype(np.float64)
    smallest, largest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    wanted = np.where(wide_low == wide_high, 1.0, np.maximum((wide_high - wide_low) / (2**bits - 1), 2.0**-126))
    np.testing.assert_allclose(scale, wanted, rtol=1e-6)
    position = smallest - wide_low / wanted
    assert np.all(np.abs(np.asarray(zero_point, float) - position) <= 0.5 + 1e-4)
    assert np.all((zero_point >= smallest) & (zero_point <= largest))
    np.testing.assert_array_equal(dequantize(zero_point, scale, zero_point), 0)
    for x in (low, high, (low + high) / 2):
        error = np.abs(np.asarray(dequantize(quantize(x, scale, zero_point, bits=bits), scale, zero_point), np.float64) - x)
        assert np.all(error <= np.float64(scale) * (0.5 + 1e-3) + np.abs(x) * 1e-6 + 1e-37)


def test_ranges_on_one_side_put_zero_at_the_end() -> None:
    scale, zero_point = affine_scale(jnp.array([0.0, -5.1, 2.0, 0.0]), jnp.array([5.1, 0.0, 5.1, 0.0]))
    np.testing.assert_array_equal(zero_point, [-128, 127, -128, -128])
    np.testing.assert_allclose(scale, [0.02, 0.02, 0.02, 1], rtol=1e-6)
    x = np.linspace(0, 5.1, 5000).astype(np.float32)
    assert len(np.unique(quantize(x, scale[0], zero_point[0]))) == 256


# One scale for several tensors.


def test_tensors_that_share_have_the_scale_of_all_their_numbers_in_any_order() -> None:
    rng = np.random.default_rng(0)
    tensors = [rng.normal(scale=s, size=shape).astype(np.float32) for s, shape in ((1, (3, 2)), (5, 4), (0, (2, 2)), (0.1, ()))]
    joined = np.concatenate([x.ravel() for x in tensors])
    for bits, narrow in ((8, True), (4, False)):
        scales = {
            float(shared_scale([tensors[i] for i in order], bits=bits, narrow=narrow))
            for order in itertools.permutations(range(4))
        }
        assert scales == {float(symmetric_scale(joined, bits=bits, narrow=narrow)[0])}
        np.testing.assert_allclose(scales.pop(), scale_by_numpy(joined, bits, narrow), rtol=1e-6)
    assert shared_scale([tensors[2]]) == shared_scale([jnp.zeros(0)]) == 1
    # Joined integers are the integers of the joined.
    scale = shared_scale(tensors)
    separate = np.concatenate([np.ravel(quantize(x, scale)) for x in tensors])
    np.testing.assert_array_equal(separate, quantize(joined, scale))


# Transformations and errors.


def test_scales_are_the_same_under_jit_vmap_and_shards() -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((64, 5)), jnp.float32)
    call = lambda x: symmetric_scale(x, channel_axis=-1, group_size=4, bits=4)  # noqa: E731
    wanted = call(x)
    mesh = jax.make_mesh((8,), ('model',), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('model')))
    for batch in (x, sharded):
        np.testing.assert_array_equal(jax.jit(call)(batch), wanted)
    np.testing.assert_array_equal(jax.vmap(symmetric_scale)(x)[:, 0], symmetric_scale(x, channel_axis=0)[:, 0])
    half = x.astype(jnp.bfloat16)
    np.testing.assert_array_equal(call(half), call(half.astype(jnp.float32)))


@pytest.mark.parametrize(
    'arguments,message',
    [
        ({'channel_axis': 2}, 'channel_axis 2 is out of range for an array of rank 2'),
        ({'channel_axis': (0, -3)}, 'channel_axis -3 is out of range'),
        ({'group_size': 5}, 'groups of 5 do not divide axis 0, of length 4; use a divisor'),
        ({'group_size': 0}, 'groups of 0 do not divide axis 0'),
        ({'group_size': 2, 'channel_axis': 0}, 'axis 0 is an axis of channels, which has no groups'),
        ({'group_size': 2, 'group_axis': 7}, 'group_axis 7 is out of range'),
        ({'bits': 9}, 'bits must be between 2 and 8, got 9'),
    ],
)
def test_arguments_that_do_not_fit_are_an_error(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda x: symmetric_scale(x, **arguments), jnp.ones((4, 3)))


def test_integers_and_no_arrays_are_an_error() -> None:
    whole = jnp.arange(3)
    calls = {
        'symmetric_scale': symmetric_scale,
        'shared_scale': lambda x: shared_scale([x]),
        'affine_scale': lambda x: affine_scale(x, x),
        'symmetric_scale_of_range': lambda x: symmetric_scale_of_range(x, x),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f'{name}: x must be floating point, got int32'):
            call(whole)
    with pytest.raises(ValueError, match='shared_scale: there are no arrays'):
        shared_scale([])
    for call in (affine_scale, symmetric_scale_of_range):
        with pytest.raises(ValueError, match='bits must be between 2 and 8'):
            call(0.0, 1.0, bits=1)
