"""Adversarial alignment of domains: the reversal of gradients, its schedule, and both sides of the game."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.gradient_checks import with_gradients
from helpers.oracles import log_softmax

from kdjax import losses

BATCH, DOMAINS = 5, 3
LOSSES = pytest.mark.parametrize('name', ['domain_discrimination', 'domain_confusion'])


def smooth(x):
    return jnp.sum(jnp.sin(x) * x**2)


@pytest.mark.parametrize('scale', [0, 1.0, 0.25, -2.0])
def test_reversal_is_the_identity_and_multiplies_gradients_by_minus_its_scale(key, scale):
    """Before and after whatever function."""
    x = jax.random.normal(key, (3, 4))
    np.testing.assert_array_equal(losses.gradient_reversal(x, scale), x)
    expected = -scale * jax.grad(smooth)(x)
    np.testing.assert_allclose(jax.grad(lambda x: smooth(losses.gradient_reversal(x, scale)))(x), expected, rtol=1e-5)
    np.testing.assert_allclose(jax.grad(lambda x: losses.gradient_reversal(smooth(x), scale))(x), expected, rtol=1e-5)


def test_reversal_defaults_to_minus_one_and_twice_is_the_identity(key):
    x = jax.random.normal(key, (3, 4))
    gradient = jax.grad(smooth)(x)
    np.testing.assert_allclose(jax.grad(lambda x: smooth(losses.gradient_reversal(x)))(x), -gradient, rtol=1e-6)
    twice = jax.grad(lambda x: smooth(losses.gradient_reversal(losses.gradient_reversal(x))))(x)
    np.testing.assert_allclose(twice, gradient, rtol=1e-6)


def test_reversal_under_jit_and_vmap_with_traced_scales(key):
    """The scale gets no gradient."""
    x = jax.random.normal(key, (2, 3))
    scales = jnp.array([0.5, 3.0])
    both = jax.jit(jax.vmap(jax.grad(lambda x, scale: smooth(losses.gradient_reversal(x, scale)), argnums=(0, 1))))
    gradient, scale_gradient = both(x, scales)
    np.testing.assert_allclose(gradient, -scales[:, None] * jax.vmap(jax.grad(smooth))(x), rtol=1e-5)
    np.testing.assert_array_equal(scale_gradient, np.zeros(2))


def test_reversal_can_be_differentiated_again(key):
    """The second derivative is that of -scale times the gradient."""
    x = jax.random.normal(key, (3,))
    first = jax.grad(lambda x: smooth(losses.gradient_reversal(x, 0.5)))
    second = jax.grad(lambda x: jnp.sum(first(x)))(x)
    np.testing.assert_allclose(second, -0.5 * jax.grad(lambda x: jnp.sum(jax.grad(smooth)(x)))(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16', 'float32'])
def test_reversal_keeps_dtypes(dtype):
    x = jnp.ones(3, dtype)
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(losses.gradient_reversal(x, jnp.float32(0.5))))(x)
    assert value.dtype == gradient.dtype == dtype
    np.testing.assert_array_equal(gradient, np.full(3, -0.5))


def test_reversal_refuses_integers():
    with pytest.raises(ValueError, match=r'^gradient_reversal: x must be floating point, got int32$'):
        losses.gradient_reversal(jnp.ones(3, jnp.int32))


@pytest.mark.parametrize('gamma', [10.0, 2.5])
def test_reversal_schedule_equals_the_papers_formula(gamma):
    """And stays where it is once the training is over."""
    schedule = jax.jit(losses.reversal_schedule(200, gamma=gamma))
    steps = np.array([0, 1, 17, 100, 199, 200, 500])
    progress = np.minimum(steps / 200, 1)
    expected = 2 / (1 + np.exp(-gamma * progress)) - 1
    np.testing.assert_allclose([schedule(step) for step in steps], expected, rtol=1e-5, atol=1e-6)
    assert schedule(3).dtype == jnp.float32
    assert losses.reversal_schedule(200, gamma=gamma)(0) == 0


@pytest.mark.parametrize('steps, gamma, part', [(0, 10.0, 'steps must be positive'), (10, -1.0, 'gamma must be positive')])
def test_reversal_schedule_refuses_what_is_not_positive(steps, gamma, part):
    with pytest.raises(ValueError, match=f'^reversal_schedule: {part}, got [^\n]+$'):
        losses.reversal_schedule(steps, gamma=gamma)


def log_probabilities(z):
    """Of all domains; one logit is that of the second of two."""
    if z.ndim == 1:
        z = np.stack([np.zeros_like(z), z], axis=-1)
    return log_softmax(z)


def discrimination_oracle(z, domains):
    log_p = log_probabilities(z)
    return np.array([-row[d] if d >= 0 else 0.0 for row, d in zip(log_p, domains, strict=True)])


def confusion_oracle(z, domains):
    return -np.mean(log_probabilities(z), axis=-1)


def compiled(name, logits, domains):
    """The values [batch] and the gradient of their sum."""
    return with_gradients(name, logits, **({'domains': domains} if name == 'domain_discrimination' else {}))


@LOSSES
@pytest.mark.parametrize('shape', [(BATCH,), (BATCH, 2), (BATCH, DOMAINS)])
def test_values_and_gradients_equal_the_oracle(name, shape):
    oracle = discrimination_oracle if name == 'domain_discrimination' else confusion_oracle
    logits = (2 * np.random.default_rng(0).normal(size=shape)).astype(np.float32)
    domains = np.array([0, 1, -1, 1, 0 if len(shape) == 1 else shape[1] - 1], np.int32)
    values, gradient = jax.device_get(compiled(name, logits, domains))
    z = logits.astype(np.float64)
    np.testing.assert_allclose(values, oracle(z, domains), rtol=1e-5, atol=1e-6)
    expected = np.zeros(shape)
    for index in np.ndindex(shape):
        moved = np.zeros(shape)
        moved[index] = 1e-6
        expected[index] = (oracle(z + moved, domains).sum() - oracle(z - moved, domains).sum()) / 2e-6
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)
    if name == 'domain_discrimination':
        assert values[2] == 0
        assert not np.any(gradient[2])


@LOSSES
def test_one_logit_is_that_of_the_second_of_two_domains_and_their_order_does_not_matter(name):
    rng = np.random.default_rng(1)
    logits, domains = rng.normal(size=BATCH).astype(np.float32), rng.integers(0, 2, BATCH)
    values, _ = compiled(name, logits, domains)
    np.testing.assert_allclose(compiled(name, np.stack([0 * logits, logits], axis=-1), domains)[0], values, rtol=1e-6)
    np.testing.assert_allclose(compiled(name, -logits, 1 - domains)[0], values, rtol=1e-5)


@LOSSES
def test_what_cannot_be_told_costs_the_log_of_the_number_of_domains(name):
    domains = np.zeros(BATCH, np.int32)
    for logits in (np.zeros(BATCH, np.float32), np.full((BATCH, 2), 3, np.float32)):
        np.testing.assert_allclose(compiled(name, logits, domains)[0], np.full(BATCH, np.log(2)), rtol=1e-6)
    # For confusion that is the least there is, and there is nowhere to go from it.
    values, gradient = compiled('domain_confusion', np.zeros((BATCH, DOMAINS), np.float32), domains)
    np.testing.assert_allclose(gradient, np.zeros((BATCH, DOMAINS)), atol=1e-7)
    noise = np.random.default_rng(2).normal(size=(BATCH, DOMAINS)).astype(np.float32)
    assert np.all(compiled('domain_confusion', noise, domains)[0] > values)


@LOSSES
@pytest.mark.parametrize('shape', [(20,), (20, DOMAINS)])
def test_extreme_logits_are_finite(name, shape):
    logits = np.random.default_rng(3).choice([1e4, -1e4, 0.0, -np.inf], size=shape).astype(np.float32)
    logits[0] = -np.inf
    for domain in (0, 1, -1):
        values, gradient = compiled(name, logits, np.full(20, domain, np.int32))
        assert np.isfinite(values).all()
        assert np.isfinite(gradient).all()
        assert (values >= 0).all()


@LOSSES
def test_half_precision_and_vmap(name):
    logits = np.random.default_rng(4).normal(size=(BATCH, DOMAINS)).astype(jnp.bfloat16)
    domains = np.arange(BATCH) % DOMAINS
    values, gradient = compiled(name, logits, domains)
    assert values.dtype == jnp.float32
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(values, compiled(name, logits.astype(np.float32), domains)[0], rtol=1e-6)
    pair = np.stack([logits, -logits])
    mapped, _ = jax.jit(jax.vmap(lambda z: compiled(name, z, domains)))(pair)
    np.testing.assert_allclose(mapped[0], values, rtol=1e-6)


def test_what_does_not_fit_is_refused():
    domains = jnp.zeros(3, jnp.int32)
    for arguments, part in [
        ((jnp.ones((3, 2)), domains[:2]), r'labels \(2,\) must have .*\(3,\)'),
        ((jnp.ones((3, 2)), jnp.zeros(3)), 'labels must be integer'),
        ((jnp.ones((3, 2, 2)), domains), r'logits must be \[batch, domains\], .* got \(3, 2, 2\)'),
        ((jnp.ones((3, 2), jnp.int32), domains), 'logits must be floating point, got int32'),
        ((jnp.ones((3, 1)), domains), r'logits \(3, 1\) are of a single domain'),
        ((jnp.ones((3, 2)), domains + 2), r'labels must be below the number of classes, 2, got 2'),
    ]:
        with pytest.raises(ValueError, match=f'^domain_discrimination: [^\n]*{part}[^\n]*$'):
            losses.domain_discrimination(*arguments)
    with pytest.raises(ValueError, match=r'^domain_confusion: logits must be [^\n]* got \(\)$'):
        losses.domain_confusion(jnp.ones(()))


def test_an_unknown_domain_costs_nothing_whatever_the_logits_and_one_that_is_not_there_nan():
    logits = np.array([[1, 2], [np.nan, 1], [3, 1], [1, np.nan]], np.float32)
    domains = np.array([0, -1, 2, 1])
    values, gradient = compiled('domain_discrimination', logits, domains)
    np.testing.assert_array_equal(np.isnan(values), [False, False, True, True])
    assert values[1] == 0
    np.testing.assert_array_equal(gradient[1], [0, 0])
    assert np.all(np.isfinite(gradient[0]))


def test_one_minimisation_hides_the_domain_from_a_discriminator_that_learns():
    """Of two coordinates, one tells the domain: the features keep the other alone, since they climb what it descends."""
    rng = np.random.default_rng(5)
    domains = np.arange(64) % 2
    inputs = np.stack([2.0 * domains - 1, rng.normal(size=64)], axis=-1).astype(np.float32)

    def loss(params, scale):
        mixing, head = params
        features = inputs * mixing[None]
        logits = jnp.matmul(losses.gradient_reversal(features, scale), head, precision='highest')
        # Without a task the features would be free to vanish: they are to stay where they were.
        return losses.domain_discrimination(logits, domains).mean() + 0.05 * jnp.sum(jnp.square(mixing - 1))

    def train(scale):
        gradient = jax.jit(jax.grad(loss))
        params = jnp.ones(2), jnp.array([0.5, 0.0])
        for _ in range(300):
            params = jax.tree.map(lambda p, g: p - 0.2 * g, params, gradient(params, scale))
        return np.abs(params[0])

    np.testing.assert_array_less(1.0, train(-1.0)[0])  # without reversal the telling coordinate grows
    hidden = train(1.0)
    assert hidden[0] < 0.5 < hidden[1]
