"""SRD against a float64 oracle from the authors' formula, and what it promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.feature_checks import activations, check_against_oracle
from helpers.gradient_checks import value_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kdjax import losses

BATCH = 3
EXAMPLES = settings(max_examples=10, deadline=None, derandomize=True, database=None)


def oracle(exponent, epsilon):
    """The logarithm of the sum of the powers of what is kept of an example."""

    def value(s, t, where):
        return np.log(np.sum(np.abs(s - t)[where] ** exponent) + epsilon) if where.any() else 0.0

    return value


@pytest.mark.parametrize('exponent, epsilon', [(4.0, 1e-12), (2.0, 0.5), (1.5, 3.0)])
@EXAMPLES
@given(data=st.data())
def test_values_and_gradients_equal_the_oracle_under_any_mask(exponent, epsilon, data):
    """The differences are never zero, where a power has no finite differences."""
    student = data.draw(activations(BATCH, 2, 4))
    teacher = data.draw(activations(BATCH, 2, 4)) + np.float32(1 / 32)
    where = data.draw(arrays(np.bool_, (BATCH, 2, 4)))
    # 4 and 1e-12 are the defaults.
    options = {} if exponent == 4 else {'exponent': exponent, 'epsilon': epsilon}
    computed = value_and_gradients('srd', student, teacher, where=where, **options)
    check_against_oracle(oracle(exponent, epsilon), (student, teacher, where), computed, rtol=2e-5)


@pytest.mark.parametrize('shape', [(4,), (5, 4), (2, 2, 4), (2, 2, 2, 4)])
def test_embeddings_of_any_rank_are_one_vector(shape):
    student, teacher = np.random.default_rng(0).normal(size=(2, BATCH, *shape)).astype(np.float32)
    flat = losses.srd(student.reshape(BATCH, -1), teacher.reshape(BATCH, -1))
    np.testing.assert_allclose(losses.srd(student, teacher), flat, rtol=1e-6)


@pytest.mark.parametrize('exponent', [2.0, 4.0])
def test_a_scale_is_a_shift_of_the_value_and_does_not_change_the_gradient_along_the_difference(exponent):
    """Σ (s - t) · gradient is the exponent, however near the two are: no example is done with before the others."""
    student, teacher = np.random.default_rng(1).normal(size=(2, BATCH, 6)).astype(np.float32)
    values, *_ = value_and_gradients('srd', student, teacher, exponent=exponent)
    for scale in (1e-2, 1e2, 1e15, 1e30):
        near, gradient, _ = value_and_gradients(
            'srd', np.float32(scale) * student, np.float32(scale) * teacher, exponent=exponent
        )
        np.testing.assert_allclose(near, values + exponent * np.log(scale), rtol=1e-3 if scale < 1 else 1e-5)
        along = np.sum(gradient * np.float32(scale) * (student - teacher), axis=1)
        np.testing.assert_allclose(along, exponent, rtol=1e-3)


@pytest.mark.parametrize('apart', [0.0, 1e-20, 1e-4, 1e-3])
def test_near_and_equal_embeddings_have_the_least_value_and_small_gradients(apart):
    student = np.zeros((1, 3), np.float32)
    values, *gradients = value_and_gradients('srd', student + np.float32(apart), student)
    np.testing.assert_allclose(values, np.log(3 * np.float64(apart) ** 4 + 1e-12), rtol=1e-5)
    for gradient in gradients:
        assert np.all(np.isfinite(gradient))
        assert np.all(gradient == 0) == (apart == 0) or apart == 1e-20


def test_the_two_networks_are_alike_and_the_teacher_is_not_stopped():
    student, teacher = np.random.default_rng(2).normal(size=(2, BATCH, 6)).astype(np.float32)
    values, by_student, by_teacher = value_and_gradients('srd', student, teacher)
    np.testing.assert_allclose(losses.srd(teacher, student), values, rtol=1e-6)
    np.testing.assert_allclose(by_student, -by_teacher, rtol=1e-6)


def test_the_exponent_has_a_gradient_too():
    """A schedule may be learned: the derivative of log Σ d^p is the mean of log d by the weights d^p."""
    student, teacher = np.random.default_rng(3).normal(size=(2, 1, 6)).astype(np.float32)
    slope = jax.grad(lambda p: losses.srd(student, teacher, exponent=p)[0])(jnp.float32(3.0))
    distances = np.abs(student - teacher)[0].astype(np.float64)
    np.testing.assert_allclose(slope, np.average(np.log(distances), weights=distances**3), rtol=1e-4)


@pytest.mark.parametrize('name', ['exponent', 'epsilon'])
def test_what_must_be_positive_is_checked(name):
    ones = np.ones((2, 3), np.float32)
    for value in (0.0, -1.0, float('nan')):
        with pytest.raises(ValueError, match=rf'^srd: {name} must be positive, got {value}$'):
            losses.srd(ones, ones, **{name: value})
