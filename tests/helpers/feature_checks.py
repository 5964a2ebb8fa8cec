"""What the tests of losses on feature maps share: maps to draw, and oracles that take one example at a time."""

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays


def activations(*shape):
    """Odd multiples of 1/16 in [-4, 4]: exact in float32, and far enough from zero for finite differences of |f|."""
    integers = arrays(np.int32, shape, elements=st.integers(-32, 31), fill=st.nothing())
    return integers.map(lambda x: ((2 * x + 1) / 16).astype(np.float32))


def window(i, outputs, inputs):
    """The inputs that output `i` of an adaptive average pooling takes the mean of."""
    return slice(int(np.floor(i * inputs / outputs)), int(np.ceil((i + 1) * inputs / outputs)))


def pool_oracle(image, height, width):
    """Adaptive average pooling of [height, width] or [height, width, channels]: output (i, j) is the mean of its window."""
    return np.array(
        [
            [image[window(i, height, image.shape[0]), window(j, width, image.shape[1])].mean(axis=(0, 1)) for j in range(width)]
            for i in range(height)
        ]
    )


def pool_to_smaller(first, second):
    """Both images at the smaller height and the smaller width."""
    height, width = np.minimum(first.shape[:2], second.shape[:2])
    return pool_oracle(first, height, width), pool_oracle(second, height, width)


def by_examples(oracle, *arrays):
    """The oracle on every example."""
    return np.array([oracle(*example) for example in zip(*arrays, strict=True)])


def example_gradient(function, x, step=1e-6):
    """Central differences of a function whose value for an example depends on that example of `x` alone."""
    gradient = np.zeros(x.shape)
    for index in np.ndindex(x.shape[1:]):
        moved = np.zeros(x.shape[1:])
        moved[index] = step
        gradient[(slice(None), *index)] = (function(x + moved) - function(x - moved)) / (2 * step)
    return gradient


def check_against_oracle(oracle, arrays, computed, rtol=1e-5):
    """Compares values, and the gradients of as many of the arrays, from the first on, as were computed."""
    exact = [x.astype(np.float64) if np.issubdtype(x.dtype, np.floating) else x for x in arrays]
    values, *gradients = computed
    np.testing.assert_allclose(values, by_examples(oracle, *exact), rtol=rtol, atol=rtol / 10)
    for i, gradient in enumerate(gradients):
        expected = example_gradient(lambda x, i=i: by_examples(oracle, *exact[:i], x, *exact[i + 1 :]), exact[i])
        np.testing.assert_allclose(gradient, expected, rtol=rtol, atol=rtol * max(1.0, np.abs(expected).max()))
