"""FBKD's attention against a float64 oracle from the paper's formulas, and what it promises."""

import numpy as np
import pytest
from helpers.feature_checks import activations, by_examples, example_gradient
from helpers.gradient_checks import value_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kdjax import losses

BATCH = 2
EXAMPLES = settings(max_examples=8, deadline=None, derandomize=True, database=None)


def softmax(x):
    exponentials = np.exp(x - x.max())
    return exponentials / exponentials.sum()


def attention(x):
    """Of the kept positions [positions, channels] of an example: one number for each position, and for each channel."""
    return np.abs(x).mean(axis=1), np.abs(x).mean(axis=0)


def masks(s, t, temperature):
    """One number for each position and channel, whose mean over either is one."""
    (p_s, q_s), (p_t, q_t) = attention(s), attention(t)
    over_positions, over_channels = (softmax((x + y) / temperature) * len(x) for x, y in ((p_s, p_t), (q_s, q_t)))
    return over_positions[:, None] * over_channels[None]


def oracle(guided, weight, temperature):
    """The value of an example, whose masks are those of the second pair of activations, which no gradient sees."""

    def value(s, t, where, fixed_s, fixed_t):
        if not where.any():
            return 0.0
        s, t, fixed_s, fixed_t = (x[where] for x in (s, t, fixed_s, fixed_t))
        distance = np.sqrt(np.sum(masks(fixed_s, fixed_t, temperature) * (t - s) ** 2))
        (p_s, q_s), (p_t, q_t) = attention(s), attention(t)
        return guided * distance + weight * (np.linalg.norm(p_s - p_t) + np.linalg.norm(q_s - q_t))

    return value


@pytest.mark.parametrize('guided, weight, temperature', [(7e-5, 4e-3, 0.1), (1.0, 0.0, 0.5), (0.0, 1.0, 0.5), (0.7, 1.3, 2.0)])
@EXAMPLES
@given(data=st.data())
def test_values_and_gradients_equal_the_oracle_under_any_mask(guided, weight, temperature, data):
    student = data.draw(activations(BATCH, 2, 3, 2))
    # Neither the activations nor their attention are equal anywhere, where a norm has no finite differences.
    teacher = data.draw(activations(BATCH, 2, 3, 2)) + np.float32(1 / 64) * np.sqrt(np.arange(1, 13, dtype=np.float32)).reshape(
        2, 3, 2
    )
    where = data.draw(arrays(np.bool_, (BATCH, 2, 3)))
    # 7e-5, 4e-3 and 0.1 are the defaults.
    options = {} if guided == 7e-5 else {'guided': guided, 'attention': weight, 'temperature': temperature}
    values, *gradients = value_and_gradients('fbkd', student, teacher, where=where[..., None], **options)
    exact = [x.astype(np.float64) for x in (student, teacher)]
    function = oracle(guided, weight, temperature)
    largest = guided + weight
    np.testing.assert_allclose(values, by_examples(function, *exact, where, *exact), rtol=1e-5, atol=1e-6 * largest)
    for i, gradient in enumerate(gradients):
        moved = [lambda x, i=i: by_examples(function, *exact[:i], x, *exact[i + 1 :], where, *exact)][0]
        np.testing.assert_allclose(gradient, example_gradient(moved, exact[i]), rtol=1e-3, atol=1e-4 * largest)


@EXAMPLES
@given(activations(BATCH, 3, 2, 3), activations(BATCH, 3, 2, 3), st.permutations(range(6)), st.permutations(range(3)))
def test_a_common_order_of_positions_and_of_channels_changes_nothing(student, teacher, positions, channels):
    options = {'guided': 1.0, 'attention': 1.0}
    values, *_ = value_and_gradients('fbkd', student, teacher, **options)
    moved = [
        x.reshape(BATCH, 6, 3)[:, np.array(positions)][..., np.array(channels)].reshape(x.shape) for x in (student, teacher)
    ]
    np.testing.assert_allclose(value_and_gradients('fbkd', *moved, **options)[0], values, rtol=1e-5)
    np.testing.assert_allclose(value_and_gradients('fbkd', teacher, student, **options)[0], values, rtol=1e-6)
    for result in value_and_gradients('fbkd', student, student, **options):
        np.testing.assert_array_equal(result, np.zeros(result.shape))


def test_the_same_difference_costs_more_where_the_networks_are_active():
    """And in the channels that are; at a high temperature, the same everywhere: the plain distance."""
    base = np.full((1, 2, 2, 2), 0.1, np.float32)
    base[0, 0, 0] += 1
    base[..., 1] += 1
    options = {'guided': 1.0, 'attention': 0.0}

    def cost(row, channel, temperature=0.1):
        other = base.copy()
        other[0, row, row, channel] += 0.01
        return float(losses.fbkd(base, other, temperature=temperature, **options)[0])

    assert cost(0, 0) > 3 * cost(1, 0)
    assert cost(0, 1) > 3 * cost(0, 0)
    np.testing.assert_allclose([cost(0, 0, 1e5), cost(1, 1, 1e5)], 0.01, rtol=1e-3)


@pytest.mark.parametrize('scale', [1e-30, 1e-10, 1e10, 1e25])
def test_activations_of_any_magnitude_have_finite_values_and_gradients(scale):
    student, teacher = np.float32(scale) * np.random.default_rng(0).normal(size=(2, 2, 3, 3, 2)).astype(np.float32)
    values, *gradients = value_and_gradients('fbkd', student, teacher, guided=1.0, attention=1.0)
    assert np.all(values > 0)
    assert all(np.all(np.isfinite(x)) for x in (values, *gradients))
    teacher[0] = student[0] = 0
    values, *gradients = value_and_gradients('fbkd', student, teacher, guided=1.0, attention=1.0)
    assert values[0] == 0
    assert all(np.all(x[0] == 0) for x in gradients)
