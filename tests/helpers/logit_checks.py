"""What the tests of losses on logits share: rows of extreme logits, and slopes along a direction."""

import numpy as np

ROWS, CLASSES = 4, 5
INF = float('inf')
EXTREME_ROWS = np.array(
    [
        [0.0, 0.0, 0.0, 0.0],
        [7.0, 7.0, 7.0, 7.0],
        [1e4, -1e4, 0.0, 1.0],
        [-1e4, 1e4, 1e4, -1e4],
        [-1e4, -1e4, -1e4, -1e4],
        [0.0, 1.0, -INF, 2.0],
        [-INF, 1.0, 2.0, 3.0],
        [-INF, -INF, -INF, 3.0],
        [3.0, -INF, -INF, -INF],
        [1e4, -INF, -1e4, -INF],
        [-INF, -INF, -INF, -INF],
    ],
    np.float32,
)


def doubles(*numbers):
    return [np.asarray(x, np.float64) for x in numbers]


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def assert_slope(function, x, gradient, *, seed=0, rtol=1e-4, atol=2e-5):
    """The gradient of the sum of a function's values is what moving along a random direction says."""
    direction = np.random.default_rng(seed).normal(size=x.shape)
    up, down = (np.sum(function(x + step * direction)) for step in (1e-6, -1e-6))
    np.testing.assert_allclose(np.sum(np.float64(gradient) * direction), (up - down) / 2e-6, rtol=rtol, atol=atol)


def row_gradient(function, x, step=1e-6):
    """Central differences of a function whose value in a row depends on that row of `x` alone."""
    columns = np.eye(x.shape[1]) * step
    return np.stack([(function(x + column) - function(x - column)) / (2 * step) for column in columns], axis=-1)


def same_rows(*row):
    """The same example in every row."""
    return np.tile(np.array(row, np.float32), (ROWS, 1))


def random_logits(seed=0):
    return np.random.default_rng(seed).normal(size=(2, ROWS, CLASSES)).astype(np.float32)
