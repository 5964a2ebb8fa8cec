"""The divergences besides the forward one, against float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.oracles import kl, log_softmax

from kdjax import losses

B, C = 5, 7


def jensen_shannon(s, t, beta=0.5, temperature=1.0):
    p, q = log_softmax(t, temperature), log_softmax(s, temperature)
    if beta in (0, 1):
        return kl(p, q) if beta == 0 else kl(q, p)
    m = np.log((1 - beta) * np.exp(q) + beta * np.exp(p))
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def skewed_kl(s, t, alpha=0.1, temperature=1.0):
    p, q = log_softmax(t, temperature), log_softmax(s, temperature)
    return kl(p, np.log(alpha * np.exp(p) + (1 - alpha) * np.exp(q)))


def reverse_kl(s, t, temperature=1.0):
    return kl(log_softmax(s, temperature), log_softmax(t, temperature))


CASES = [
    ('reverse_kl', reverse_kl, {}),
    ('reverse_kl', reverse_kl, {'temperature': 3.0}),
    ('jensen_shannon', jensen_shannon, {}),
    ('jensen_shannon', jensen_shannon, {'beta': 0.1, 'temperature': 2.0}),
    ('jensen_shannon', jensen_shannon, {'beta': 0.0}),
    ('jensen_shannon', jensen_shannon, {'beta': 1.0}),
    ('skewed_kl', skewed_kl, {}),
    ('skewed_kl', skewed_kl, {'alpha': 0.0, 'temperature': 0.5}),
    ('skewed_kl', skewed_kl, {'alpha': 0.7}),
]
NAMES = ['reverse_kl', 'jensen_shannon', 'skewed_kl']


@pytest.fixture
def logits():
    rng = np.random.default_rng(0)
    return (2 * rng.normal(size=(2, B, C))).astype(np.float32)


@pytest.mark.parametrize('name,oracle,options', CASES)
def test_values_and_gradients_equal_the_oracle(logits, name, oracle, options):
    student, teacher = logits
    loss = getattr(losses, name)
    np.testing.assert_allclose(loss(student, teacher, **options), oracle(student, teacher, **options), rtol=1e-5, atol=1e-6)
    gradients = jax.grad(lambda s, t: loss(s, t, **options).sum(), argnums=(0, 1))(student, teacher)
    for side, gradient in enumerate(gradients):
        for index in [(0, 0), (2, 3), (4, 6)]:
            step = np.zeros((2, B, C))
            step[(side, *index)] = 1e-6
            up, down = (oracle(*(logits.astype(np.float64) + sign * step), **options).sum() for sign in (1, -1))
            np.testing.assert_allclose(gradient[index], (up - down) / 2e-6, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('name', NAMES)
def test_zero_with_zero_gradient_where_both_agree(logits, name):
    student, _ = logits
    value, gradient = jax.value_and_grad(lambda s: getattr(losses, name)(s, student).sum())(student)
    np.testing.assert_allclose(value, 0, atol=1e-7)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


@pytest.mark.parametrize('name', NAMES)
def test_jit_vmap_shift_half_precision_axis_and_where(logits, name):
    student, teacher = logits
    loss = getattr(losses, name)
    plain = loss(student, teacher)
    assert plain.dtype == jnp.float32
    assert plain.shape == (B,)
    np.testing.assert_allclose(jax.jit(loss)(student, teacher), plain, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(loss)(student, teacher), plain, rtol=1e-6)
    np.testing.assert_allclose(loss(student + 5, teacher - 3), plain, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(loss(student.T, teacher.T, axis=0), plain)
    half = student.astype(jnp.bfloat16)
    np.testing.assert_array_equal(loss(half, teacher), loss(half.astype(np.float32), teacher))
    keep = np.arange(C) < 4
    np.testing.assert_allclose(loss(student, teacher, where=keep), loss(student[:, :4], teacher[:, :4]), rtol=1e-5)
    np.testing.assert_array_equal(loss(student, teacher, where=np.zeros(C, bool)), 0)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('shape', [(1, 2), (3, 4)])
def test_extremes_are_finite(name, shape):
    loss = getattr(losses, name)
    rows = np.random.default_rng(0).choice([1e4, -1e4, 0.0, -np.inf], size=(2, 20, *shape)).astype(np.float32)
    value, gradients = jax.vmap(jax.value_and_grad(lambda s, t: loss(s, t).sum(), argnums=(0, 1)))(*rows)
    assert np.isfinite(value).all()
    assert (value >= 0).all()
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_jensen_shannon_is_symmetric_and_bounded_at_one_half(logits):
    student, teacher = logits
    np.testing.assert_allclose(losses.jensen_shannon(student, teacher), losses.jensen_shannon(teacher, student), rtol=1e-5)
    assert (losses.jensen_shannon(100 * student, 100 * teacher) <= np.log(2) + 1e-6).all()


def test_skewed_divergence_is_bounded(logits):
    student, teacher = logits
    assert (losses.skewed_kl(1e3 * student, 1e3 * teacher, alpha=0.1) <= -np.log(0.1) + 1e-5).all()


@pytest.mark.parametrize(
    'name,options',
    [
        ('jensen_shannon', {'beta': 1.5}),
        ('jensen_shannon', {'beta': np.float32(2)}),
        ('jensen_shannon', {'beta': jnp.float32(np.nan)}),
        ('skewed_kl', {'alpha': -0.1}),
    ],
)
def test_shares_out_of_range_are_refused(logits, name, options):
    with pytest.raises(ValueError, match='must be between 0 and 1'):
        getattr(losses, name)(*logits, **options)


@pytest.mark.parametrize('name', NAMES)
def test_bad_input_is_refused(logits, name):
    student, teacher = logits
    loss = getattr(losses, name)
    with pytest.raises(ValueError, match=rf'^{name}: student \(5, 7\) and teacher \(5, 6\)'):
        loss(student, teacher[:, :6])
    with pytest.raises(ValueError, match='temperature must be positive'):
        loss(student, teacher, temperature=0.0)
