"""Quantized arrays and products of integers against qwix, whose symmetric bound is that of our full range, 127.5."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix

from kdjax.quantization import QuantizedArray, affine_scale, dequantize, minmax_range, quantize, symmetric_scale

TYPES = {8: jnp.int8, 6: 'int6', 4: jnp.int4, 2: 'int2'}


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def assert_equal(x: jax.Array, scale: jax.Array, theirs: qwix.QArray, bits: int) -> None:
    """Scales to rounding, integers exactly, but for the ends, which lie half-way between two integers on this range."""
    np.testing.assert_allclose(scale, theirs.scale, rtol=1e-6)
    levels = np.asarray(x, np.float64) / np.asarray(dequantize(jnp.ones(x.shape, jnp.int8), theirs.scale))
    between = np.abs(np.abs(levels) % 1 - 0.5) > 1e-5
    assert np.sum(~between) <= scale.size
    ours = quantize(x, scale, bits=bits, narrow=False)
    np.testing.assert_array_equal(ours[between], theirs.qvalue.astype(jnp.int8)[between])
    np.testing.assert_allclose(dequantize(ours, scale)[between], qwix.dequantize(theirs)[between], rtol=1e-6)


@pytest.mark.parametrize('bits', TYPES)
@pytest.mark.parametrize('channels', [(), (1,), (0, 1)])
def test_symmetric_arrays_agree(bits: int, channels: tuple[int, ...]) -> None:
    x = draw(16, 6)
    scale = symmetric_scale(x, channel_axis=channels, bits=bits, narrow=False)
    assert_equal(x, scale, qwix.quantize(x, TYPES[bits], channelwise_axes=channels), bits)


@pytest.mark.parametrize('bits', [8, 4])
def test_groups_are_its_tiles(bits: int) -> None:
    x = draw(64, 6)
    scale = symmetric_scale(x, channel_axis=1, group_size=16, bits=bits, narrow=False)
    assert_equal(x, scale, qwix.quantize(x, TYPES[bits], channelwise_axes=(1,), tiled_axes={0: 16}), bits)


@pytest.mark.parametrize('bits', [8, 4])
@pytest.mark.parametrize('offset', [-5.0, -0.7, 0.0, 3.0])
def test_asymmetric_arrays_agree(bits: int, offset: float) -> None:
    x = draw(16, 6) + offset
    theirs = qwix.quantize(x, TYPES[bits], channelwise_axes=(1,), calibration_method='minmax')
    scale, zero_point = affine_scale(*minmax_range(x, channel_axis=1), bits=bits)
    np.testing.assert_allclose(scale, theirs.scale, rtol=1e-6)
    np.testing.assert_array_equal(zero_point, theirs.zero_point.astype(jnp.int8))
    np.testing.assert_array_equal(quantize(x, theirs.scale, zero_point, bits=bits), theirs.qvalue.astype(jnp.int8))
    ours = dequantize(quantize(x, scale, zero_point, bits=bits), scale, zero_point)
    np.testing.assert_allclose(ours, qwix.dequantize(theirs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('bits', [8, 6])
def test_products_of_integers_agree(bits: int) -> None:
    """int8 operands and int32 sums, times both scales."""
    left, right = draw(5, 64), draw(64, 7, seed=1)
    theirs = [qwix.quantize(x, TYPES[bits], channelwise_axes=(axis,)) for axis, x in enumerate((left, right))]
    ours = [
        QuantizedArray(quantize(x, their.scale, bits=bits, narrow=False), their.scale)
        for x, their in zip((left, right), theirs, strict=True)
    ]
    dimensions = (((1,), (0,)), ((), ()))
    sums = jax.lax.dot_general(*(array.values for array in ours), dimensions, preferred_element_type=jnp.int32)
    with jax.numpy_dtype_promotion('standard'):
        product = qwix.dot_general(*theirs, dimensions)
    np.testing.assert_allclose(sums.astype(jnp.float32) * ours[0].scale * ours[1].scale, product, rtol=1e-6)
    exact = np.asarray(ours[0].dequantize(), np.float64) @ np.asarray(ours[1].dequantize(), np.float64)
    np.testing.assert_allclose(product, exact, rtol=1e-5, atol=1e-5)
