"""SimKD and SemCKD: what they train and remember, and what becomes of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.objective_checks import abstract_init, arrays, batch_norm, compile_quickly, convolution, features, random_params

from kdjax import objectives

BATCH = 6
STUDENT, TEACHER = (BATCH, 8, 8, 3), (BATCH, 4, 4, 6)


def pair(seed=0):
    drawn = arrays({'s': STUDENT, 't': TEACHER}, seed)
    return features(s=drawn['s']), features(t=drawn['t'])


def run_simkd(batches, params, state, mask=None):
    """The state after some batches."""
    objective = objectives.simkd('s', 't')
    batch = {} if mask is None else {'mask': mask}
    apply = compile_quickly(functools.partial(objective.apply, step=0))
    for student, teacher in batches:
        _, _, state = apply(params, state, student, teacher, batch)
    return state


@pytest.fixture(scope='module')
def simkd():
    """Parameters, and the state as it begins: means of 0 and variances of 1."""
    objective = objectives.simkd('s', 't')
    params = random_params(objective, *pair(), {})
    _, state = jax.jit(lambda: objective.init(jax.random.key(0), *pair(), {}))()
    return params, state


def test_simkd_s_bottleneck_has_half_the_teacher_s_channels(simkd):
    kernels = [simkd[0]['simkd'][f'Conv_{i}']['kernel'].shape for i in range(3)]
    assert kernels == [(1, 1, 3, 3), (3, 3, 3, 3), (1, 1, 3, 6)]
    narrow, _ = abstract_init(objectives.simkd('s', 't', reduction=6), *pair(), {})
    assert narrow['simkd']['Conv_1']['kernel'].shape == (3, 3, 1, 1)
    with pytest.raises(ValueError, match=r'^simkd: reduction must be at least 1, got 0$'):
        objectives.simkd('s', 't', reduction=0)


def test_simkd_gathers_the_statistics_of_what_counts(simkd):
    """A tenth of the way to those of each batch; not of a batch of which nothing counts."""
    params, state = simkd
    student, teacher = pair(1)
    mask = np.array([True, False, True, True, False, True])
    moved = run_simkd([(student, teacher)], params, state, mask)['simkd']['BatchNorm_0']
    pooled = student.features['s'].reshape(BATCH, 4, 2, 4, 2, 3).mean((2, 4))[mask].astype(np.float64)
    activations = np.einsum('bhwc,cd->bhwd', pooled, params['simkd']['Conv_0']['kernel'][0, 0].astype(np.float64))
    np.testing.assert_allclose(moved['mean'], 0.1 * activations.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(moved['var'], 0.9 + 0.1 * activations.var((0, 1, 2)), rtol=1e-4)
    idle = run_simkd([(student, teacher)], params, state, np.zeros(BATCH, bool))
    for x, y in zip(jax.tree.leaves(idle), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(x, y)


def test_simkd_s_logits_are_those_of_the_teacher_s_head_behind_the_projector(simkd):
    """With the batch's statistics in the state they are what training saw, and the head is linear."""
    params, state = simkd
    batch = pair(2)
    # Of one batch again and again, the statistics become those of the batch.
    state = run_simkd([batch] * 150, params, state)
    image = batch[0].features['s']
    x = jnp.asarray(image.reshape(BATCH, 4, 2, 4, 2, 3).mean((2, 4)))
    for i in range(3):
        x = jnp.maximum(batch_norm(params['simkd'][f'BatchNorm_{i}'], convolution(params['simkd'][f'Conv_{i}'], x)), 0.0)
    kernel, bias = (arrays({'head': shape}, 7)['head'] for shape in ((6, 4), (4,)))
    expected = np.asarray(x, np.float64).mean((1, 2)) @ kernel + bias
    both = params['simkd'], state['simkd'], image
    np.testing.assert_allclose(objectives.simkd_logits(*both, kernel, bias, size=(4, 4)), expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(objectives.simkd_logits(*both, kernel, size=(4, 4)), expected - bias, rtol=1e-3, atol=1e-4)
    # A single example has the logits that it has among others.
    one = objectives.simkd_logits(params['simkd'], state['simkd'], image[:1], kernel, bias, size=(4, 4))
    np.testing.assert_allclose(one, expected[:1], rtol=1e-3, atol=1e-4)
    assert objectives.simkd_logits(params['simkd'], state['simkd'], image.astype(jnp.bfloat16), kernel).dtype == jnp.float32
    for head in (kernel[:5], kernel[0]):
        with pytest.raises(ValueError, match=r'^simkd_logits: the head must be \[channels, classes\] with 6 channels, got \S+'):
            objectives.simkd_logits(*both, head)


@pytest.mark.parametrize('make', [objectives.simkd, lambda s, t: objectives.semckd([s], [t])])
def test_embeddings_are_refused(make):
    drawn = arrays({'s': (BATCH, 3), 't': (BATCH, 4)})
    with pytest.raises(ValueError, match=r'^(simkd|semckd): layers must be images or tokens [^\n]+, got \(6, 3\)$'):
        make('s', 't').init(jax.random.key(0), features(s=drawn['s']), features(t=drawn['t']), {})


@pytest.fixture(scope='module')
def semckd():
    """The outputs of one layer of the student and two of the teacher, and parameters."""
    drawn = arrays({'s': (BATCH, 4, 4, 3), 't': (BATCH, 4, 4, 4), 'u': (BATCH, 2, 2, 5)}, 3)
    student, teacher = features(s=drawn['s']), features(t=drawn['t'], u=drawn['u'])
    return student, teacher, random_params(objectives.semckd(['s'], ['t', 'u']), student, teacher, {})


def test_semckd_has_a_bottleneck_of_twice_the_teacher_s_channels_for_every_pair(semckd):
    *_, params = semckd
    assert set(params['semckd']) == {'query0', 'key0', 'key1', 'project0_0', 'project0_1'}
    for j, channels in enumerate((4, 5)):
        kernels = [params['semckd'][f'project0_{j}'][f'Conv_{i}']['kernel'].shape for i in range(3)]
        wide = 2 * channels
        assert kernels == [(1, 1, 3, wide), (3, 3, wide, wide), (1, 1, wide, channels)]


def value(objective, params, student, teacher):
    state = {name: {} for name in params}
    return float(compile_quickly(lambda params: objective.apply(params, state, student, teacher, {}, step=0)[0])(params))


def test_semckd_is_the_mean_over_layers_when_hot_and_one_layer_when_cold(semckd):
    """The attention adds up to one over the teacher's layers."""
    student, teacher, params = semckd
    own = params['semckd']

    def alone(j, path):
        one = {'query0': own['query0'], 'key0': own[f'key{j}'], 'project0_0': own[f'project0_{j}']}
        return value(objectives.semckd(['s'], [path]), {'semckd': one}, student, teacher)

    separate = alone(0, 't'), alone(1, 'u')
    hot = value(objectives.semckd(['s'], ['t', 'u'], temperature=1e6), params, student, teacher)
    np.testing.assert_allclose(hot, np.mean(separate), rtol=1e-5)
    # The keys of one layer are the queries, which are then nearest to themselves for every example.
    same = {**own, 'query0': own['key1']}
    twins = features(s=teacher.features['u'])
    shapes, _ = abstract_init(objectives.semckd(['s'], ['t', 'u']), twins, teacher, {})
    drawn = random_params(objectives.semckd(['s'], ['t', 'u']), twins, teacher, {})['semckd']
    assert jax.tree.structure(shapes['semckd']) == jax.tree.structure(drawn)
    same = {**drawn, 'query0': own['key1'], 'key0': own['key0'], 'key1': own['key1']}
    cold = value(objectives.semckd(['s'], ['t', 'u'], temperature=1e-4), {'semckd': same}, twins, teacher)
    only = {'query0': own['key1'], 'key0': own['key1'], 'project0_0': drawn['project0_1']}
    np.testing.assert_allclose(cold, value(objectives.semckd(['s'], ['u']), {'semckd': only}, twins, teacher), rtol=1e-5)


def test_semckd_s_attention_goes_to_the_layer_that_is_nearer(semckd):
    """Trained alone, the attention lowers the value: queries move towards the key of the smaller distance."""
    student, teacher, params = semckd
    objective = objectives.semckd(['s'], ['t', 'u'])

    @compile_quickly
    def step(params):
        def loss(params):
            return objective.apply(params, {'semckd': {}}, student, teacher, {}, step=0)[0]

        before, gradient = jax.value_and_grad(loss)(params)
        attention = {
            k: v if k.startswith(('query', 'key')) else jax.tree.map(jnp.zeros_like, v) for k, v in gradient['semckd'].items()
        }
        return before, jax.tree.map(lambda p, g: p - 0.1 * g, params, {'semckd': attention})

    values = []
    for _ in range(10):
        before, params = step(params)
        values.append(float(before))
    assert np.all(np.diff(values) < 0)


@pytest.mark.parametrize('student, teacher', [([], ['t']), (['s'], []), ('s', ['t']), (['s'], 't')])
def test_semckd_wants_sequences_of_layers(student, teacher):
    with pytest.raises(ValueError, match=r'^semckd: name layers of both networks in sequences; got [^\n]+$'):
        objectives.semckd(student, teacher)
