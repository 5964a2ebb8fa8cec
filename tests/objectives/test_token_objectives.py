"""Objectives on transformers: connectors and losses by hand on the tokens that count, in one program, with junk as padding."""

import functools

import jax
import numpy as np
import pytest
from helpers.objective_checks import arrays, compile_quickly, features, init_error, random_params
from helpers.oracles import kl, log_softmax

from kdjax import objectives

BATCH, LENGTH, HEADS = 4, 5, 2
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 1, 0, 1, 1]], bool)
SHAPES = {
    'narrow': (BATCH, LENGTH, 3),
    'wide': (BATCH, LENGTH, 4),
    'wide too': (BATCH, LENGTH, 4),
    'heads': (BATCH, HEADS, LENGTH, LENGTH),
    'scores': (BATCH, HEADS, LENGTH, LENGTH),
    'values': (BATCH, HEADS, LENGTH, 3),
}
OBJECTIVE = objectives.combine(
    hint=objectives.hint('narrow', 'wide', normalize=True),
    projected=objectives.hidden_cosine('narrow', 'wide'),
    cosine=objectives.hidden_cosine('wide', 'wide too'),
    squares=objectives.attention_maps('heads', 'heads'),
    kl=objectives.attention_maps('scores', 'heads', variant='kl'),
    relations=objectives.value_relations('values', 'values'),
)


def with_junk(layers):
    """Padding of large numbers."""
    tokens = {name: 2 if name in ('heads', 'scores', 'values') else 1 for name in layers}
    masks = {name: np.expand_dims(MASK, [i for i in range(x.ndim) if i not in (0, tokens[name])]) for name, x in layers.items()}
    return features(**{name: np.where(masks[name], x, np.float32(1e3)) for name, x in layers.items()})


@compile_quickly
def run(params, student, teacher, batch):
    state = {name: {} for name in OBJECTIVE.names}

    def loss(params, student, teacher):
        value, metrics, _ = OBJECTIVE.apply(params, state, student, teacher, batch, step=0)
        return value, metrics

    gradients, metrics = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(params, student, teacher)
    return metrics, gradients


@functools.cache
def computed(mask):
    """Metrics and gradients."""
    student, teacher = arrays(SHAPES, 0), arrays(SHAPES, 1)
    params = random_params(OBJECTIVE, features(**student), features(**teacher), {})
    batch = {'mask': MASK & mask}
    return params, student, teacher, jax.device_get(run(params, with_junk(student), with_junk(teacher), batch))


def divergence(student, teacher):
    return kl(log_softmax(teacher), log_softmax(student)).mean()


def cosine(student, teacher):
    norms = np.linalg.norm(student, axis=-1) * np.linalg.norm(teacher, axis=-1)
    return (1 - (student * teacher).sum(-1) / norms).mean()


def relations(values):
    return values @ values.swapaxes(-1, -2) / np.sqrt(values.shape[-1])


def expected():
    """Each loss on an example's own tokens alone; the mean over the examples that have any."""
    params, student, teacher, _ = computed(True)
    sides = [{name: x.astype(np.float64) for name, x in side.items()} for side in (student, teacher)]
    hint, projection = params['hint'], params['projected']['Dense_0']
    regressed = sides[0]['narrow'] @ hint['Dense_0']['kernel'] + hint['Dense_0']['bias']
    mean, variance = regressed[MASK].mean(0), regressed[MASK].var(0)
    norm = hint['BatchNorm_0']
    sides[0]['regressed'] = np.maximum(norm['scale'] * (regressed - mean) / np.sqrt(variance + 1e-5) + norm['bias'], 0)
    sides[0]['projected'] = sides[0]['narrow'] @ projection['kernel'] + projection['bias']
    values = {name: [] for name in OBJECTIVE.names}
    for i in np.flatnonzero(MASK.any(1)):
        kept = MASK[i]
        s, t = (
            {
                name: x[i][:, kept][:, :, kept]
                if name in ('heads', 'scores')
                else x[i][:, kept]
                if name == 'values'
                else x[i][kept]
                for name, x in side.items()
            }
            for side in sides
        )
        values['hint'].append(((s['regressed'] - t['wide']) ** 2).mean())
        values['projected'].append(cosine(s['projected'], t['wide']))
        values['cosine'].append(cosine(s['wide'], t['wide too']))
        values['squares'].append(((s['heads'] - t['heads']) ** 2).mean())
        values['kl'].append(divergence(s['scores'], t['heads']))
        values['relations'].append(divergence(relations(s['values']), relations(t['values'])))
    return {name: np.mean(per_example) for name, per_example in values.items()}


def test_values_are_those_of_the_tokens_that_count():
    metrics = computed(True)[3][0]
    for name, value in expected().items():
        np.testing.assert_allclose(metrics[name].total / metrics[name].count, value, rtol=1e-5, err_msg=name)
        assert metrics[name].count == 3


def test_gradients_reach_the_student_s_tokens_that_count_and_the_connectors_alone():
    params_gradient, student_gradient, teacher_gradient = computed(True)[3][1]
    assert set(params_gradient['projected']) == {'Dense_0'}
    assert params_gradient['cosine'] == params_gradient['relations'] == {}
    for leaf in jax.tree.leaves(params_gradient):
        assert np.all(np.isfinite(leaf))
        assert np.any(leaf != 0)
    for name, gradient in student_gradient.features.items():
        if name != 'wide too':
            tokens = np.any(
                gradient != 0, axis=tuple(i for i in range(gradient.ndim) if i not in (0, max(1, gradient.ndim - 2)))
            )
            np.testing.assert_array_equal(tokens, MASK, err_msg=name)
    for leaf in jax.tree.leaves(teacher_gradient):
        np.testing.assert_array_equal(leaf, np.zeros_like(leaf))


def test_a_batch_of_padding_gives_zero_and_no_gradient():
    metrics, gradients = computed(False)[3]
    for name in OBJECTIVE.names:
        assert metrics[name].total == metrics[name].count == 0
    for leaf in jax.tree.leaves(gradients):
        np.testing.assert_array_equal(leaf, np.zeros_like(leaf))


def test_a_mask_of_examples_counts_all_their_tokens():
    _, student, teacher, _ = computed(True)
    objective = objectives.hidden_cosine('wide', 'wide')
    mask = np.array([True, False, False, True])
    value = objective.apply(
        {'hidden_cosine': {}}, {'hidden_cosine': {}}, features(**student), features(**teacher), {'mask': mask}, step=0
    )[0]
    np.testing.assert_allclose(value, cosine(student['wide'][mask], teacher['wide'][mask]), rtol=1e-5)


@pytest.mark.parametrize('make', [objectives.hidden_cosine, objectives.attention_maps, objectives.value_relations])
def test_missing_layers_and_masks_of_other_lengths_are_errors(make):
    layers = features(x=np.ones((BATCH, LENGTH, 3) if make is objectives.hidden_cosine else SHAPES['heads'], np.float32))
    message = init_error(make('x', 'y'), layers, layers, {})
    assert message.startswith(f"{make.__name__}: the teacher gives no feature 'y' (it gives: x)")
    message = init_error(make('x', 'x'), layers, layers, {'mask': np.ones((BATCH, LENGTH + 1), bool)})
    assert message.startswith('a mask or weights (4, 6) do not fit a feature (4, 5')
