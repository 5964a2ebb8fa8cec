"""Integer arithmetic against a numpy oracle, and fake quantization against integer arithmetic."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kdjax import networks, paths
from kdjax.quantization import (
    QuantizedArray,
    dequantize,
    dequantize_weights,
    fake_quantize,
    integer_range,
    quantize,
    quantize_weights,
    symmetric_scale,
)

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


# Scales.


some_zero = st.one_of(st.just(0.0), st.floats(2.0**-100, 2.0**100, width=32), st.floats(-(2.0**100), -(2.0**-100), width=32))


@checked
@given(arrays(np.float32, (2, 3, 4), elements=some_zero), st.sampled_from([None, 0, 1, 2, -1, -3]))
def test_symmetric_scale_is_the_largest_magnitude_of_the_channel(x: np.ndarray, axis: int | None) -> None:
    scale = symmetric_scale(x, channel_axis=axis)
    others = tuple(i for i in range(3) if axis is None or i != axis % 3)
    largest = np.abs(x).max(others, keepdims=True)
    assert scale.dtype == jnp.float32
    assert scale.shape == largest.shape
    np.testing.assert_allclose(scale, np.where(largest > 0, largest / 127, 1), rtol=1e-6)


@checked
@given(arrays(np.float32, SHAPE, elements=st.floats(-1e3, 1e3, width=32)))
def test_per_channel_each_column_is_quantized_as_if_alone(x: np.ndarray) -> None:
    scale = symmetric_scale(x, channel_axis=-1)
    q = quantize(x, scale)
    for j in range(SHAPE[1]):
        np.testing.assert_array_equal(q[:, j], quantized_by_numpy(x[:, j], scale[0, j], None))
    error = np.abs(np.asarray(dequantize(q, scale)) - x)
    assert np.all(error <= np.asarray(scale) / 2 * (1 + 1e-5))


def test_channel_of_zeros_has_scale_one_and_stays_zero() -> None:
    x = jnp.array([[0.0, 5.0], [0.0, -1.0]])
    scale = symmetric_scale(x, channel_axis=1)
    assert scale[0, 0] == 1
    np.testing.assert_array_equal(dequantize(quantize(x, scale), scale)[:, 0], 0)
    np.testing.assert_array_equal(symmetric_scale(jnp.zeros((2, 2))), [[1]])
    np.testing.assert_array_equal(symmetric_scale(jnp.zeros((0, 2)), channel_axis=1), [[1, 1]])
    assert symmetric_scale(jnp.float32(-2.54)).shape == ()


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


# Trees of weights.


@functools.cache
def linen_params() -> dict:
    module = nn.Sequential([nn.Conv(4, (3, 3)), nn.relu, lambda x: x.reshape(x.shape[0], -1), nn.Dense(5)])
    inputs, rng = jax.ShapeDtypeStruct((2, 4, 4, 2), jnp.float32), np.random.default_rng(0)
    shapes = jax.eval_shape(networks.from_linen(module).init, jax.random.key(0), inputs)['params']
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype), shapes)


def test_kernels_become_integers_with_a_scale_per_output_channel_and_biases_stay() -> None:
    params = linen_params()
    tree = quantize_weights(params)
    assert sorted(tree) == sorted(params)
    for layer, weights in tree.items():
        kernel, original = weights['kernel'], np.asarray(params[layer]['kernel'])
        assert weights['bias'] is params[layer]['bias']
        assert isinstance(kernel, QuantizedArray)
        assert kernel.values.dtype == jnp.int8
        assert kernel.values.shape == original.shape
        assert kernel.scale.shape == (1,) * (original.ndim - 1) + original.shape[-1:]
        # Every channel uses its whole range, and no weight is off by more than half a step of its channel.
        magnitudes = np.abs(np.asarray(kernel.values, int)).reshape(-1, original.shape[-1])
        np.testing.assert_array_equal(magnitudes.max(0), 127)
        error = np.abs(np.asarray(kernel.dequantize()) - original)
        assert np.all(error <= np.asarray(kernel.scale) / 2 * (1 + 1e-5))


def test_dequantized_weights_are_a_tree_of_arrays_like_the_original() -> None:
    params = linen_params()
    back = dequantize_weights(quantize_weights(params))
    assert jax.tree.structure(back) == jax.tree.structure(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(back)} == {jnp.dtype('float32')}
    # Quantizing what lies on the grid changes nothing any more.
    again = dequantize_weights(quantize_weights(back))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=0), again, back)


def test_quantized_trees_go_through_jit_and_pruned_weights_stay_zero() -> None:
    params = {'kernel': jnp.array([[1.0, 0.0], [0.0, -3.0]], jnp.bfloat16)}
    back = jax.jit(lambda params: dequantize_weights(quantize_weights(params)))(params)
    np.testing.assert_array_equal(back['kernel'] == 0, params['kernel'] == 0)
    np.testing.assert_allclose(back['kernel'], [[1, 0], [0, -3]], rtol=1e-6)


def test_leaves_choose_what_is_quantized_and_nothing_chosen_is_an_error() -> None:
    tree = quantize_weights(linen_params(), leaves='layers_3/*')
    quantized = {path for path, leaf in paths.leaves_with_paths(tree).items() if 'values' in path}
    assert quantized == {'layers_3/kernel/values', 'layers_3/bias/values'}
    with pytest.raises(ValueError, match='matches no path; there are: layers_0/bias, layers_0/kernel'):
        quantize_weights(linen_params(), leaves='head/*')
