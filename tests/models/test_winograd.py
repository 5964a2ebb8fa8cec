"""Winograd's convolution: against XLA's own, where it is used and where it is not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.model_checks import filled

from kdjax import models, networks

LAYOUTS = 'NHWC', 'HWIO', 'NHWC'


def convolve(lowering, inputs, kernel, strides=(1, 1), padding='SAME', **options):
    return lowering(inputs, kernel, strides, padding, dimension_numbers=LAYOUTS, precision=jax.lax.Precision.HIGHEST, **options)


def drawn(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize('size', [(4, 6), (5, 4), (4, 3), (7, 5), (1, 1), (2, 2)])
@pytest.mark.parametrize('padding', ['SAME', [(1, 1), (1, 1)], ((1, 1), (1, 1))])
def test_values_and_gradients_are_those_of_the_convolution(size, padding):
    inputs, kernel, gradient = drawn((2, *size, 32), (3, 3, 32, 33), (2, *size, 33))

    def with_gradients(lowering):
        output, pullback = jax.vjp(lambda x, w: convolve(lowering, x, w, padding=padding), inputs, kernel)
        return output, *pullback(gradient)

    wanted = jax.jit(lambda: with_gradients(jax.lax.conv_general_dilated))()
    for x, y in zip(jax.jit(lambda: with_gradients(models.winograd_convolution))(), wanted, strict=True):
        assert x.shape == y.shape
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4 * np.abs(y).max())


def test_it_holds_the_products_of_sixteen_tiles_and_no_convolution():
    inputs, kernel = drawn((2, 4, 6, 64), (3, 3, 64, 64))
    text = str(jax.make_jaxpr(jax.grad(lambda x, w: convolve(models.winograd_convolution, x, w).sum(), (0, 1)))(inputs, kernel))
    assert 'conv_general_dilated' not in text
    assert 'dot_general' in text


def test_second_derivatives_go_through():
    inputs, kernel = drawn((1, 2, 4, 64), (3, 3, 64, 64))

    def penalty(lowering):
        return lambda w: jnp.sum(jax.grad(lambda x: jnp.sum(jnp.square(convolve(lowering, x, w))))(inputs) ** 2)

    got, wanted = (jax.jit(jax.grad(penalty(f)))(kernel) for f in (models.winograd_convolution, jax.lax.conv_general_dilated))
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())


def test_several_kernels_under_vmap():
    inputs, kernels = drawn((2, 4, 4, 64), (3, 3, 3, 64, 64))
    lowerings = models.winograd_convolution, jax.lax.conv_general_dilated
    got, wanted = (jax.vmap(functools.partial(convolve, lowering, inputs))(kernels) for lowering in lowerings)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    'inputs, kernel, options',
    [
        ((2, 5, 4, 8), (3, 3, 8, 64), {}),
        ((2, 5, 4, 64), (3, 3, 64, 8), {}),
        ((2, 5, 4, 64), (1, 1, 64, 64), {}),
        ((2, 5, 4, 64), (3, 3, 64, 64), {'strides': (2, 2)}),
        ((2, 5, 4, 64), (3, 3, 64, 64), {'padding': 'VALID'}),
        ((2, 5, 4, 64), (3, 3, 64, 64), {'padding': [(2, 0), (1, 1)]}),
        ((2, 5, 4, 64), (3, 3, 64, 64), {'rhs_dilation': (2, 2)}),
        ((2, 5, 4, 128), (3, 3, 64, 64), {'feature_group_count': 2}),
    ],
)
def test_everything_else_is_the_plain_convolution(inputs, kernel, options):
    inputs, kernel = drawn(inputs, kernel)
    texts = [
        str(jax.make_jaxpr(lambda x, w, f=f: convolve(f, x, w, **options))(inputs, kernel))
        for f in (models.winograd_convolution, jax.lax.conv_general_dilated)
    ]
    assert 'conv_general_dilated' in texts[0]
    assert texts[0] == texts[1]


def test_half_precision_is_the_plain_convolution():
    inputs, kernel = (x.astype(jnp.bfloat16) for x in drawn((2, 4, 4, 64), (3, 3, 64, 64)))
    assert 'conv_general_dilated' in str(
        jax.make_jaxpr(lambda x, w: convolve(models.winograd_convolution, x, w))(inputs, kernel)
    )


def test_networks_compute_the_same():
    inputs = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    for module in (models.ResNet(8, widths=(4, 64, 64, 8)), models.CNN((64, 64), (8,))):
        variables = filled(module, inputs)
        wanted, got = (
            jax.jit(networks.from_linen(each).apply)(variables, inputs)[0].logits
            for each in (module, module.clone(convolution=models.winograd_convolution))
        )
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
