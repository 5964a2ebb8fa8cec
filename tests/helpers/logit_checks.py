"""What the tests of losses on logits share: rows of extreme logits, float64 oracles, and slopes along a direction."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import losses

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


def log_softmax(z):
    """z - logsumexp(z), in float64, over the last axis."""
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def kl(log_p, log_q):
    """Σ p (log p - log q) over the last axis, where 0 log 0 = 0."""
    difference = np.where(np.isneginf(log_p), 0, log_p) - log_q
    return np.sum(np.where(np.isneginf(log_p), 0, np.exp(log_p) * difference), axis=-1)


def doubles(*numbers):
    return [np.asarray(x, np.float64) for x in numbers]


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def assert_slope(function, x, gradient, *, seed=0, rtol=1e-4, atol=2e-5):
    """The gradient of the sum of a function's values is what moving along a random direction says."""
    direction = np.random.default_rng(seed).normal(size=x.shape)
    up, down = (np.sum(function(x + step * direction)) for step in (1e-6, -1e-6))
    np.testing.assert_allclose(np.sum(np.float64(gradient) * direction), (up - down) / 2e-6, rtol=rtol, atol=atol)


def softmax_oracle(z, temperature):
    """exp(z / T) / Σ exp(z / T), in float64."""
    exponentials = np.exp((z - z.max()) / temperature)
    return exponentials / exponentials.sum()


def row_gradient(function, x, step=1e-6):
    """Central differences of a function whose value in a row depends on that row of `x` alone."""
    columns = np.eye(x.shape[1]) * step
    return np.stack([(function(x + column) - function(x - column)) / (2 * step) for column in columns], axis=-1)


def same_rows(*row):
    """The same example in every row."""
    return np.tile(np.array(row, np.float32), (ROWS, 1))


@functools.partial(jax.jit, static_argnames='name')
def with_gradients(name, student, teacher, where=None, **options):
    """The value of a loss with those options, and the gradients of its sum."""
    values, pullback = jax.vjp(lambda s, t: getattr(losses, name)(s, t, where=where, **options), student, teacher)
    return values, *pullback(jnp.ones_like(values))


def random_logits(seed=0):
    return np.random.default_rng(seed).normal(size=(2, ROWS, CLASSES)).astype(np.float32)
