"""The forms of objectives that published tables use: other sizes, embeddings among stages, trained embeddings."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.objective_checks import features, random_params

from kdjax import losses, objectives

RNG = np.random.default_rng(0)


def array(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def value(objective, params, student, teacher, batch=None):
    def loss(params):
        return objective.apply(params, {name: {} for name in params}, student, teacher, batch or {}, step=jnp.int32(0))[0]

    return jax.jit(jax.value_and_grad(loss))(params)


def test_overhaul_pools_a_teacher_that_is_larger():
    """The value is that for the teacher's mean over blocks of 2 x 2; the student's connector keeps its size."""
    student, image = features(s=array(2, 4, 4, 3)), array(2, 8, 8, 5)
    norm = {'n/scale': jnp.abs(array(5)), 'n/bias': array(5)}
    objective = objectives.overhaul('s', 't', norm='n')
    large = features(t=image, **norm)
    small = features(t=image.reshape(2, 4, 2, 4, 2, 5).mean((2, 4)), **norm)
    params = random_params(objective, student, large, {})
    assert params['overhaul']['Conv_0']['kernel'].shape == (1, 1, 3, 5)
    np.testing.assert_allclose(
        value(objective, params, student, large)[0], value(objective, params, student, small)[0], rtol=1e-5
    )


def test_knowledge_review_takes_the_embedding_as_its_last_stage():
    """It is an image of one position, which the stage before it sees everywhere."""
    stages = {'a': (2, 4, 4, 3), 'b': (2, 2, 2, 4)}
    student = features(**{name: array(*shape) for name, shape in stages.items()}, pooled=array(2, 4))
    teacher = features(**{name: array(*shape[:-1], 6) for name, shape in stages.items()}, pooled=array(2, 6))
    objective = objectives.hierarchical_context(['a', 'b', 'pooled'], ['a', 'b', 'pooled'])
    params = random_params(objective, student, teacher, {})
    found, gradient = value(objective, params, student, teacher)
    assert np.isfinite(found)
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(gradient['hierarchical_context']['expand2']))

    def as_image(outputs):
        pooled = outputs.features['pooled'][:, None, None]
        return features(**{**outputs.features, 'pooled': pooled})

    assert found == value(objective, params, as_image(student), as_image(teacher))[0]
    # A masked example is as if it were not there: statistics of the fusion's norms are of the rest.
    kept = {'mask': jnp.array([True, False])}
    alone = [features(**{name: x[:1] for name, x in each.features.items()}) for each in (student, teacher)]
    np.testing.assert_allclose(
        value(objective, params, student, teacher, kept)[0], value(objective, params, *alone)[0], rtol=1e-4
    )


@pytest.mark.parametrize('variant', ['adjacent', 'kernel'])
def test_correlation_congruence_trains_an_embedding_of_each_network(variant):
    student, teacher = features(s=array(6, 3)), features(t=array(6, 2, 2, 5))
    objective = objectives.correlation_congruence('s', 't', variant=variant, width=4)
    params = random_params(objective, student, teacher, {})
    found, gradient = value(objective, params, student, teacher)
    layers = params['correlation_congruence']
    embedded = [
        x @ layers[side]['Dense_0']['kernel'] + layers[side]['Dense_0']['bias'][None]
        for side, x in (('student', student.features['s']), ('teacher', teacher.features['t'].mean((1, 2))))
    ]
    np.testing.assert_allclose(found, losses.correlation_congruence(*embedded, variant=variant), rtol=1e-5)
    assert optax.tree.norm(gradient['correlation_congruence']['student']) > 0
    assert optax.tree.norm(gradient['correlation_congruence']['teacher']) > 0


def test_attention_transfer_pools_the_activation_before_the_power():
    """Activations that cancel within a window are no attention, though their squares are."""
    student = jnp.array([[1.0, 0.0]]).reshape(1, 1, 2, 1)
    teacher = jnp.array([[2.0, 2.0, 3.0, -3.0]]).reshape(1, 1, 4, 1)
    np.testing.assert_allclose(losses.attention_transfer(student, teacher), [0.0], atol=1e-6)
