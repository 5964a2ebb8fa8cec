"""Convolution as a product of matrices: against XLA's own."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.model_checks import filled

from kdjax import models, networks
from kdjax.models._layers import max_pool


def convolve(convolution: Callable, strides: tuple[int, int], padding: object) -> Callable:
    """Of images and kernels, in the layouts of Flax."""
    return lambda inputs, kernel: convolution(
        inputs, kernel, strides, padding, dimension_numbers=('NHWC', 'HWIO', 'NHWC'), precision=jax.lax.Precision.HIGHEST
    )


@pytest.mark.parametrize(
    'size, window, strides, padding',
    [
        ((5, 4), (3, 3), (1, 1), 'SAME'),
        ((5, 4), (3, 3), (2, 2), 'SAME'),
        ((7, 4), (3, 3), (2, 2), 'VALID'),
        ((6, 5), (3, 3), (2, 2), [(1, 1), (1, 1)]),
        ((5, 4), (1, 1), (1, 1), 'VALID'),
        ((5, 4), (1, 1), (2, 2), [(0, 0), (0, 0)]),
        ((5, 7), (2, 3), (1, 2), [(0, 2), (3, 1)]),
    ],
)
def test_im2col_is_the_convolution(size: tuple, window: tuple, strides: tuple, padding: object) -> None:
    """Values, and gradients of images and kernel."""
    rng = np.random.default_rng(0)
    inputs, kernel = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((2, *size, 3), (*window, 3, 4)))

    def with_gradients(convolution: Callable) -> Callable:
        def run(inputs: jax.Array, kernel: jax.Array) -> tuple:
            output, pullback = jax.vjp(convolve(convolution, strides, padding), inputs, kernel)
            return output, pullback(jnp.cos(jnp.arange(output.size, dtype=jnp.float32)).reshape(output.shape))

        return jax.jit(run)

    got, wanted = (with_gradients(each)(inputs, kernel) for each in (models.im2col_convolution, jax.lax.conv_general_dilated))
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, wanted)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), got, wanted)


def test_im2col_of_several_kernels_is_one_batched_product() -> None:
    inputs = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 4, 3)), jnp.float32)
    kernels = jnp.asarray(np.random.default_rng(1).standard_normal((6, 3, 3, 3, 4)), jnp.float32)
    several = jax.vmap(convolve(models.im2col_convolution, (2, 2), 'SAME'), (None, 0))
    one_by_one = [convolve(jax.lax.conv_general_dilated, (2, 2), 'SAME')(inputs, kernel) for kernel in kernels]
    np.testing.assert_allclose(jax.jit(several)(inputs, kernels), np.stack(one_by_one), rtol=1e-5, atol=1e-5)
    text = str(jax.make_jaxpr(several)(inputs, kernels))
    assert 'conv_general_dilated' not in text
    assert text.count('dot_general[') == 1


def test_resnet_with_im2col_is_the_resnet() -> None:
    """Of the same variables: logits and batch statistics in training."""
    inputs = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
    plain = models.ResNet(8, widths=(4, 4, 6, 8))
    variables = filled(plain, inputs)
    modules = plain, plain.clone(convolution=models.im2col_convolution)
    shapes = [jax.eval_shape(networks.from_linen(module).init, jax.random.key(0), inputs) for module in modules]
    assert shapes[0] == shapes[1]
    wanted, got = (
        jax.jit(functools.partial(networks.from_linen(module).apply, train=True))(variables, inputs) for module in modules
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), got, wanted)


@pytest.mark.parametrize(
    'inputs, kernel, options, message',
    [
        ((2, 5, 5, 3), (3, 3, 3, 4), {'rhs_dilation': (2, 2)}, r'without dilation .* dilations \[1, 2\]'),
        ((2, 5, 5, 3), (3, 3, 3, 4), {'lhs_dilation': (1, 3)}, r'without dilation .* dilations \[1, 3\]'),
        ((2, 5, 5, 4), (3, 3, 2, 4), {'feature_group_count': 2}, 'or groups.* 2 groups'),
        ((2, 5, 3), (3, 3, 4), {}, r'four axes.*\(2, 5, 3\), \(3, 3, 4\)'),
        ((2, 5, 5, 4), (3, 3, 2, 4), {}, r'inputs \(2, 5, 5, 4\) and kernel \(3, 3, 2, 4\) must have the same channels'),
        ((2, 3, 5, 5), (4, 3, 3, 3), {'dimension_numbers': ('NCHW', 'OIHW', 'NCHW')}, 'must be .*NHWC.*, got .*NCHW'),
    ],
)
def test_convolutions_that_im2col_does_not_know_are_errors(inputs: tuple, kernel: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f'^im2col_convolution: .*{message}'):
        models.im2col_convolution(jnp.ones(inputs), jnp.ones(kernel), (1, 1), 'SAME', **options)


@pytest.mark.parametrize('size', [(4, 6), (5, 3), (1, 4), (2, 1), (1, 1)])
def test_max_pool_is_flax_pooling(size: tuple) -> None:
    images = jnp.asarray(np.random.default_rng(0).standard_normal((3, *size, 2)), jnp.float32)
    window = min(2, size[0]), min(2, size[1])

    def with_gradient(pool: Callable) -> tuple:
        output, pullback = jax.vjp(pool, images)
        return output, pullback(jnp.cos(jnp.arange(output.size, dtype=jnp.float32)).reshape(output.shape))[0]

    got, wanted = with_gradient(max_pool), with_gradient(lambda x: nn.max_pool(x, window, strides=window))
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


@pytest.mark.parametrize(
    'channels, options, ways',
    [
        ((3, 8), {}, ('dot_general', 1)),
        ((64, 32), {}, ('dot_general', 16)),
        ((16, 32), {}, ('conv_general_dilated', 1)),
        ((1, 4), {'feature_group_count': 4}, ('conv_general_dilated', 1)),
        ((3, 8), {'rhs_dilation': (2, 2)}, ('conv_general_dilated', 1)),
    ],
)
def test_cpu_convolution_chooses_and_computes_the_same(channels: tuple, options: dict, ways: tuple) -> None:
    rng = np.random.default_rng(0)
    inputs, kernel = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((2, 6, 4, channels[0] * options.get('feature_group_count', 1)), (3, 3, *channels))
    )

    def run(convolution: Callable) -> Callable:
        return lambda x, w: convolution(x, w, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'), **options)

    got, wanted = (jax.jit(run(f))(inputs, kernel) for f in (models.cpu_convolution, jax.lax.conv_general_dilated))
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
    way, count = ways
    text = str(jax.make_jaxpr(run(models.cpu_convolution))(inputs, kernel))
    # Beside the products of the tiles there are two of the kernel with its matrices.
    assert text.count(f'{way}[') in (count, count + 2)
