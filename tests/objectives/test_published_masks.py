"""The forms of published tables under masks, and what they refuse."""

import jax
import numpy as np
import pytest
from helpers.objective_checks import (
    abstract_init,
    arrays,
    batch_norm,
    compile_quickly,
    convolution,
    features,
    init_error,
    random_params,
)

from kdjax import losses, objectives

BATCH, WIDTH = 6, 8
# Of pixels: all of two examples, none of one, and parts of three, so that windows of two by two are whole, in part and empty.
PIXELS = np.zeros((BATCH, 4, 4), bool)
PIXELS[:2] = PIXELS[3, :2] = PIXELS[4, 0, 0] = PIXELS[5, 1:3] = True
EXAMPLES = PIXELS.any((1, 2))


def run(objective, params, student, teacher, batch):
    """The value, and the gradients by the parameters and by the student's features."""
    state = {name: {} for name in objective.names}

    @compile_quickly
    def compute(params, student):
        def loss(params, student):
            return objective.apply(params, state, student, teacher, batch, step=0)[0]

        return jax.value_and_grad(loss, argnums=(0, 1))(params, student)

    return jax.device_get(compute(params, student))


def sliced(outputs, where=EXAMPLES):
    return features(**{name: x[where] if len(x) == BATCH else x for name, x in outputs.features.items()})


def vectors(student=5, teacher=7):
    return tuple(features(**arrays({'pooled': (BATCH, width)}, seed)) for seed, width in enumerate((student, teacher)))


@pytest.mark.parametrize('variant', ['kernel', 'adjacent'])
def test_correlations_of_trained_embeddings(variant):
    """By hand, for examples that count; both networks' embeddings are trained."""
    student, teacher = vectors()
    objective = objectives.correlation_congruence('pooled', 'pooled', variant=variant, width=WIDTH)
    params = random_params(objective, student, teacher, {})
    value, (gradient, _) = run(objective, params, student, teacher, {'mask': EXAMPLES})

    def embedded(side, outputs):
        dense = params['correlation_congruence'][side]['Dense_0']
        assert dense['kernel'].shape == (outputs.features['pooled'].shape[1], WIDTH)
        return (outputs.features['pooled'] @ dense['kernel'] + dense['bias'])[EXAMPLES]

    expected = losses.correlation_congruence(embedded('student', student), embedded('teacher', teacher), variant=variant)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert set(gradient['correlation_congruence']) == {'student', 'teacher'}
    assert all(np.any(leaf['Dense_0']['kernel'] != 0) for leaf in gradient['correlation_congruence'].values())


def test_correlations_without_a_width_train_nothing():
    params, _ = abstract_init(objectives.correlation_congruence('pooled', 'pooled'), *vectors(), {})
    assert not jax.tree.leaves(params)


def stages(last):
    """Two images, and a last stage of some shape."""
    student = arrays({'first': (BATCH, 4, 4, 3), 'middle': (BATCH, 2, 2, 4), 'last': (BATCH, *last, 4)})
    teacher = arrays({'first': (BATCH, 4, 4, 5), 'middle': (BATCH, 2, 2, 6), 'last': (BATCH, *last, 7)}, 1)
    return features(**student), features(**teacher)


REVIEW = objectives.hierarchical_context(['first', 'middle', 'last'], ['first', 'middle', 'last'])


@pytest.mark.parametrize('batch', [{}, {'mask': EXAMPLES}, {'mask': PIXELS}], ids=['all', 'examples', 'pixels'])
def test_an_embedding_is_reviewed_as_an_image_of_one_position(batch):
    """Its windows hold no padding: where some of an example counts, all of its embedding does."""
    (student, teacher), images = stages(()), stages((1, 1))
    params = random_params(REVIEW, student, teacher, batch)
    value, gradients = run(REVIEW, params, student, teacher, batch)
    assert value > 0
    assert np.all(np.any(gradients[1].features['last'] != 0, axis=1) == (EXAMPLES if batch else True))
    image_value, image_gradients = run(REVIEW, params, *images, batch)
    np.testing.assert_allclose(value, image_value, rtol=1e-6)
    for x, y in zip(jax.tree.leaves(gradients), jax.tree.leaves(image_gradients), strict=True):
        np.testing.assert_allclose(x, y.reshape(x.shape), rtol=1e-5, atol=1e-6)


def test_a_review_under_a_mask_of_examples_is_that_of_those_examples():
    student, teacher = stages(())
    params = random_params(REVIEW, student, teacher, {})
    value, (gradient, _) = run(REVIEW, params, student, teacher, {'mask': EXAMPLES})
    expected, (expected_gradient, _) = run(REVIEW, params, sliced(student), sliced(teacher), {})
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for x, y in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_stages_of_tokens_are_not_reviewed():
    message = init_error(REVIEW, *stages((5,)), {})
    assert message == (
        'hierarchical_context: stages must be images [batch, height, width, channels] or embeddings [batch, channels], '
        'got (6, 5, 4)'
    )


NORM = {'norm/scale': np.array([1.0, 0.5, 2.0], np.float32), 'norm/bias': np.array([0.1, -0.2, 0.3], np.float32)}
OVERHAUL = objectives.overhaul('s', 't', norm='norm')


def test_a_pooled_teacher_is_the_mean_of_what_counts():
    """What does not count may be anything; where nothing does in a window, its position does not count."""
    drawn = arrays({'s': (BATCH, 2, 2, 2), 't': (BATCH, 4, 4, 3)})
    where = PIXELS.reshape(BATCH, 2, 2, 2, 2)
    kept = np.where(PIXELS[..., None], drawn['t'], 0.0).reshape(BATCH, 2, 2, 2, 2, 3)
    target = kept.sum((2, 4)) / np.maximum(where.sum((2, 4)), 1)[..., None]
    student, hidden = features(s=drawn['s']), np.where(PIXELS[..., None], drawn['t'], np.nan).astype(np.float32)
    params = random_params(OVERHAUL, student, features(t=hidden, **NORM), {})
    value, gradients = run(OVERHAUL, params, student, features(t=hidden, **NORM), {'mask': PIXELS})
    small = features(t=target.astype(np.float32), **NORM)
    expected, expected_gradients = run(OVERHAUL, params, student, small, {'mask': where.any((2, 4))})
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for x, y in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_a_smaller_teacher_is_reached_by_a_strided_convolution():
    student = features(**arrays({'s': (BATCH, 4, 4, 2)}))
    teacher = features(**arrays({'t': (BATCH, 2, 2, 3)}, 1), **NORM)
    params, _ = abstract_init(OVERHAUL, student, teacher, {})
    assert params['overhaul']['Conv_0']['kernel'].shape == (3, 3, 2, 3)


def test_the_published_regressor_is_a_convolution_a_norm_and_a_relu():
    student, teacher = (features(**arrays({'x': (BATCH, 2, 2, width)}, seed)) for seed, width in enumerate((2, 3)))
    for normalize in (False, True):
        objective = objectives.hint('x', 'x', normalize=normalize)
        params = random_params(objective, student, teacher, {})
        regressed = convolution(params['hint']['Conv_0'], student.features['x'])
        if normalize:
            regressed = np.maximum(batch_norm(params['hint']['BatchNorm_0'], regressed), 0)
        value, _ = run(objective, params, student, teacher, {})
        np.testing.assert_allclose(value, np.mean((regressed - teacher.features['x']) ** 2), rtol=1e-5)
