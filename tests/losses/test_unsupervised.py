"""Losses without labels against float64 oracles written from their formulas, and the properties that these promise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import gradient_checks
from helpers.oracles import softmax
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kdjax import losses

SHAPE = (3, 2, 2, 3)
EXAMPLES = settings(max_examples=10, deadline=None, derandomize=True, database=None)


def masked_softmax(z, where):
    """Over the kept of the last axis; 0 elsewhere."""
    e = np.where(where, np.exp(z), 0)
    return e / np.maximum(e.sum(axis=-1, keepdims=True), 1e-300)


def reconstruction_oracle(s, t, where):
    """||f - y||² over the kept elements of one example."""
    return np.sum((s - t)[where] ** 2)


def layer_oracle(s, t, where):
    """mean of (f_s - f_t)² softmax(f_t)²."""
    return np.mean(((s - t) ** 2 * masked_softmax(t, where) ** 2)[where]) if where.any() else 0.0


def inner_product_oracle(s, t, where):
    """(aᵀf)² + ||f||²."""
    return np.sum(t[where] * s[where]) ** 2 + np.sum(s[where] ** 2)


CASES = {
    'reconstruction': ('reconstruction', {}, reconstruction_oracle),
    'layer': ('attention_distillation', {}, layer_oracle),
    'inner_product': ('attention_distillation', {'variant': 'inner_product'}, inner_product_oracle),
}
every_case = pytest.mark.parametrize('case', list(CASES))


def value_and_gradients(case, student, teacher, where=None):
    """The values [batch], and the gradients of their sum with respect to student and teacher, as numpy arrays."""
    name, options, _ = CASES[case]
    return gradient_checks.value_and_gradients(name, student, teacher, where=where, **options)


def by_examples(case, student, teacher, where):
    return np.array([CASES[case][2](*example) for example in zip(student, teacher, where, strict=True)])


def inputs(seed=0):
    return np.random.default_rng(seed).normal(size=(2, *SHAPE)).astype(np.float32)


def assert_gradient(computed, expected):
    np.testing.assert_allclose(computed, expected, rtol=1e-5, atol=1e-5 * max(1.0, np.abs(expected).max()))


@every_case
@EXAMPLES
@given(st.integers(0, 2**32 - 1), arrays(np.bool_, SHAPE))
def test_values_and_gradients_equal_the_oracle_under_any_mask(case, seed, where):
    student, teacher = inputs(seed)
    values, *gradients = value_and_gradients(case, student, teacher, where)
    s, t = student.astype(np.float64), teacher.astype(np.float64)
    np.testing.assert_allclose(values, by_examples(case, s, t, where), rtol=1e-5, atol=1e-6)
    assert_gradient(gradients[0], gradient_checks.central_difference(lambda x: by_examples(case, x, t, where).sum(), s))
    assert_gradient(gradients[1], gradient_checks.central_difference(lambda x: by_examples(case, s, x, where).sum(), t))


@every_case
def test_without_a_mask_everything_counts_and_the_order_of_the_batch_is_kept(case):
    student, teacher = inputs()
    values, *_ = value_and_gradients(case, student, teacher)
    expected = by_examples(case, student.astype(np.float64), teacher.astype(np.float64), np.ones(SHAPE, bool))
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    np.testing.assert_allclose(value_and_gradients(case, student[::-1], teacher[::-1])[0], values[::-1], rtol=1e-6)


@pytest.mark.parametrize('case', ['reconstruction', 'layer'])
def test_equal_activations_cost_nothing_and_have_no_gradient(case):
    student, _ = inputs()
    for result in value_and_gradients(case, student, student):
        np.testing.assert_array_equal(result, np.zeros(result.shape))


def test_reconstruction_is_the_sum_that_hint_takes_the_mean_of():
    student, teacher = inputs()
    entries = float(np.prod(SHAPE[1:]))
    np.testing.assert_allclose(losses.reconstruction(student, teacher), entries * losses.hint(student, teacher), rtol=1e-6)


def test_attention_by_layer_weighs_channels_by_the_teachers_softmax():
    """Not by the student's, and over the channels of each position."""
    teacher = np.array([[[0.0, 9.0, 0.0]]], np.float32)
    attended, ignored = (teacher + np.eye(3, dtype=np.float32)[i] for i in (1, 0))
    np.testing.assert_allclose(losses.attention_distillation(attended, teacher), [1 / 3], rtol=1e-3)
    assert losses.attention_distillation(ignored, teacher)[0] < 1e-7
    twice = np.concatenate([teacher, teacher], axis=1)
    np.testing.assert_allclose(losses.attention_distillation(twice + 1, twice), [1 / 3], rtol=1e-3)


