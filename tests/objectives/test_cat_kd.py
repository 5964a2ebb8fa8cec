"""CAT-KD against a float64 oracle, and what class activation maps have to do with logits."""

import functools

import jax
import numpy as np
import pytest
from helpers.feature_checks import example_gradient, pool_oracle
from helpers.objective_checks import arrays, compile_quickly, features, init_error

from kdjax import losses, objectives

BATCH, CLASSES = 3, 4
SHAPES = {'s': (BATCH, 6, 4, 3), 's/kernel': (3, CLASSES)}, {'t': (BATCH, 4, 4, 5), 't/kernel': (5, CLASSES)}
PATHS = ('s', 't', 's/kernel', 't/kernel')


def pair(seed=0):
    return tuple(features(**arrays(shapes, seed + i)) for i, shapes in enumerate(SHAPES))


@functools.partial(compile_quickly, static_argnames='objective')
def run(objective, student, teacher, batch):
    """The value, and the gradients of both networks."""

    def loss(student, teacher):
        return objective.apply({'cat_kd': {}}, {'cat_kd': {}}, student, teacher, batch, step=0)[0]

    value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(student, teacher)
    return value, gradients[0].features, gradients[1].features


def oracle(s, s_kernel, t, t_kernel, resolution, normalize):
    """Of one example: maps of every class first, and pooled afterwards."""
    pooled = []
    for image, kernel in ((s, s_kernel), (t, t_kernel)):
        maps = np.stack([pool_oracle(image @ column, resolution, resolution) for column in kernel.T])
        if normalize:
            maps = maps / np.sqrt(np.sum(maps**2, axis=(1, 2), keepdims=True))
        pooled.append(maps)
    return np.mean((pooled[0] - pooled[1]) ** 2)


@pytest.mark.parametrize('normalize', [False, True])
@pytest.mark.parametrize('resolution', [1, 2, 3])
def test_values_and_gradients_equal_the_oracle(resolution, normalize):
    """Gradients reach the student's layer and its head, and nothing of the teacher."""
    student, teacher = pair()
    # 2 and False are the defaults.
    options = {name: x for name, x in (('resolution', resolution), ('normalize', normalize)) if x not in (2, False)}
    value, own, others = run(objectives.cat_kd(*PATHS, **options), student, teacher, {})
    s, s_kernel, t, t_kernel = (x.features[path].astype(np.float64) for x in (student, teacher) for path in x.features)

    def mean(s, s_kernel):
        return np.mean([oracle(a, s_kernel, b, t_kernel, resolution, normalize) for a, b in zip(s, t, strict=True)])

    np.testing.assert_allclose(value, mean(s, s_kernel), rtol=1e-5)
    if resolution == 1 and normalize:  # a number over its norm is a sign
        np.testing.assert_allclose(own['s'], 0.0, atol=1e-6)
    else:
        by_layer = example_gradient(
            lambda x: np.array([oracle(a, s_kernel, b, t_kernel, resolution, normalize) for a, b in zip(x, t, strict=True)]), s
        )
        np.testing.assert_allclose(own['s'], by_layer / BATCH, rtol=1e-4, atol=1e-6)
        moved = [(i, j) for i in range(3) for j in range(CLASSES)]
        slopes = [mean(s, s_kernel + d) - mean(s, s_kernel - d) for d in (1e-6 * one(s_kernel.shape, *at) for at in moved)]
        np.testing.assert_allclose(own['s/kernel'].ravel(), np.array(slopes) / 2e-6, rtol=1e-4, atol=1e-6)
    for x in others.values():
        np.testing.assert_array_equal(x, np.zeros(x.shape))


def one(shape, *at):
    array = np.zeros(shape)
    array[at] = 1
    return array


