"""Learned step sizes against the paper's formulas in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.quantization import initial_step, learned_step, mse_range, symmetric_scale_of_range
from kdjax.quantization._arrays import fake_quantize


def gradients_by_numpy(
    x: np.ndarray, scale: np.ndarray, negative: int, positive: int, count: int, upstream: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Equations 3 and 5 of the paper for Q_N = negative and Q_P = positive, for every number of x before any sum."""
    v = x.astype(np.float64) / np.asarray(scale, np.float64)
    inside = (-negative < v) & (v < positive)
    slope = np.where(v <= -negative, -negative, np.where(v >= positive, positive, np.rint(v) - v))
    return np.where(inside, upstream, 0), upstream * slope / np.sqrt(count * positive)


@functools.cache
def value_and_gradients(bits: int, zero_point: int | None, count: int | None):
    def call(x: jax.Array, scale: jax.Array, upstream: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        y, pull = jax.vjp(lambda x, scale: learned_step(x, scale, zero_point, bits=bits, count=count), x, scale)
        return y, *pull(upstream)

    return jax.jit(call)


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=3, size=shape).astype(np.float32)


@pytest.mark.parametrize('bits,zero_point', [(8, None), (4, None), (2, None), (8, -128), (3, -4), (4, 3), (4, 7)])
def test_value_and_gradients_are_the_papers(bits: int, zero_point: int | None) -> None:
    """Signed weights, unsigned activations (nothing below zero), and grids between."""
    x, upstream, scale = draw(40, 5), draw(40, 5, seed=1), np.float32(0.37)
    y, x_gradient, scale_gradient = value_and_gradients(bits, zero_point, None)(x, scale, upstream)
    np.testing.assert_array_equal(y, fake_quantize(x, scale, zero_point, bits=bits))
    smallest, largest = -(2 ** (bits - 1)) + (zero_point is None), 2 ** (bits - 1) - 1
    offset = zero_point or 0
    wanted = gradients_by_numpy(x, scale, offset - smallest, max(largest - offset, 1), 200, upstream)
    if largest == offset:  # no level above zero: the paper has no such grid; g is then that of one level
        inside = (x / scale > smallest - offset) & (x < 0)
        slope = np.where(inside, np.rint(x / scale) - x / scale, np.clip(x / scale, smallest - offset, 0))
        wanted = np.where(inside, upstream, 0), upstream * slope.astype(np.float64) / np.sqrt(200)
    np.testing.assert_array_equal(x_gradient, wanted[0])
    np.testing.assert_allclose(scale_gradient, wanted[1].sum(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('shape', [(1, 6), (8, 6), (2, 3), (4, 1), (6,)], ids=str)
def test_every_scale_gets_the_gradient_of_its_own_numbers(shape: tuple[int, ...]) -> None:
    """A scale for a channel, a number, a group of 4 by 2, a group of rows, and a channel without the other axis."""
    x, upstream = draw(8, 6), draw(8, 6, seed=1)
    scale = np.random.default_rng(2).uniform(0.2, 0.8, shape).astype(np.float32)
    gradient = value_and_gradients(4, None, None)(x, scale, upstream)[2]
    wide = scale.reshape((1,) * (2 - scale.ndim) + shape)
    repeats = tuple(length // entries for length, entries in zip(x.shape, wide.shape, strict=True))
    full = np.repeat(np.repeat(wide, repeats[0], 0), repeats[1], 1)
    per_number = gradients_by_numpy(x, full, 7, 7, 48 // scale.size, upstream)[1]
    blocks = per_number.reshape(wide.shape[0], repeats[0], wide.shape[1], repeats[1])
    assert gradient.shape == shape
    np.testing.assert_allclose(gradient, blocks.sum((1, 3)).reshape(shape), rtol=1e-4, atol=1e-5)


def test_count_sets_the_gradient_scale() -> None:
    x, upstream = draw(10, 4), draw(10, 4, seed=1)
    of = lambda count: value_and_gradients(8, None, count)(x, np.float32(0.1), upstream)[2]  # noqa: E731
    np.testing.assert_array_equal(of(40), of(None))
    np.testing.assert_allclose(of(4) * np.sqrt(4), of(40) * np.sqrt(40), rtol=1e-5)
    # Under vmap a number is counted with its own example.
    slope = jax.jit(jax.grad(lambda x, scale: learned_step(x, scale).sum(), argnums=1))
    each = jax.vmap(slope, in_axes=(0, None))(x, jnp.float32(0.1))
    np.testing.assert_allclose(each, [slope(row, jnp.float32(0.1)) for row in x], rtol=1e-4, atol=1e-6)


def test_at_the_ends_of_the_range_the_number_is_clipped() -> None:
    """Unlike `fake_quantize`, whose gradient passes up to half a step beyond."""
    x = jnp.array([-3.5, -3.4, 3.4, 3.5, 3.6]) * 2
    slope = jax.grad(lambda x: learned_step(x, 1.0, bits=4).sum())(x)
    np.testing.assert_array_equal(slope, [0, 1, 1, 0, 0])


def test_half_precision_lands_on_the_grid_and_the_scale_has_its_gradient_in_float32() -> None:
    x = jnp.asarray(draw(500), jnp.bfloat16)
    scale = jnp.float32(0.1)
    y, pull = jax.vjp(functools.partial(learned_step, bits=4), x, scale)
    x_gradient, scale_gradient = pull(jnp.ones_like(y))
    assert (y.dtype, x_gradient.dtype, scale_gradient.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(y, fake_quantize(x, scale, bits=4))
    wide = x.astype(jnp.float32)
    wanted = jax.grad(lambda scale: learned_step(wide, scale, bits=4).sum())(scale)
    np.testing.assert_allclose(scale_gradient, wanted, rtol=1e-6)


@pytest.mark.parametrize('start', [1 / 16, 2.0])
def test_descent_finds_a_grid_about_as_good_as_the_search(start: float) -> None:
    """From a scale that is far too small, and from one that is too large."""
    x = jnp.asarray(draw(400))
    error = lambda y: jnp.mean((x - y) ** 2)  # noqa: E731

    @jax.jit
    def descend(scale: jax.Array) -> jax.Array:
        slope = jax.grad(lambda scale: error(learned_step(x, scale, bits=4, count=1)))
        return jax.lax.fori_loop(0, 2000, lambda _, scale: scale - 0.02 * slope(scale), scale)

    scale = initial_step(x, bits=4)[0] * start
    best = error(fake_quantize(x, symmetric_scale_of_range(*mse_range(x, bits=4), bits=4), bits=4))
    assert error(fake_quantize(x, scale, bits=4)) > 3 * best
    assert error(fake_quantize(x, descend(scale), bits=4)) < 1.2 * best


def test_infinity_zero_and_tiny_scales_have_finite_gradients_and_nan_is_not_hidden() -> None:
    x = jnp.array([-jnp.inf, 0.0, 1.0, jnp.inf])
    both = jax.grad(lambda x, scale: learned_step(x, scale).sum(), argnums=(0, 1))
    for scale in (1.0, 1e-40, 0.0):
        assert all(np.all(np.isfinite(gradient)) for gradient in both(x, jnp.float32(scale)))
    assert np.isnan(learned_step(jnp.array([jnp.nan]), 1.0)[0])
    assert learned_step(jnp.zeros((0, 3)), 1.0).shape == (0, 3)


@pytest.mark.parametrize('bits,zero_point', [(8, None), (2, None), (4, -8), (4, 7)])
def test_initial_step_is_twice_the_mean_magnitude_over_the_root_of_the_levels(bits: int, zero_point: int | None) -> None:
    x = draw(8, 6)
    root = np.sqrt(max(2 ** (bits - 1) - 1 - (zero_point or 0), 1))
    magnitudes = np.abs(x.astype(np.float64))
    call = functools.partial(initial_step, bits=bits, zero_point=zero_point)
    np.testing.assert_allclose(call(x), [[2 * magnitudes.mean() / root]], rtol=1e-5)
    np.testing.assert_allclose(call(x, channel_axis=1), 2 * magnitudes.mean(0, keepdims=True) / root, rtol=1e-5)
    groups = magnitudes.reshape(2, 4, 6).mean(1)
    np.testing.assert_allclose(call(x, channel_axis=1, group_size=4), 2 * groups / root, rtol=1e-5)


def test_initial_step_of_zeros_and_of_nothing_is_one() -> None:
    np.testing.assert_array_equal(initial_step(jnp.zeros((3, 2)), channel_axis=1), [[1, 1]])
    np.testing.assert_array_equal(initial_step(jnp.zeros((0, 2))), [[1]])


def test_integers_misfits_and_bits_out_of_range_are_an_error() -> None:
    with pytest.raises(ValueError, match='learned_step: x must be floating point, got int32'):
        learned_step(jnp.arange(3), 1.0)
    with pytest.raises(ValueError, match='initial_step: x must be floating point, got int32'):
        initial_step(jnp.arange(3))
    with pytest.raises(ValueError, match=r'learned_step: a scale or zero point of shape \(2,\) does not fit'):
        learned_step(jnp.ones(3), jnp.ones(2))
    for call in (lambda: learned_step(jnp.ones(3), 1.0, bits=9), lambda: initial_step(jnp.ones(3), bits=9)):
        with pytest.raises(ValueError, match='bits must be between 2 and 8, got 9'):
            call()