def test_attention_by_inner_product_is_least_for_features_orthogonal_to_the_attention():
    attention = np.array([[1.0, 0.0]], np.float32)
    loss = functools.partial(losses.attention_distillation, teacher=attention, variant='inner_product')
    np.testing.assert_array_equal(loss(np.array([[0.0, 2.0]], np.float32)), [4.0])
    np.testing.assert_array_equal(loss(np.array([[2.0, 0.0]], np.float32)), [8.0])


@every_case
def test_extreme_activations_are_finite(case):
    """±1e4, zeros and constants in every pairing, of one channel too."""
    rng = np.random.default_rng(1)
    for channels in (1, 3):
        rows = [np.zeros((2, channels)), np.ones((2, channels)), 1e4 * rng.choice([-1.0, 0, 1], size=(2, channels))]
        student, teacher = (np.float32(x) for x in zip(*[(s, t) for s in rows for t in rows], strict=True))
        results = value_and_gradients(case, student, teacher)
        assert all(np.isfinite(x).all() for x in results)
        assert (results[0] >= 0).all()


def test_unknown_variants_and_missing_axes_are_refused():
    features = jnp.ones((2, 3))
    with pytest.raises(ValueError, match=r"^attention_distillation: variant must be 'layer' or 'inner_product', got 'kl'$"):
        losses.attention_distillation(features, features, variant='kl')
    for loss in (losses.attention_distillation, losses.reconstruction):
        with pytest.raises(ValueError, match=rf'^{loss.__name__}: activations must be [^\n]*, got \(3,\)$'):
            loss(jnp.ones(3), jnp.ones(3))


@EXAMPLES
@given(st.integers(0, 2**32 - 1), arrays(np.bool_, SHAPE))
def test_activation_size_is_the_squared_norm_of_what_is_kept(seed, where):
    features, _ = inputs(seed)
    loss = jax.jit(jax.value_and_grad(lambda x, where: jnp.sum(jnp.arange(1.0, 4.0) * losses.activation_size(x, where=where))))
    value, gradient = loss(features, where)
    norms = [np.linalg.norm(x[keep].astype(np.float64)) ** 2 for x, keep in zip(features, where, strict=True)]
    np.testing.assert_allclose(value, np.dot([1, 2, 3], norms), rtol=1e-5)
    np.testing.assert_allclose(gradient, 2 * np.where(where, features, 0) * np.arange(1, 4).reshape(3, 1, 1, 1), rtol=1e-5)


def test_activation_size_does_not_see_what_is_masked_and_sees_nan_and_infinities_that_are_kept():
    function = jax.jit(jax.value_and_grad(lambda x, where: jnp.sum(losses.activation_size(x, where=where))))
    for fill in (np.nan, np.inf, -np.inf):
        features = np.array([[1, fill], [2, 3]], np.float32)
        value, gradient = function(features, np.isfinite(features))
        np.testing.assert_array_equal(value, 14)
        np.testing.assert_array_equal(gradient, [[2, 0], [4, 6]])
        np.testing.assert_array_equal(losses.activation_size(features), [np.nan, 13])


def test_activation_size_of_all_and_of_a_vector_and_what_it_refuses():
    features, _ = inputs()
    np.testing.assert_allclose(losses.activation_size(features), np.sum(np.float64(features) ** 2, axis=(1, 2, 3)), rtol=1e-5)
    half = losses.activation_size(features.astype(jnp.bfloat16))
    assert half.dtype == jnp.float32
    np.testing.assert_array_equal(half, losses.activation_size(features.astype(jnp.bfloat16).astype(np.float32)))
    with pytest.raises(ValueError, match=r'^activation_size: features must be floating point, got int32$'):
        losses.activation_size(jnp.ones(3, jnp.int32))
    with pytest.raises(ValueError, match=r'^activation_size: features must be \[batch, \.\.\.\], got \(\)$'):
        losses.activation_size(jnp.ones(()))
    with pytest.raises(ValueError, match=r'^activation_size: where \(2, 2\) does not broadcast to \(2, 3\)$'):
        losses.activation_size(jnp.ones((2, 3)), where=jnp.ones((2, 2), bool))