def test_pooled_to_one_position_they_are_logits_without_bias():
    """Whose mean squared difference is that of logit matching."""
    student, teacher = pair()
    logits = [x.features[name].mean((1, 2)) @ x.features[f'{name}/kernel'] for x, name in ((student, 's'), (teacher, 't'))]
    value, *_ = run(objectives.cat_kd(*PATHS, resolution=1), student, teacher, {})
    np.testing.assert_allclose(value, np.mean(losses.logit_mse(*logits)), rtol=1e-5)


def test_normalized_maps_do_not_see_the_magnitude_of_logits():
    student, teacher = pair()
    objective = objectives.cat_kd(*PATHS, normalize=True)
    scaled = features(**{name: np.float32(7) * x for name, x in student.features.items()})
    np.testing.assert_allclose(run(objective, scaled, teacher, {})[0], run(objective, student, teacher, {})[0], rtol=1e-5)
    same, *_ = run(objectives.cat_kd(*PATHS), features(**{f's{k[1:]}': x for k, x in teacher.features.items()}), teacher, {})
    assert same == 0


def test_windows_of_which_nothing_counts_are_left_out_and_the_others_average_what_does():
    """A mask of the student's layer, twice as high as what it is pooled to, and of images that are whole or gone."""
    student, teacher = pair()
    mask = np.ones((BATCH, 12, 4), bool)
    mask[:, :, 2:] = False  # the right half: two windows of four
    mask[1] = False
    teacher = features(**{**teacher.features, 't': np.repeat(teacher.features['t'], 3, axis=1)})
    value, own, _ = run(objectives.cat_kd(*PATHS), student, teacher, {'mask': mask})
    left = [x.features[name][:, :, :2][[0, 2]] for x, name in ((student, 's'), (teacher, 't'))]
    halves = [x.reshape(2, 2, -1, 2, x.shape[-1]).mean((2, 3)) for x in left]
    maps = [x @ kernel for x, kernel in zip(halves, (student.features['s/kernel'], teacher.features['t/kernel']), strict=True)]
    np.testing.assert_allclose(value, np.mean((maps[0] - maps[1]) ** 2), rtol=1e-5)
    np.testing.assert_array_equal(own['s'][1], 0.0)
    np.testing.assert_array_equal(own['s'][:, :, 2:], 0.0)
    assert np.all(own['s'][0, :, :2] != 0)


def test_windows_that_only_one_network_has_are_left_out_of_the_norm_too():
    """Of rows, 12 of the mask are 6 of the student, of which its first two windows share one; the teacher's windows share none.

    What is left is one position, which over its norm is a sign.
    """
    student, teacher = pair()
    teacher = features(**{**teacher.features, 't': np.repeat(teacher.features['t'], 3, axis=1)})
    mask = np.zeros((BATCH, 12, 4), bool)
    mask[:, 3, 0] = True
    value, *_ = run(objectives.cat_kd(*PATHS, resolution=4, normalize=True), student, teacher, {'mask': mask})
    signs = [
        np.sign(x.features[name][:, row, 0] @ x.features[f'{name}/kernel'])
        for x, name, row in ((student, 's', 1), (teacher, 't', 3))
    ]
    np.testing.assert_allclose(value, np.mean((signs[0] - signs[1]) ** 2), rtol=1e-5)
    assert value > 0


def test_what_does_not_fit_is_named():
    student, teacher = pair()
    objective = objectives.cat_kd(*PATHS)

    def error(**changed):
        return init_error(objective, features(**{**student.features, **changed}), teacher, {})

    assert error(s=np.ones((BATCH, 4, 3), np.float32)).startswith('cat_kd: layers must be images')
    assert '(4, 4)' in error(**{'s/kernel': np.ones((4, CLASSES), np.float32)})
    assert '(3, 9) and (5, 4)' in error(**{'s/kernel': np.ones((3, 9), np.float32)})
    assert init_error(objective, features(s=student.features['s']), teacher, {}).startswith(
        "cat_kd: the student gives no feature 's/kernel' (it gives: s)"
    )
    with pytest.raises(ValueError, match=r'^cat_kd: resolution must be at least 1, got 0$'):
        objectives.cat_kd(*PATHS, resolution=0)
