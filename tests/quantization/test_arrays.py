"""Integer arithmetic against a numpy oracle, and fake quantization against integer arithmetic."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kdjax import paths
from kdjax.quantization import (
    QuantizedArray,
    dequantize,
    integer_range,
    quantize,
    symmetric_scale,
)
from kdjax.quantization._arrays import fake_quantize

checked = settings(derandomize=True, deadline=None, max_examples=25)
SHAPE = (3, 4)
matrices = arrays(np.float32, SHAPE, elements=st.floats(-300, 300, width=32))
scales = st.sampled_from([0.1, 0.5, 1.0, 1 / 3, 2.0, 7e-3])
zero_points = st.sampled_from([None, -128, -7, 0, 100, 127])
ALL_BITS = list(range(2, 9))


def limits(bits: int, zero_point: int | None) -> tuple[int, int]:
    return (-(2 ** (bits - 1)) + (zero_point is None), 2 ** (bits - 1) - 1)


def quantized_by_numpy(x: np.ndarray, scale: float, zero_point: int | None, bits: int = 8) -> np.ndarray:
    levels = np.rint(np.asarray(x, np.float32) / np.float32(scale)) + np.float32(zero_point or 0)
    return np.clip(levels, *limits(bits, zero_point)).astype(np.int8)


def dequantized_by_numpy(q: np.ndarray, scale: float, zero_point: int | None) -> np.ndarray:
    return (q.astype(np.float32) - np.float32(zero_point or 0)) * np.float32(scale)


# Integers.


@pytest.mark.parametrize('bits', ALL_BITS)
def test_narrow_range_is_symmetric_and_full_range_has_one_more(bits: int) -> None:
    assert integer_range(bits, narrow=True) == limits(bits, None)
    assert integer_range(bits, narrow=False) == limits(bits, 0)


@checked
@given(matrices, scales, zero_points)
def test_quantize_is_numpys(x: np.ndarray, scale: float, zero_point: int | None) -> None:
    q = quantize(x, scale, zero_point)
    assert q.dtype == jnp.int8
    np.testing.assert_array_equal(q, quantized_by_numpy(x, scale, zero_point))
    np.testing.assert_array_equal(dequantize(q, scale, zero_point), dequantized_by_numpy(np.asarray(q), scale, zero_point))


@checked
@given(matrices, scales, zero_points)
def test_error_is_half_a_step_within_the_range_and_the_distance_to_its_end_outside(
    x: np.ndarray, scale: float, zero_point: int | None
) -> None:
    low, high = ((limit - (zero_point or 0)) * np.float64(np.float32(scale)) for limit in limits(8, zero_point))
    error = np.abs(np.asarray(dequantize(quantize(x, scale, zero_point), scale, zero_point), np.float64) - x)
    outside = np.maximum(np.maximum(low - x, x - high), 0)
    assert np.all(error <= np.maximum(scale / 2, outside) * (1 + 1e-5) + 1e-6 * np.abs(x))


@checked
@given(matrices, scales, zero_points)
def test_what_is_on_the_grid_stays_where_it_is(x: np.ndarray, scale: float, zero_point: int | None) -> None:
    q = quantize(x, scale, zero_point)
    np.testing.assert_array_equal(quantize(dequantize(q, scale, zero_point), scale, zero_point), q)


@pytest.mark.parametrize('zero_point', [None, -128, -5, 0, 127])
def test_every_integer_of_the_range_survives_the_round_trip(zero_point: int | None) -> None:
    low, high = limits(8, zero_point)
    q = np.arange(low, high + 1).astype(np.int8)
    for scale in (1.0, 0.1, 1 / 3, 1e-20, 1e20):
        np.testing.assert_array_equal(quantize(dequantize(q, scale, zero_point), scale, zero_point), q)


@pytest.mark.parametrize('bits', ALL_BITS)
@pytest.mark.parametrize('zero_point', [None, 0, 1])
def test_far_out_of_range_is_clipped_and_does_not_wrap(bits: int, zero_point: int | None) -> None:
    low, high = limits(bits, zero_point)
    x = jnp.array([-jnp.inf, -1e30, -3e9, -300.0, 300.0, 3e9, 1e30, jnp.inf])
    np.testing.assert_array_equal(quantize(x, 1.0, zero_point, bits=bits), [low] * 4 + [high] * 4)


@pytest.mark.parametrize('zero_point', [None, -128, -1, 0, 3, 127])
def test_zero_is_exact(zero_point: int | None) -> None:
    for scale in (0.1, 1 / 3, 1e-30):
        q = quantize(jnp.array([0.0, -0.0]), scale, zero_point)
        np.testing.assert_array_equal(q, zero_point or 0)
        np.testing.assert_array_equal(dequantize(q, scale, zero_point), 0.0)
        np.testing.assert_array_equal(fake_quantize(jnp.zeros(1), scale, zero_point), 0.0)


def test_halves_round_to_even() -> None:
    x = jnp.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5])
    np.testing.assert_array_equal(quantize(x, 1.0), [-2, -2, 0, 0, 2, 2, 4])
    np.testing.assert_array_equal(quantize(x, 1.0, 1), [-1, -1, 1, 1, 3, 3, 5])


@pytest.mark.parametrize('bits', ALL_BITS)
def test_fewer_bits_have_fewer_levels_and_the_largest_magnitude_is_the_last(bits: int) -> None:
    x = np.linspace(-3, 3, 2001).astype(np.float32)
    scale = symmetric_scale(x, bits=bits)
    q = np.asarray(quantize(x, scale, bits=bits))
    levels = 2 ** (bits - 1) - 1
    np.testing.assert_array_equal(np.unique(q), np.arange(-levels, levels + 1))
    np.testing.assert_array_equal(q, quantized_by_numpy(x, scale[0], None, bits))
    np.testing.assert_allclose(scale, [3 / levels], rtol=1e-6)
    assert q[0] == -levels
    assert q[-1] == levels


# Fake quantization.


@functools.cache
def fake(bits: int, asymmetric: bool, batched: bool):
    """Value and gradients of the sum of squares of the fake-quantized array, under jit, and under vmap over the rows."""

    def loss(x: jax.Array, scale: jax.Array, zero_point: jax.Array) -> tuple[jax.Array, jax.Array]:
        call = lambda row: fake_quantize(row, scale, zero_point if asymmetric else None, bits=bits)  # noqa: E731
        y = (jax.vmap(call) if batched else call)(x)
        return jnp.sum(y.astype(jnp.float32) ** 2), y

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))


@pytest.mark.parametrize('batched', [False, True])
@checked
@given(matrices, scales, zero_points)
def test_fake_quantize_is_quantize_and_dequantize(batched: bool, x: np.ndarray, scale: float, zero_point: int | None) -> None:
    """Under jit and vmap, with gradient one inside the range and zero outside, and none for scale and zero point."""
    offset = np.float32(zero_point or 0)
    (_, y), gradients = fake(8, zero_point is not None, batched)(x, np.float32(scale), offset)
    q = quantized_by_numpy(x, scale, zero_point)
    np.testing.assert_array_equal(y, dequantized_by_numpy(q, scale, zero_point))
    levels = np.rint(x / np.float32(scale)) + offset
    low, high = limits(8, zero_point)
    inside = (levels >= low) & (levels <= high)
    np.testing.assert_array_equal(gradients[0], np.where(inside, 2 * np.asarray(y), 0))
    assert gradients[1] == gradients[2] == 0


@pytest.mark.parametrize('zero_point', [None, 5])
def test_gradient_is_one_up_to_the_edges_and_zero_beyond(zero_point: int | None) -> None:
    """The range ends where rounding leaves the integers: half a step past the last level, which is even when it is clipped."""
    low, high = (limit - (zero_point or 0) for limit in limits(8, zero_point))
    inside = jnp.array([low, high, low - 0.49, high + 0.49, 0.0, 0.5, 1.0]) * 0.5
    outside = jnp.array([low - 0.51, high + 0.51, low - 1, high + 1, -1e9, 1e9]) * 0.5
    slope = jax.jit(jax.grad(lambda x: fake_quantize(x, 0.5, zero_point).sum()))
    np.testing.assert_array_equal(slope(inside), 1)
    np.testing.assert_array_equal(slope(outside), 0)


@pytest.mark.parametrize('bits', ALL_BITS)
def test_fake_quantize_with_fewer_bits(bits: int) -> None:
    x = np.linspace(-200, 200, 999).astype(np.float32)
    y = fake_quantize(x, 0.75, bits=bits)
    np.testing.assert_array_equal(y, dequantized_by_numpy(quantized_by_numpy(x, 0.75, None, bits), 0.75, None))


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_half_precision_lands_on_the_grid(dtype: str) -> None:
    """Exactly on dequantized integers in that dtype; a straight-through `x + (q - x)` misses a fifth of them in bfloat16."""
    x = jnp.asarray(3 * np.random.default_rng(0).standard_normal(1000), dtype)
    scale = symmetric_scale(x)
    y, slope = jax.jit(jax.vmap(jax.value_and_grad(lambda x: fake_quantize(x, scale[0]))))(x)
    assert y.dtype == slope.dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(slope, 1)
    np.testing.assert_array_equal(y, dequantize(quantize(x, scale), scale).astype(dtype))
    np.testing.assert_array_equal(fake_quantize(y, scale), y)
    grid = dequantize(jnp.arange(-127, 128, dtype=jnp.int8), scale).astype(dtype)
    assert set(np.asarray(y, np.float32).tolist()) <= set(np.asarray(grid, np.float32).tolist())


def test_fake_quantize_takes_a_scale_per_channel_and_integer_zero_points() -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal(SHAPE), jnp.float32)
    scale, zero_point = jnp.array([[0.01, 0.02, 0.03, 0.04]]), jnp.array([[0, 5, -5, 100]])
    wanted = dequantize(quantize(x, scale, zero_point), scale, zero_point)
    np.testing.assert_array_equal(fake_quantize(x, scale, zero_point), wanted)
    slope = jax.jit(jax.grad(lambda x, scale: fake_quantize(x, scale, zero_point).sum(), argnums=1))(x, scale)
    np.testing.assert_array_equal(slope, jnp.zeros_like(scale))


def test_nan_is_not_hidden() -> None:
    x = jnp.array([jnp.nan, 1.0])
    assert np.isnan(symmetric_scale(x)[0])
    assert np.isnan(fake_quantize(x, 1.0)[0])


# Errors.


@pytest.mark.parametrize('bits', [1, 9, 0, -8, 16])
def test_bits_out_of_range_are_an_error(bits: int) -> None:
    for call in (quantize, fake_quantize):
        with pytest.raises(ValueError, match=f'bits must be between 2 and 8, got {bits}'):
            call(jnp.ones(3), 1.0, bits=bits)
    with pytest.raises(ValueError, match='bits must be between 2 and 8'):
        symmetric_scale(jnp.ones(3), bits=bits)


@pytest.mark.parametrize(
    'x', [jnp.arange(3), jnp.zeros(3, jnp.int8), jnp.zeros(3, bool), np.arange(3)], ids=lambda x: str(x.dtype)
)
def test_integers_are_an_error(x: jax.Array) -> None:
    for name, call in (('quantize', quantize), ('fake_quantize', fake_quantize)):
        with pytest.raises(ValueError, match=f'{name}: x must be floating point, got (u?int|bool)'):
            call(x, 1.0)
    with pytest.raises(ValueError, match='symmetric_scale: x must be floating point'):
        symmetric_scale(x)


@pytest.mark.parametrize('shape', [(1, 3), (5, 4), (2, 1), (1, 1, 4), (5,)], ids=str)
def test_scales_that_do_not_fit_are_an_error(shape: tuple[int, ...]) -> None:
    x, misfit = jnp.ones(SHAPE), jnp.ones(shape)
    for name, call in (('quantize', quantize), ('fake_quantize', fake_quantize), ('dequantize', dequantize)):
        with pytest.raises(
            ValueError, match=rf'{name}: a scale or zero point of shape .* does not fit an array of shape \(3, 4\)'
        ):
            call(x, misfit)
        with pytest.raises(ValueError, match=f'{name}: a scale or zero point of shape'):
            call(x, 1.0, misfit)


# Ranges of integers, groups, extremes.


@pytest.mark.parametrize('bits', ALL_BITS)
@pytest.mark.parametrize('asymmetric', [False, True])
def test_narrow_overrides_the_range_that_the_zero_point_implies(bits: int, asymmetric: bool) -> None:
    x = jnp.linspace(-300, 300, 1201)
    zero_point = 0 if asymmetric else None
    narrow = np.asarray(quantize(x, 1.0, zero_point, bits=bits, narrow=True))
    full = np.asarray(quantize(x, 1.0, zero_point, bits=bits, narrow=False))
    largest = 2 ** (bits - 1) - 1
    np.testing.assert_array_equal(np.unique(narrow), np.arange(-largest, largest + 1))
    np.testing.assert_array_equal(np.unique(full), np.arange(-largest - 1, largest + 1))
    np.testing.assert_array_equal(narrow, np.maximum(full, -largest))
    np.testing.assert_array_equal(fake_quantize(x, 1.0, zero_point, bits=bits, narrow=False), full)
    slope = jax.grad(lambda x: fake_quantize(x, 1.0, zero_point, bits=bits, narrow=False).sum())(x)
    np.testing.assert_array_equal(slope, (np.rint(x) >= -largest - 1) & (np.rint(x) <= largest))


@checked
@given(
    arrays(np.float32, (4, 6), elements=st.floats(-300, 300, width=32)),
    arrays(np.float32, (2, 3), elements=st.floats(0.125, 2, width=32)),
    arrays(np.int8, (2, 3), elements=st.integers(-8, 7)),
    st.booleans(),
)
def test_every_group_is_quantized_as_if_alone(x: np.ndarray, scale: np.ndarray, zero: np.ndarray, asymmetric: bool) -> None:
    """Groups of 2 by 2, without and with zero points, and the gradient of the same groups."""
    zero_point = zero if asymmetric else None
    array = QuantizedArray(quantize(x, scale, zero_point, bits=4), scale, zero_point, bits=4)
    numbers, (y, slope) = array.dequantize(), grouped_value_and_slope()(x, scale, zero, asymmetric)
    assert array.shape == numbers.shape
    assert array.dtype == numbers.dtype
    for i, j in np.ndindex(2, 3):
        block = np.s_[2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
        offset = int(zero[i, j]) if asymmetric else None
        q = quantized_by_numpy(x[block], scale[i, j], offset, bits=4)
        np.testing.assert_array_equal(array.values[block], q)
        np.testing.assert_array_equal(numbers[block], dequantized_by_numpy(q, scale[i, j], offset))
        levels = np.rint(x[block] / scale[i, j]) + np.float32(offset or 0)
        np.testing.assert_array_equal(slope[block], (levels >= limits(4, offset)[0]) & (levels <= limits(4, offset)[1]))
    np.testing.assert_array_equal(y, numbers)


@functools.cache
def grouped_value_and_slope():
    @functools.partial(jax.jit, static_argnums=3)
    def call(x: jax.Array, scale: jax.Array, zero: jax.Array, asymmetric: bool) -> tuple[jax.Array, jax.Array]:
        y, pull = jax.vjp(lambda x: fake_quantize(x, scale, zero if asymmetric else None, bits=4), x)
        return y, pull(jnp.ones_like(y))[0]

    return call


@pytest.mark.parametrize('zero_point', [None, -8, 3])
@pytest.mark.parametrize('bits', [2, 4, 8])
def test_fake_quantize_is_monotone_and_idempotent_and_takes_few_values(bits: int, zero_point: int | None) -> None:
    zero_point = None if zero_point is None else max(zero_point, -(2 ** (bits - 1)))
    x = jnp.asarray(np.sort(np.random.default_rng(bits).normal(scale=40, size=4096)), jnp.float32)
    y = np.asarray(fake_quantize(x, 0.3, zero_point, bits=bits))
    assert np.all(np.diff(y) >= 0)
    np.testing.assert_array_equal(fake_quantize(y, 0.3, zero_point, bits=bits), y)
    assert len(np.unique(y)) == 2**bits - (zero_point is None)


@pytest.mark.parametrize('zero_point', [None, -128])
@pytest.mark.parametrize('scale', [0.0, 1e-45, 1e-40, 2.0**-127, 2.0**-126])
def test_scales_too_small_for_the_hardware_give_numbers(scale: float, zero_point: int | None) -> None:
    """Some processors take them for zero, and 0 / 0 is NaN."""
    x = jnp.array([-jnp.inf, -1.0, -1e-40, 0.0, 1e-40, 1.0, jnp.inf])
    q = quantize(x, scale, zero_point)
    assert np.all(np.asarray(q[jnp.array([3])]) == (zero_point or 0))
    y, slope = jax.value_and_grad(lambda x: fake_quantize(x, scale, zero_point).sum())(x)
    assert np.isfinite(y)
    assert np.all(np.isfinite(slope))
    np.testing.assert_array_equal(fake_quantize(x, scale, zero_point), dequantize(q, scale, zero_point))
    assert np.all(np.abs(dequantize(q, scale, zero_point)) < 1e-30)


def test_infinity_is_clipped_to_the_ends_and_has_no_gradient() -> None:
    x = jnp.array([-jnp.inf, jnp.inf, 1.0])
    for zero_point, ends in ((None, [-63.5, 63.5]), (28, [-78.0, 49.5])):
        np.testing.assert_array_equal(fake_quantize(x, 0.5, zero_point), [*ends, 1.0])
        slope = jax.grad(lambda x, zero_point=zero_point: fake_quantize(x, 0.5, zero_point).sum())(x)
        np.testing.assert_array_equal(slope, [0, 0, 1])


def test_quantized_arrays_are_pytrees_that_keep_their_number_of_bits() -> None:
    scale, zero_point = jnp.array([[0.5], [2.0]]), jnp.array([[1], [-1]], jnp.int8)
    array = QuantizedArray(jnp.array([[1, 3], [0, 7]], jnp.int8), scale, zero_point, bits=4)
    back = jax.jit(lambda array: jax.tree.map(lambda leaf: leaf + leaf.dtype.type(0), array))(array)
    assert back.bits == 4
    np.testing.assert_array_equal(back.dequantize(), [[0, 1], [2, 16]])
    assert list(paths.leaves_with_paths({'a': array})) == ['a/values', 'a/scale', 'a/zero_point']
    assert len(jax.tree.leaves(array)) == 3
    assert len(jax.tree.leaves(QuantizedArray(array.values, scale))) == 2
    assert (array.shape, array.ndim, array.dtype) == ((2, 2), 2, jnp.float32)
    stacked = jax.vmap(lambda array: array.dequantize())(jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), array))
    np.testing.assert_array_equal(stacked, jnp.stack([array.dequantize()] * 2))


def test_sharded_arrays_are_quantized_like_whole_ones() -> None:
    """Groups of 4 along the axis that eight devices divide."""
    mesh = jax.make_mesh((8,), ('model',), axis_types=(jax.sharding.AxisType.Auto,))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((64, 3)), jnp.float32)
    scale = jnp.asarray(np.random.default_rng(1).uniform(0.1, 0.5, (16, 3)), jnp.float32)

    @jax.jit
    def both(x: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
        return quantize(x, scale, bits=4), jax.grad(lambda x: jnp.sum(fake_quantize(x, scale, bits=4) ** 2))(x)

    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('model'))
    sharded = both(jax.device_put(x, sharding), jax.device_put(scale, sharding))
    jax.tree.map(np.testing.assert_array_equal, sharded, both(x, scale))