BATCH, CLASSES = 6, 3


def diversity_oracle(z, threshold=0.9, sharpness=20.0, beta=1.0):
    """1 - the mean of the smooth indicator, and β times what the diversity lacks from its best, C log(B / C)."""
    if not len(z):
        return 0.0
    p = softmax(z)

    def indicator(x):
        return 1 / (1 + np.exp(-sharpness * (x - threshold)))

    diverse = np.sum(np.log(np.sum(p, axis=0)))
    classes = z.shape[1]
    confident = np.mean(indicator(p.max(axis=-1)) / indicator(1.0))
    return 1 - confident + beta * (classes * np.log(len(z) / classes) - diverse)


@jax.jit
def diversity(logits, where=None, options=None):
    """The value and the gradient; the options are traced."""
    return jax.value_and_grad(lambda z: losses.diversity(z, where=where, **(options or {})))(logits)


@EXAMPLES
@given(
    st.integers(0, 2**32 - 1),
    arrays(np.bool_, BATCH),
    st.sampled_from([{}, {'threshold': 0.5, 'sharpness': 4.0, 'beta': 0.3}]),
)
def test_diversity_value_and_gradient_equal_the_oracle_on_the_kept_examples(seed, where, options):
    logits = (3 * np.random.default_rng(seed).normal(size=(BATCH, CLASSES))).astype(np.float32)
    value, gradient = diversity(logits, where, options)
    z = logits.astype(np.float64)
    np.testing.assert_allclose(value, diversity_oracle(z[where], **options), rtol=1e-5, atol=1e-6)
    expected = gradient_checks.central_difference(lambda x: diversity_oracle(x[where], **options), z)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)
    assert not np.any(gradient[~where])


