"""The Gaussian prior, against posteriors that can be written down."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdjax.optimizers import gaussian_prior


def minimise(gradient, start, optimizer, steps):
    @jax.jit
    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(gradient(params), state, params)
        return (optax.apply_updates(params, updates), state), params

    carry, path = jax.lax.scan(step, (start, optimizer.init(start)), length=steps)
    return carry[0], path


@pytest.mark.parametrize('precision', [0.0, 0.3, 4.0])
def test_ends_at_the_posterior_mode_of_a_linear_model(precision):
    rng = np.random.default_rng(0)
    x, y, start = rng.normal(size=(20, 3)), rng.normal(size=20), rng.normal(size=3)
    # The mode of N(y; xθ, 1) and N(θ; θ₀, 1 / λ), with the likelihood as a mean.
    expected = np.linalg.solve(x.T @ x / 20 + precision * np.eye(3), x.T @ y / 20 + precision * start)

    def gradient(params):
        residual = jnp.float32(x) @ params['w'] - jnp.float32(y)
        return {'w': jnp.float32(x).T @ residual / 20}

    optimizer = optax.chain(gaussian_prior(precision), optax.sgd(0.2))
    found, _ = minimise(gradient, {'w': jnp.float32(start)}, optimizer, 2000)
    np.testing.assert_allclose(found['w'], expected, atol=1e-5)


def test_a_warm_up_is_the_optimizer_alone():
    def gradient(params):
        return {'w': params['w'] - 5.0}

    start = {'w': jnp.array([1.0, 2.0])}
    _, alone = minimise(gradient, start, optax.sgd(0.1), 8)
    prior = gaussian_prior(lambda step: jnp.where(step < 5, 0.0, 1.0))
    _, warm = minimise(gradient, start, optax.chain(prior, optax.sgd(0.1)), 8)
    np.testing.assert_array_equal(warm['w'][:6], alone['w'][:6])
    # One step of gradient descent on both terms.
    expected = warm['w'][5] - 0.1 * ((warm['w'][5] - 5.0) + (warm['w'][5] - start['w']))
    np.testing.assert_allclose(warm['w'][6], expected, rtol=1e-6)


def test_keeps_the_dtype_of_the_gradient():
    optimizer = gaussian_prior(0.5)
    params = {'w': jnp.ones(2, jnp.bfloat16)}
    updates, state = optimizer.update({'w': jnp.ones(2, jnp.bfloat16)}, optimizer.init(params), {'w': 3 * params['w']})
    assert updates['w'].dtype == jnp.bfloat16
    np.testing.assert_array_equal(updates['w'], jnp.full(2, 2.0, jnp.bfloat16))
    assert int(state.count) == 1


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match='precision must not be negative, got -1'):
        gaussian_prior(-1.0)
    optimizer = gaussian_prior(1.0)
    with pytest.raises(ValueError, match='update needs the parameters'):
        optimizer.update({'w': jnp.ones(2)}, optimizer.init({'w': jnp.ones(2)}))
