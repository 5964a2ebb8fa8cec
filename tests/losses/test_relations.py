"""Losses on relations against a float64 oracle written from the paper's formula, and the properties that it promises."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kdjax import losses

BATCH = 4
EXAMPLES = settings(max_examples=25, deadline=None, derandomize=True, database=None)


def embeddings(*shape):
    """Odd multiples of 1/16 in [-4, 4]: exact in float32, and never a zero vector, at which finite differences fail."""
    integers = arrays(np.int32, shape, elements=st.integers(-32, 31), fill=st.nothing())
    return integers.map(lambda x: ((2 * x + 1) / 16).astype(np.float32))


def oracle(student, teacher):
    """Σ_ij (G_t - G_s)²_ij / B², with G = F Fᵀ and its rows divided by their L2 norms."""
    matrices = []
    for features in (student, teacher):
        flat = features.reshape(len(features), -1)
        similarities = flat @ flat.T
        matrices.append(similarities / np.linalg.norm(similarities, axis=1, keepdims=True))
    return np.sum((matrices[1] - matrices[0]) ** 2) / len(student) ** 2


def central_difference(function, x, step=1e-6):
    """The gradient of a function with scalar values."""
    gradient = np.zeros(x.shape)
    for index in np.ndindex(x.shape):
        moved = np.zeros(x.shape)
        moved[index] = step
        gradient[index] = (function(x + moved) - function(x - moved)) / (2 * step)
    return gradient


@jax.jit
def jitted(student, teacher, where):
    """`value_and_gradients` on the device."""
    loss = functools.partial(losses.similarity_preserving, where=where)
    return jax.value_and_grad(loss, argnums=(0, 1))(student, teacher)


def value_and_gradients(student, teacher, where=None):
    """The value, and its gradients with respect to student and teacher, as numpy arrays."""
    return jax.device_get(jitted(student, teacher, where))


def similarity_preserving(student, teacher):
    """The value alone."""
    return value_and_gradients(student, teacher)[0]


@EXAMPLES
@given(embeddings(BATCH, 3), embeddings(BATCH, 2))
def test_value_and_gradients_equal_the_oracle_for_other_widths(student, teacher):
    value, gradients = value_and_gradients(student, teacher)
    s, t = student.astype(np.float64), teacher.astype(np.float64)
    np.testing.assert_allclose(value, oracle(s, t), rtol=1e-5, atol=1e-6)
    expected = central_difference(lambda x: oracle(x, t), s), central_difference(lambda x: oracle(s, x), t)
    for gradient, reference in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(gradient, reference, rtol=1e-5, atol=1e-5 * max(1.0, np.abs(reference).max()))


@EXAMPLES
@given(embeddings(BATCH, 3), embeddings(BATCH, 2), arrays(np.bool_, (BATCH,)))
def test_value_and_gradients_equal_the_oracle_on_the_kept_examples(student, teacher, where):
    value, gradients = value_and_gradients(student, teacher, where)
    s, t = student.astype(np.float64), teacher.astype(np.float64)

    def kept(s, t):
        return oracle(s[where], t[where]) if where.any() else 0.0

    np.testing.assert_allclose(value, kept(s, t), rtol=1e-5, atol=1e-6)
    expected = central_difference(lambda x: kept(x, t), s), central_difference(lambda x: kept(s, x), t)
    for gradient, reference in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(gradient, reference, rtol=1e-5, atol=1e-5 * max(1.0, np.abs(reference).max()))


def test_images_are_flattened():
    rng = np.random.default_rng(0)
    student, teacher = (rng.normal(size=shape).astype(np.float32) for shape in ((BATCH, 2, 3, 4), (BATCH, 5, 1, 2)))
    expected = oracle(student.astype(np.float64), teacher.astype(np.float64))
    np.testing.assert_allclose(similarity_preserving(student, teacher), expected, rtol=1e-5)


@EXAMPLES
@given(embeddings(BATCH, 3), embeddings(BATCH, 2), st.permutations(range(BATCH)))
def test_the_order_of_the_examples_does_not_matter_and_gradients_follow_it(student, teacher, order):
    order = np.array(order)
    value, gradients = value_and_gradients(student, teacher)
    permuted, permuted_gradients = value_and_gradients(student[order], teacher[order])
    np.testing.assert_allclose(permuted, value, rtol=1e-5, atol=1e-6)
    for x, y in zip(gradients, permuted_gradients, strict=True):
        np.testing.assert_allclose(y, x[order], rtol=1e-5, atol=1e-5)


@EXAMPLES
@given(embeddings(BATCH, 3), embeddings(BATCH, 4), st.permutations(range(3)), st.permutations(range(4)))
def test_the_order_of_the_channels_does_not_matter(student, teacher, first, second):
    value = similarity_preserving(student, teacher)
    permuted = similarity_preserving(student[:, np.array(first)], teacher[:, np.array(second)])
    np.testing.assert_allclose(permuted, value, rtol=1e-5, atol=1e-6)


@EXAMPLES
@given(embeddings(BATCH, 3), embeddings(BATCH, 4), st.integers(0, 2**32 - 1))
def test_rotations_and_positive_scales_do_not_matter(student, teacher, seed):
    """Each network may have its own coordinates and its own scale."""
    rng = np.random.default_rng(seed)
    rotations = [np.linalg.qr(rng.normal(size=(width, width)))[0] for width in (3, 4)]
    scales = 10.0 ** rng.uniform(-3, 3, size=2)
    moved = [
        (scale * x.astype(np.float64) @ rotation).astype(np.float32)
        for x, rotation, scale in zip((student, teacher), rotations, scales, strict=True)
    ]
    np.testing.assert_allclose(similarity_preserving(*moved), similarity_preserving(student, teacher), rtol=1e-5, atol=1e-6)


@EXAMPLES
@given(embeddings(BATCH, 3), embeddings(BATCH, 4))
def test_value_lies_between_zero_and_four_over_the_batch(student, teacher):
    assert 0 <= similarity_preserving(student, teacher) <= 4 / BATCH


@EXAMPLES
@given(embeddings(BATCH, 3))
def test_equal_features_give_zero_and_zero_gradients(features):
    value, gradients = value_and_gradients(features, features)
    np.testing.assert_allclose(value, 0, atol=1e-12)
    np.testing.assert_allclose(gradients, np.zeros((2, BATCH, 3)), atol=1e-5)


@EXAMPLES
@given(embeddings(1, 3), embeddings(1, 4))
def test_one_example_has_no_relations(student, teacher):
    """The one similarity is 1 whatever the features, and so is not learnt from."""
    value, gradients = value_and_gradients(student, teacher)
    np.testing.assert_allclose(value, 0, atol=1e-12)
    for gradient in gradients:
        np.testing.assert_allclose(gradient, np.zeros(gradient.shape), atol=1e-6)


def extreme_batches():
    """Batches [n, BATCH, 3] at the ends of float32, with zeros among them."""
    features = np.random.default_rng(1).normal(size=(BATCH, 3)).astype(np.float32)
    dead = features * np.array([[0], [1], [1], [0]], np.float32)
    aligned = np.tile(features[:1], (BATCH, 1))
    fading = features * np.array([[1], [1e-13], [1e-16], [1e-25]], np.float32)
    plain = [
        fading,
        np.zeros_like(features),
        np.ones_like(features),
        features,
        dead,
        aligned,
        features[:, :1] * np.eye(BATCH, 3),
    ]
    return np.stack([*plain, *(1e15 * x for x in plain), *(1e-25 * x for x in plain[1:])]).astype(np.float32)


def test_values_and_gradients_are_finite_for_every_pair_of_extreme_batches():
    """Zero examples, zero batches, examples far smaller than others, equal ones, orthogonal ones, at 1e15, 1 and 1e-25."""
    batches = extreme_batches()
    student, teacher = (np.stack(x) for x in zip(*[(s, t) for s in batches for t in batches], strict=True))
    values, gradients = jax.device_get(jax.jit(jax.vmap(functools.partial(jitted, where=None)))(student, teacher))
    assert np.all(np.isfinite(values))
    assert np.all(values >= 0)
    for gradient in gradients:
        assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize('scale', [1e15, 1e-25])
def test_huge_and_tiny_features_are_worth_ordinary_ones(scale):
    rng = np.random.default_rng(2)
    student, teacher = (rng.normal(size=(BATCH, width)).astype(np.float32) for width in (3, 4))
    value, (gradient, _) = value_and_gradients(student, teacher)
    scaled, (scaled_gradient, _) = value_and_gradients(student * np.float32(scale), teacher)
    np.testing.assert_allclose(scaled, value, rtol=1e-5)
    np.testing.assert_allclose(scaled_gradient * np.float32(scale), gradient, rtol=1e-5, atol=1e-6)


def test_a_zero_example_has_a_row_of_zeros_and_no_gradient():
    """It differs from a row of the teacher's, of norm 1, by 1."""
    student, teacher = np.eye(BATCH, 3, dtype=np.float32), np.eye(BATCH, dtype=np.float32)
    value, (gradient, _) = value_and_gradients(student, teacher)
    np.testing.assert_allclose(value, 1 / BATCH**2, rtol=1e-6)
    np.testing.assert_array_equal(gradient[3], np.zeros(3))


def test_an_empty_selection_is_zero_with_zero_gradients():
    student, teacher = np.ones((BATCH, 3), np.float32), np.eye(BATCH, 2, dtype=np.float32)
    value, gradients = value_and_gradients(student, teacher, np.zeros(BATCH, bool))
    assert value == 0
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, np.zeros(gradient.shape))
