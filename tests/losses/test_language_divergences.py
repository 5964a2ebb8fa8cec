"""The divergences that language models are distilled by, against float64 numpy: families, mixtures, samples, the largest k."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.oracles import kl, log_softmax

from kdjax import losses

B, C = 5, 7
RNG = np.random.default_rng(0)
STUDENT, TEACHER = (2 * RNG.normal(size=(2, B, C))).astype(np.float32)


def probabilities(z, temperature=1.0):
    return np.exp(log_softmax(z, temperature))


def skewed_reverse_kl(s, t, alpha=0.1, temperature=1.0):
    p, q = probabilities(t, temperature), probabilities(s, temperature)
    return np.sum(q * np.log(q / (alpha * q + (1 - alpha) * p)), -1)


def total_variation(s, t, temperature=1.0):
    return 0.5 * np.abs(probabilities(s, temperature) - probabilities(t, temperature)).sum(-1)


def alpha_beta_divergence(s, t, alpha, beta, temperature=1.0):
    """The general form, and the four limits as Cichocki et al. have them."""
    p, q = probabilities(t, temperature), probabilities(s, temperature)
    if alpha == beta == 0:
        terms = 0.5 * np.log(p / q) ** 2
    elif beta == 0:
        terms = (p**alpha * np.log(p**alpha / q**alpha) - p**alpha + q**alpha) / alpha**2
    elif alpha == 0:
        terms = (q**beta * np.log(q**beta / p**beta) - q**beta + p**beta) / beta**2
    elif alpha + beta == 0:
        terms = (np.log(q**alpha / p**alpha) + p**alpha / q**alpha - 1) / alpha**2
    else:
        both = alpha + beta
        terms = -(p**alpha * q**beta - alpha / both * p**both - beta / both * q**both) / (alpha * beta)
    return terms.sum(-1)


def adaptive_kl(s, t, mu=0.5, temperature=1.0, weights_at=None):
    """With the weights of other logits where a gradient takes them as numbers."""
    values = []
    for row, teacher, of_s, of_t in zip(s, t, *(weights_at or (s, t)), strict=True):
        p, q = probabilities(of_t, temperature), probabilities(of_s, temperature)
        order, total, head = np.argsort(-p, kind='stable'), 0.0, []
        for i, c in enumerate(order):
            total += p[c]
            if i == 0 or total <= mu:
                head.append(c)
        gap = np.abs(p - q)
        share = gap[head].sum() / gap.sum()
        log_p, log_q = log_softmax(teacher, temperature), log_softmax(row, temperature)
        values.append(share * kl(log_p, log_q) + (1 - share) * kl(log_q, log_p))
    return np.array(values)


def taid(s, t, interpolation, temperature=1.0, mixed_with=None):
    mixed = (1 - interpolation) * (s if mixed_with is None else mixed_with) + interpolation * t
    return kl(log_softmax(mixed, temperature), log_softmax(s, temperature))


CASES = [
    ('skewed_reverse_kl', skewed_reverse_kl, {}),
    ('skewed_reverse_kl', skewed_reverse_kl, {'alpha': 0.6, 'temperature': 3.0}),
    ('skewed_reverse_kl', skewed_reverse_kl, {'alpha': 0.0}),
    ('total_variation', total_variation, {}),
    ('total_variation', total_variation, {'temperature': 3.0}),
    *(
        ('alpha_beta_divergence', alpha_beta_divergence, {'alpha': alpha, 'beta': beta})
        for alpha, beta in [
            *((0.2, 0.7), (0.7, 0.2), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (1.0, 1.0), (0.0, 0.0), (0.5, -0.5), (-0.7, 0.7)),
            *((-0.3, 0.9), (1e-3, 0.8), (0.8, 1e-3), (0.6, 0.0), (0.0, 0.4)),
        ]
    ),
    ('alpha_beta_divergence', alpha_beta_divergence, {'alpha': 0.3, 'beta': 0.4, 'temperature': 2.0}),
    ('adaptive_kl', adaptive_kl, {}),
    ('adaptive_kl', adaptive_kl, {'mu': 0.9, 'temperature': 2.0}),
    ('adaptive_kl', adaptive_kl, {'mu': 0.0}),
    ('taid', taid, {'interpolation': 0.3}),
    ('taid', taid, {'interpolation': 0.8, 'temperature': 2.0}),
    ('taid', taid, {'interpolation': 1.0}),
]
NAMES = ['skewed_reverse_kl', 'total_variation', 'alpha_beta_divergence', 'adaptive_kl', 'taid']
OPTIONS = {'alpha_beta_divergence': {'alpha': 0.3, 'beta': 0.6}, 'taid': {'interpolation': 0.4}}


def of(name):
    return functools.partial(getattr(losses, name), **OPTIONS.get(name, {}))


@pytest.mark.parametrize('name,oracle,options', CASES, ids=[f'{name}-{i}' for i, (name, *_) in enumerate(CASES)])
def test_values_and_gradients_equal_the_oracle(name, oracle, options):
    loss = jax.jit(functools.partial(getattr(losses, name), **options))
    np.testing.assert_allclose(loss(STUDENT, TEACHER), oracle(STUDENT, TEACHER, **options), rtol=3e-5, atol=1e-6)
    gradients = jax.jit(jax.grad(lambda s, t: loss(s, t).sum(), argnums=(0, 1)))(STUDENT, TEACHER)
    held = {'adaptive_kl': {'weights_at': (STUDENT, TEACHER)}, 'taid': {'mixed_with': STUDENT}}.get(name, {})
    for side, gradient in enumerate(gradients):
        for index in [(0, 0), (2, 3), (4, 6)]:
            step = np.zeros((2, B, C))
            step[(side, *index)] = 1e-6
            both = np.stack([STUDENT, TEACHER]).astype(np.float64)
            up, down = (oracle(*(both + sign * step), **options, **held).sum() for sign in (1, -1))
            np.testing.assert_allclose(gradient[index], (up - down) / 2e-6, rtol=2e-4, atol=2e-6)


def test_what_they_are_at_the_ends_of_their_ranges():
    reverse, forward = losses.reverse_kl(STUDENT, TEACHER), losses.soft_targets(STUDENT, TEACHER, temperature=1.0)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5)
    family = functools.partial(losses.alpha_beta_divergence, STUDENT, TEACHER)
    close(losses.skewed_reverse_kl(STUDENT, TEACHER, alpha=0.3), losses.skewed_kl(TEACHER, STUDENT, alpha=0.3))
    close(losses.skewed_reverse_kl(STUDENT, TEACHER, alpha=0.0), reverse)
    close(family(alpha=1.0, beta=0.0), forward)
    close(family(alpha=0.0, beta=1.0), reverse)
    close(losses.taid(STUDENT, TEACHER, interpolation=1.0), forward)
    np.testing.assert_array_equal(losses.taid(STUDENT, TEACHER, interpolation=0.0), 0)
    # Next to a limit, and under jit where nothing is known, the value is that of the limit.
    traced = jax.jit(losses.alpha_beta_divergence)(STUDENT, TEACHER, alpha=1e-7, beta=1.0)
    close(traced, reverse)
    swapped = losses.alpha_beta_divergence(TEACHER, STUDENT, alpha=0.2, beta=0.7)
    close(family(alpha=0.7, beta=0.2), swapped)


def test_they_are_bounded_where_they_say_so():
    far = 1e3 * STUDENT, 1e3 * TEACHER
    assert (losses.skewed_reverse_kl(*far, alpha=0.1) <= -np.log(0.1) + 1e-5).all()
    assert (losses.total_variation(*far) <= 1 + 1e-6).all()
    np.testing.assert_allclose(losses.total_variation(*far), losses.total_variation(*far[::-1]))


@pytest.mark.parametrize('name', NAMES)
def test_zero_with_zero_gradient_where_both_agree(name):
    value, gradient = jax.value_and_grad(lambda s: of(name)(s, STUDENT).sum())(STUDENT)
    np.testing.assert_allclose(value, 0, atol=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('shape', [(1, 2), (3, 4)])
def test_extremes_are_finite(name, shape):
    rows = np.random.default_rng(0).choice([1e4, -1e4, 0.0, -np.inf], size=(2, 20, *shape)).astype(np.float32)
    all_of_it = jax.vmap(jax.value_and_grad(lambda s, t: of(name)(s, t).sum(), argnums=(0, 1)))
    value, gradients = jax.jit(all_of_it)(*rows)
    assert np.isfinite(value).all()
    assert (value >= 0).all()
    assert all(np.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize(
    'name,options,message',
    [
        ('skewed_reverse_kl', {'alpha': 1.5}, 'alpha must be between 0 and 1'),
        ('alpha_beta_divergence', {'alpha': 2.0, 'beta': 0.0}, 'alpha must be between -1 and 1, got 2.0'),
        ('alpha_beta_divergence', {'alpha': 0.0, 'beta': np.nan}, 'beta must be between -1 and 1, got nan'),
        ('adaptive_kl', {'mu': -0.1}, 'mu must be between 0 and 1'),
        ('taid', {'interpolation': 1.1}, 'interpolation must be between 0 and 1'),
        ('taid', {'interpolation': 0.5, 'temperature': 0.0}, 'temperature must be positive'),
    ],
)
def test_hyperparameters_out_of_range_are_refused(name, options, message):
    with pytest.raises(ValueError, match=f'^{name}: {message}'):
        getattr(losses, name)(STUDENT, TEACHER, **options)


def universal_logit(s, t, temperature=1.0):
    values = []
    for row, teacher in zip(s, t, strict=True):
        sides = [np.sort(probabilities(x, temperature))[::-1] for x in (row, teacher)]
        size = max(map(len, sides))
        sides = [np.concatenate([x, np.zeros(size - len(x))]) for x in sides]
        values.append(np.abs(sides[0] - sides[1]).sum())
    return np.array(values)


@pytest.mark.parametrize('classes', [3, C, 12])
def test_universal_logit_compares_sorted_probabilities_of_any_vocabularies(classes):
    teacher = (2 * RNG.normal(size=(B, classes))).astype(np.float32)
    for options in ({}, {'temperature': 3.0}):
        values = jax.jit(functools.partial(losses.universal_logit, **options))(STUDENT, teacher)
        np.testing.assert_allclose(values, universal_logit(STUDENT, teacher, **options), rtol=1e-5)
    order = RNG.permutation(classes)
    np.testing.assert_allclose(
        losses.universal_logit(STUDENT, teacher[:, order]), losses.universal_logit(STUDENT, teacher), rtol=1e-6
    )
    # Classes that are ruled out are as if they were not there; the axis may be another.
    padded = np.concatenate([teacher, np.full((B, 2), -np.inf, np.float32)], axis=1)
    np.testing.assert_allclose(losses.universal_logit(STUDENT, padded), losses.universal_logit(STUDENT, teacher), rtol=1e-6)
    np.testing.assert_array_equal(
        losses.universal_logit(STUDENT.T, teacher.T, axis=0), losses.universal_logit(STUDENT, teacher)
    )
    gradients = jax.grad(lambda s, t: losses.universal_logit(s, t).sum(), argnums=(0, 1))(STUDENT, padded)
    assert all(np.isfinite(gradient).all() and np.any(gradient != 0) for gradient in gradients)


def test_universal_logit_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r'^universal_logit: student .* must be alike but for the classes'):
        losses.universal_logit(STUDENT, TEACHER[:2])
    with pytest.raises(ValueError, match=r'^universal_logit: logits .* need two classes or more'):
        losses.universal_logit(STUDENT, TEACHER[:, :1])


def grouped(z, indices, temperature):
    """Log probabilities of the classes with these indices, and of all others together, for each row."""
    p = probabilities(z, temperature)
    chosen = np.take_along_axis(p, indices, -1)
    return np.log(np.concatenate([chosen, 1 - chosen.sum(-1, keepdims=True)], -1))


@pytest.mark.parametrize('temperature', [1.0, 2.0])
def test_the_largest_k_are_compared_with_a_bucket_for_the_rest(temperature):
    triple = losses.top_k_logits(TEACHER, 3, temperature=temperature)
    q, p = (grouped(x.astype(np.float64), np.asarray(triple[1]), temperature) for x in (STUDENT, TEACHER))
    reverse = jax.jit(losses.top_k_reverse_kl)(STUDENT, *triple, temperature=temperature)
    np.testing.assert_allclose(reverse, kl(q, p), rtol=1e-5)
    for beta in (0.0, 0.3, 1.0):
        between = losses.top_k_jensen_shannon(STUDENT, *triple, beta=beta, temperature=temperature)
        m = np.log((1 - beta) * np.exp(q) + beta * np.exp(p))
        expected = {0.0: kl(p, q), 1.0: kl(q, p)}.get(beta, beta * kl(p, m) + (1 - beta) * kl(q, m))
        np.testing.assert_allclose(between, expected, rtol=1e-5)
    # Buckets can only hide a difference; with all classes there is nothing to hide.
    assert (reverse <= losses.reverse_kl(STUDENT, TEACHER, temperature=temperature) + 1e-6).all()
    everything = losses.top_k_logits(TEACHER, C, temperature=temperature)
    for name in ('reverse_kl', 'jensen_shannon'):
        whole = getattr(losses, name)(STUDENT, TEACHER, temperature=temperature)
        of_all = getattr(losses, f'top_k_{name}')(STUDENT, *everything, temperature=temperature)
        np.testing.assert_allclose(of_all, whole, rtol=1e-5)


def test_the_largest_k_keep_the_contract_of_masks_axes_and_errors():
    keep = np.arange(C) < 5
    triple = losses.top_k_logits(TEACHER[:, :5], 2, temperature=1.0)
    for name in ('top_k_reverse_kl', 'top_k_jensen_shannon'):
        loss = getattr(losses, name)
        np.testing.assert_allclose(loss(STUDENT, *triple, where=keep), loss(STUDENT[:, :5], *triple), rtol=1e-5)
        moved = [x.T for x in triple[:2]]
        np.testing.assert_allclose(loss(STUDENT.T, *moved, triple[2], axis=0), loss(STUDENT, *triple), rtol=1e-6)
        np.testing.assert_array_equal(loss(STUDENT, *triple, where=np.zeros(C, bool)), 0)
        with pytest.raises(ValueError, match=rf'^{name}: top_indices must be in \[0, 7\), got 9'):
            loss(STUDENT, triple[0], triple[1].at[0, 0].set(9), triple[2])
        gradient = jax.grad(lambda s, loss=loss: loss(s, *triple).sum())(STUDENT)
        assert np.isfinite(gradient).all()
        assert np.any(gradient != 0)


def test_log_probabilities_of_a_server_are_logits_with_their_rest():
    log_p = log_softmax(TEACHER, 1.0).astype(np.float32)
    order = np.argsort(-log_p, -1)[:, :3]
    logits, rest = jax.jit(losses.top_k_from_log_probabilities)(np.take_along_axis(log_p, order, -1))
    from_logits = losses.top_k_soft_targets(STUDENT, *losses.top_k_logits(TEACHER, 3, temperature=1.0), temperature=1.0)
    np.testing.assert_allclose(losses.top_k_soft_targets(STUDENT, logits, order, rest, temperature=1.0), from_logits, rtol=1e-4)
    everything, nothing = losses.top_k_from_log_probabilities(log_p)
    np.testing.assert_array_equal(everything, log_p)
    assert np.all(nothing < -10)
    with pytest.raises(ValueError, match=r'probabilities of an example sum to 1.2'):
        losses.top_k_from_log_probabilities(jnp.log(jnp.array([0.7, 0.5])))
    assert np.isnan(jax.jit(losses.top_k_from_log_probabilities)(jnp.log(jnp.array([0.7, 0.5])))[1])


def test_sampled_divergences_are_schulman_s():
    student, teacher = (np.log(RNG.uniform(0.05, 1.0, (2, 4, 6)))).astype(np.float32)
    ratio = (teacher - student).astype(np.float64)
    expected = {'k1': -ratio, 'k2': ratio**2 / 2, 'k3': np.exp(ratio) - 1 - ratio}
    for estimator, values in expected.items():
        found = jax.jit(functools.partial(losses.sampled_reverse_kl, estimator=estimator))(student, teacher)
        np.testing.assert_allclose(found, values, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(
        losses.sampled_reverse_kl(student, teacher), losses.sampled_reverse_kl(student, teacher, estimator='k3')
    )
    where = RNG.random((4, 6)) < 0.5
    filled = np.where(where, student, np.nan)
    masked = losses.sampled_reverse_kl(filled, teacher, where=where)
    np.testing.assert_allclose(masked, np.where(where, expected['k3'], 0), rtol=1e-4, atol=1e-6)
    assert np.isfinite(jax.grad(lambda s: losses.sampled_reverse_kl(s, teacher, where=where).sum())(filled)).all()
    impossible = losses.sampled_reverse_kl(student, np.full_like(teacher, -np.inf))
    assert np.isfinite(impossible).all()
    assert impossible.min() > 70


def test_the_means_of_sampled_divergences_are_the_divergence_and_their_gradients_what_is_said():
    """Exactly: over all tokens, weighted by the student's probabilities."""
    q = probabilities(STUDENT[0])

    def mean(z, estimator):
        log_q, log_p = jax.nn.log_softmax(z), jax.nn.log_softmax(TEACHER[0])
        return jnp.sum(q.astype(np.float32) * losses.sampled_reverse_kl(log_q, log_p, estimator=estimator))

    reverse = losses.reverse_kl(STUDENT[:1], TEACHER[:1])[0]
    for estimator in ('k1', 'k3'):
        np.testing.assert_allclose(mean(STUDENT[0], estimator), reverse, rtol=1e-4)
    gradient = {estimator: jax.grad(mean)(STUDENT[0], estimator) for estimator in ('k1', 'k2', 'k3')}
    np.testing.assert_allclose(gradient['k1'], 0, atol=1e-5)
    of_reverse = jax.grad(lambda s: losses.reverse_kl(s, TEACHER[0]).sum())(STUDENT[0])
    of_forward = jax.grad(lambda s: losses.soft_targets(s, TEACHER[0], temperature=1.0).sum())(STUDENT[0])
    np.testing.assert_allclose(gradient['k2'], of_reverse, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(gradient['k3'], of_forward, rtol=1e-3, atol=1e-4)


def test_the_policy_gradient_rewards_a_token_for_those_after_it():
    student, teacher, sampler = (np.log(RNG.uniform(0.05, 1.0, (3, 4, 6)))).astype(np.float32)
    where = np.arange(6) < np.array([6, 3, 1, 0])[:, None]
    weights = np.zeros((4, 6))
    for i in range(4):
        for j in range(6):
            after = [teacher[i, k] - student[i, k] for k in range(j + 1, 6) if where[i, k]]
            if where[i, j] and after:
                weights[i, j] = -np.mean(after)
    loss = jax.jit(losses.policy_gradient)
    gradient = jax.grad(lambda s: loss(s, teacher, where=where).sum())(student)
    np.testing.assert_allclose(gradient, weights, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(loss(student, teacher, where=where), weights * student, rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda s: loss(s, teacher, sampler=sampler, where=where).sum())(student)
    np.testing.assert_allclose(gradient, weights * np.exp(student - sampler), rtol=1e-4, atol=1e-5)
    # The teacher is given, and what is masked may be anything.
    assert not np.any(jax.grad(lambda t: loss(student, t, where=where).sum())(teacher))
    filled = np.where(where, student, np.nan)
    np.testing.assert_array_equal(loss(filled, teacher, where=where), loss(student, teacher, where=where))


@pytest.mark.parametrize('loss', [losses.sampled_reverse_kl, losses.policy_gradient])
def test_losses_of_tokens_refuse_what_is_no_log_probability(loss):
    name, good = loss.__name__, np.log([0.5, 0.25]).astype(np.float32)
    with pytest.raises(ValueError, match=f'^{name}: teacher must be log probabilities, which are at most 0, got 0.25'):
        loss(good, np.array([0.5, 0.25], np.float32)[::-1] - 0.25)
    with pytest.raises(ValueError, match=rf'^{name}: student \(2,\) and teacher \(1,\) must have the same shape'):
        loss(good, good[:1])
    assert np.isnan(jax.jit(loss)(good, good + 5)).any()
    with pytest.raises(ValueError, match="estimator must be 'k1', 'k2' or 'k3', got 'k4'"):
        losses.sampled_reverse_kl(good, good, estimator='k4')
