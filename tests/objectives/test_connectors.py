"""Connectors: their shapes, that they learn, and what cannot be joined."""

import jax
import numpy as np
import pytest
from helpers.lifted_checks import BATCH, KEY, MASK, init, jitted, outputs, sharded, value_and_gradients
from helpers.objective_checks import init_error

from kdjax import objectives
from kdjax.networks import Outputs

CONNECTORS = {
    'same size': ((BATCH, 4, 4, 3), (BATCH, 4, 4, 6), (1, 1, 3, 6)),
    'student twice as large': ((BATCH, 8, 8, 3), (BATCH, 4, 4, 6), (3, 3, 3, 6)),
    'student larger in width alone': ((BATCH, 4, 6, 3), (BATCH, 4, 2, 6), (1, 4, 3, 6)),
    'student half as large': ((BATCH, 2, 2, 3), (BATCH, 4, 4, 6), (4, 4, 3, 6)),
    'student larger, not a whole number of times': ((BATCH, 7, 5, 3), (BATCH, 4, 4, 6), (4, 2, 3, 6)),
    'dense': ((BATCH, 3), (BATCH, 6), (3, 6)),
    'tokens': ((BATCH, 5, 3), (BATCH, 5, 6), (3, 6)),
}


@pytest.mark.parametrize('name', list(CONNECTORS))
def test_hint_s_connector_has_the_shape_that_the_sizes_ask_for_and_learns(name):
    """Its parameters come from shapes alone, all get gradients, and a few steps of SGD reduce the loss."""
    student_shape, teacher_shape, kernel_shape = CONNECTORS[name]
    rng = np.random.default_rng(2)
    student = Outputs(None, {'s': rng.normal(size=student_shape).astype(np.float32)})
    teacher = Outputs(None, {'t': rng.normal(size=teacher_shape).astype(np.float32) + 1})
    objective = objectives.hint('s', 't')
    params, state = init(objective, student, teacher, {})
    leaves = {leaf.shape for leaf in jax.tree.leaves(params)}
    assert leaves == {kernel_shape, kernel_shape[-1:]}
    values = []
    for _ in range(5):
        value, _, (gradient, student_gradient, _) = value_and_gradients(objective, params, state, student, teacher, {})
        values.append(float(value))
        assert all(np.all(np.any(leaf != 0, axis=-1)) for leaf in jax.tree.leaves(gradient))
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
    assert np.any(student_gradient.features['s'] != 0)
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0] - 0.01


@pytest.mark.parametrize(
    'student_shape, teacher_shape',
    [
        ((BATCH, 3, 3, 3), (BATCH, 4, 4, 6)),  # smaller, and not a whole number of times
        ((BATCH, 8, 2, 3), (BATCH, 4, 4, 6)),  # larger in height and smaller in width
        ((BATCH, 5, 3), (BATCH, 4, 6)),  # tokens of another length
        ((BATCH, 4, 4, 3), (BATCH, 6)),
        ((BATCH, 3), (BATCH, 4, 4, 6)),
    ],
    ids=str,
)
def test_shapes_that_no_connector_joins_are_refused_by_init(student_shape, teacher_shape):
    student = Outputs(None, {'s': np.ones(student_shape, np.float32)})
    teacher = Outputs(None, {'t': np.ones(teacher_shape, np.float32)})
    message = init_error(objectives.hint('s', 't'), student, teacher, {})
    assert str(student_shape) in message
    assert str(teacher_shape) in message


def test_hint_can_normalize_and_rectify_what_its_connector_gives():
    """relu(γ (y - mean) / sqrt(var + 1e-5) + β) of y = x W, with the statistics of the examples that count, in float64."""
    student, teacher = outputs()
    objective = objectives.hint('s', 't', normalize=True)
    params, state = init(objective, student, teacher, {})
    kernel, norm = np.float64(params['hint']['Conv_0']['kernel']), params['hint']['BatchNorm_0']
    for mask in (MASK, np.ones(BATCH, bool)):
        one = jitted(objective, params, state, student, teacher, {'mask': mask}, 0)
        y = student.features['s'][mask].astype(np.float64) @ kernel[0, 0]
        normalized = norm['scale'] * (y - y.mean(axis=(0, 1, 2))) / np.sqrt(y.var(axis=(0, 1, 2)) + 1e-5) + norm['bias']
        np.testing.assert_allclose(one[0], np.mean((np.maximum(normalized, 0) - teacher.features['t'][mask]) ** 2), rtol=1e-5)
        eight = jitted(objective, params, state, *sharded(student, teacher, {'mask': mask}), 0)
        for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    value, _, gradients = value_and_gradients(objective, params, state, student, teacher, {'mask': np.zeros(BATCH, bool)})
    np.testing.assert_array_equal(value, 0.0)
    for leaf in jax.tree.leaves(gradients):
        np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))


def test_two_hints_train_connectors_of_their_own():
    student, teacher = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), outputs())
    objective = objectives.hint('s', 't') + objectives.hint('s', 't')
    params, _ = objective.init(KEY, student, teacher, {})
    kernels = [params[name]['Conv_0']['kernel'] for name in ('hint', 'hint_2')]
    assert not np.array_equal(*kernels)


def test_attention_transfer_and_similarity_preserving_take_any_channels_and_sizes():
    """No connector: nothing to train."""
    student = Outputs(None, {'s': np.ones((BATCH, 7, 7, 3), np.float32)})
    teacher = Outputs(None, {'t': np.ones((BATCH, 3, 3, 6), np.float32)})
    params, _ = init(objectives.attention_transfer('s', 't') + objectives.similarity_preserving('s', 't'), student, teacher, {})
    assert params == {'attention_transfer': {}, 'similarity_preserving': {}}