def test_diversity_is_zero_for_certain_and_balanced_batches_and_only_for_them():
    certain = np.float32(1e4) * np.tile(np.eye(CLASSES, dtype=np.float32), (BATCH // CLASSES, 1))
    np.testing.assert_allclose(diversity(certain)[0], 0, atol=1e-6)
    collapsed, unsure = np.tile(certain[:1], (BATCH, 1)) / np.float32(1e3), np.zeros_like(certain)
    unbalanced = np.concatenate([certain[:4], certain[:1], certain[:1]])
    for worse, least in ((collapsed, 10.0), (unsure, 0.99), (unbalanced, 0.1)):
        assert diversity(worse)[0] > least
    assert diversity(unsure, None, {'beta': 0.0})[0] <= 1
    # Without the second part nothing speaks against one class for all.
    np.testing.assert_allclose(diversity(collapsed, None, {'beta': 0.0})[0], 0, atol=1e-2)


def test_diversity_does_not_see_the_order_of_examples_and_classes_nor_shifts_nor_a_batch_repeated():
    logits = (2 * np.random.default_rng(2).normal(size=(BATCH, CLASSES))).astype(np.float32)
    value, gradient = diversity(logits)
    permuted, permuted_gradient = diversity(logits[::-1, ::-1])
    np.testing.assert_allclose(permuted, value, rtol=1e-5)
    np.testing.assert_allclose(permuted_gradient, gradient[::-1, ::-1], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(diversity(logits + np.float32(7))[0], value, rtol=1e-5)
    np.testing.assert_allclose(diversity(np.tile(logits, (2, 1)))[0], value, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(losses.diversity, static_argnames='axis')(logits.T, axis=0), value, rtol=1e-6)
    half = logits.astype(jnp.bfloat16)
    np.testing.assert_allclose(diversity(half)[0], diversity(half.astype(np.float32))[0], rtol=1e-6)
    mapped = jax.jit(jax.vmap(losses.diversity))(np.stack([logits, 2 * logits]))
    np.testing.assert_allclose(mapped, [value, diversity(2 * logits)[0]], rtol=1e-5)


def test_descending_diversity_sorts_a_batch_into_all_classes(key):
    """Each example is sure of one class, and no class is left out."""
    logits = 0.1 * jax.random.normal(key, (12, CLASSES))
    options = {'threshold': 0.6, 'sharpness': 8.0}
    step = jax.jit(lambda z, _: (z - 2 * jax.grad(lambda z: losses.diversity(z, **options))(z), None))
    found, _ = jax.lax.scan(step, logits, None, 500)
    p = jax.nn.softmax(found, axis=-1)
    assert np.all(np.max(p, axis=-1) > 0.8)
    assert np.all(np.bincount(np.argmax(p, axis=-1), minlength=CLASSES) >= 2)


@pytest.mark.parametrize('shape', [(1, 2), (1, 3), (4, 3)])
def test_diversity_of_extreme_logits_is_finite(shape):
    """±1e4, zeros and -inf, rows of nothing but -inf too, under masks of all and of nothing."""
    rows = np.random.default_rng(3).choice([1e4, -1e4, 0.0, -np.inf], size=(30, *shape)).astype(np.float32)
    rows[0], rows[1, ..., 0] = -np.inf, -np.inf
    both = jax.jit(jax.vmap(jax.value_and_grad(lambda z, where: losses.diversity(z, where=where)), in_axes=(0, None)))
    for keep in (True, False):
        value, gradient = both(rows, np.full(shape[0], keep))
        assert np.isfinite(value).all()
        assert np.isfinite(gradient).all()
        assert (value >= -1e-5).all()
        if not keep:
            assert not np.any(value)
            assert not np.any(gradient)


def test_what_is_masked_has_no_influence_on_diversity():
    logits = np.random.default_rng(4).normal(size=(BATCH, CLASSES)).astype(np.float32)
    where = np.arange(BATCH) != 2
    value, gradient = diversity(logits, where)
    for fill in (1e15, -np.inf, np.inf, np.nan):
        logits[2] = fill
        changed, changed_gradient = diversity(logits, where)
        np.testing.assert_array_equal(changed, value)
        np.testing.assert_array_equal(changed_gradient, gradient)
    assert np.isnan(diversity(logits, ~where)[0])


def test_every_position_is_an_example_to_diversity_and_an_empty_batch_costs_nothing():
    logits = np.random.default_rng(4).normal(size=(BATCH, CLASSES)).astype(np.float32)
    where = np.array([[True, False, True], [False, True, True]])
    value, gradient = diversity(logits, where.reshape(-1))
    of_positions = diversity(logits.reshape(2, 3, CLASSES), where)
    np.testing.assert_allclose(of_positions[0], value, rtol=1e-6)
    np.testing.assert_allclose(of_positions[1].reshape(-1, CLASSES), gradient, rtol=1e-5, atol=1e-7)
    of_examples = diversity(logits.reshape(2, 3, CLASSES), where[:, 0])
    np.testing.assert_allclose(of_examples[0], diversity(logits, np.repeat(where[:, 0], 3))[0], rtol=1e-6)
    value, gradient = diversity(logits[:0])
    assert value == 0
    assert gradient.shape == (0, CLASSES)


@pytest.mark.parametrize(
    'options, part',
    [
        ({'threshold': 1.5}, 'threshold must be between 0 and 1, got 1.5'),
        ({'threshold': np.float32(1.5)}, 'threshold must be between 0 and 1, got 1.5'),
        ({'threshold': 0.0}, 'threshold must be positive, got 0.0'),
        ({'sharpness': -1.0}, 'sharpness must be positive, got -1.0'),
        ({'where': np.ones(3, bool)}, r'where \(3,\) does not broadcast to \(4,\)'),
        ({'axis': 2}, 'axis 2'),
    ],
)
def test_what_diversity_refuses(options, part):
    with pytest.raises(ValueError, match=f'^diversity: {part}'):
        losses.diversity(jnp.ones((4, 3)), **options)
    with pytest.raises(ValueError, match=r'^diversity: logits must be \[batch, classes\], .* got \(3,\)$'):
        losses.diversity(jnp.ones(3))
    with pytest.raises(ValueError, match=r'^diversity: logits \(3, 1\) [^\n]+ two classes or more: [^\n]+$'):
        losses.diversity(jnp.ones((3, 1)))
    with pytest.raises(ValueError, match=r'^diversity: logits must be floating point, got int32$'):
        losses.diversity(jnp.ones((4, 3), jnp.int32))
