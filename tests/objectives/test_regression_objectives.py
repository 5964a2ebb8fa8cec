"""What the connectors that are models of their own learn, and when: variances, factors, margins and the fusion of stages."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
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

from kdjax import losses, networks, objectives
from kdjax.networks import Outputs

BATCH = 6


def pair(student_shape, teacher_shape, seed=0):
    """Outputs with one layer each, 's' and 't'."""
    drawn = arrays({'s': (BATCH, *student_shape), 't': (BATCH, *teacher_shape)}, seed)
    return features(s=drawn['s']), features(t=drawn['t'])


def trainer(objective, optimizer, student, teacher):
    """A jitted step of the objective's own parameters, which returns the gradient too."""

    @compile_quickly
    def run(params, optimizer_state, state, step):
        def loss(params):
            value, _, new_state = objective.apply(params, state, student, teacher, {}, step=step)
            return value, new_state

        (value, new_state), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        with jax.numpy_dtype_promotion('standard'):
            updates, optimizer_state = optimizer.update(gradient, optimizer_state, params)
        return optax.apply_updates(params, updates), optimizer_state, new_state, value, gradient

    return run


def test_vid_s_variance_starts_at_five():
    student, teacher = pair((2, 2, 3), (2, 2, 4))
    rho = jax.jit(lambda key: objectives.vid('s', 't').init(key, student, teacher, {})[0]['vid']['rho'])(jax.random.key(0))
    np.testing.assert_allclose(np.log1p(np.exp(rho)) + 1e-5, np.full(4, 5.0), rtol=1e-6)


def test_vid_s_variance_learns_how_far_off_the_prediction_is():
    """With nothing in the student to predict from, and no bias, the mean squares of the teacher's channels, in time."""
    student, _ = pair((2, 2, 3), (2, 2, 4))
    noise = np.random.default_rng(1).normal(size=(BATCH, 2, 2, 4)) * [0.5, 1.0, 2.0, 3.0]
    student, teacher = features(s=0.0 * student.features['s']), features(t=noise.astype(np.float32))
    objective, optimizer = objectives.vid('s', 't'), optax.adam(0.1)
    params = random_params(objective, student, teacher, {})
    optimizer_state, run = optimizer.init(params), trainer(objective, optimizer, student, teacher)
    for step in range(900):
        params, optimizer_state, _, value, gradient = run(params, optimizer_state, {'vid': {}}, step)
        assert step > 0 or np.all(gradient['vid']['rho'] != 0)
    variance = (noise**2).mean(axis=(0, 1, 2))
    np.testing.assert_allclose(np.log1p(np.exp(params['vid']['rho'])), variance, rtol=0.02)
    np.testing.assert_allclose(value, np.mean(0.5 + 0.5 * np.log(variance)), rtol=1e-3)


def autoencoder_error(params, target):
    """Three 3x3 convolutions, three transposed ones, each with a leaky ReLU, and the mean squared error."""
    x = target
    for name, kind in (('encoder', 'Conv'), ('decoder', 'ConvTranspose')):
        for i in range(3):
            x = convolution(params[name][f'{kind}_{i}'], x)
            x = jnp.maximum(x, 0.1 * x)
    return jnp.mean((x - target) ** 2)


def test_factor_transfer_trains_the_paraphraser_first_and_then_leaves_it_alone():
    """Also where Adam's momentum goes on moving its parameters: what is followed is the state, which stays to the bit."""
    student, teacher = pair((4, 4, 2), (2, 2, 4))
    objective, optimizer = objectives.factor_transfer('s', 't', pretraining=3), optax.adam(0.01)
    params = random_params(objective, student, teacher, {})
    optimizer_state, run = optimizer.init(params), trainer(objective, optimizer, student, teacher)
    state = jax.tree.map(jnp.zeros_like, {'factor_transfer': params['factor_transfer']['encoder']})
    encoders, states = [], []
    for step in range(6):
        before = params['factor_transfer']
        params, optimizer_state, state, value, gradient = run(params, optimizer_state, state, step)
        encoders.append(before['encoder'])
        states.append(state['factor_transfer'])
        trained = {
            name: any(np.any(leaf != 0) for leaf in jax.tree.leaves(x)) for name, x in gradient['factor_transfer'].items()
        }
        assert trained == {'encoder': step < 3, 'decoder': step < 3, 'translator': step >= 3}
        if step < 3:
            np.testing.assert_allclose(value, autoencoder_error(before, teacher.features['t']), rtol=1e-5)
    leaves = [np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (*encoders, *states)]
    encoders, states = leaves[:6], leaves[6:]
    for i in range(3):
        np.testing.assert_array_equal(states[i], encoders[i])
        assert np.all(encoders[i + 1] != encoders[i])
    # Four steps on the paraphraser that three steps of pretraining made.
    for i in range(3, 6):
        np.testing.assert_array_equal(states[i], encoders[3])
    assert np.all(encoders[5] != encoders[3])


def test_factor_transfer_without_pretraining_trains_both_at_once_and_keeps_no_copy():
    student, teacher = pair((4, 4, 2), (2, 2, 4))
    objective, optimizer = objectives.factor_transfer('s', 't'), optax.adam(0.01)
    params, state = random_params(objective, student, teacher, {}), {'factor_transfer': {}}
    optimizer_state, run = optimizer.init(params), trainer(objective, optimizer, student, teacher)
    values = []
    for step in range(30):
        params, optimizer_state, state, value, gradient = run(params, optimizer_state, state, step)
        values.append(float(value))
        assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(gradient))
    assert values[-1] < 0.9 * values[0]
    assert state == {'factor_transfer': {}}


class Normalized(nn.Module):
    """A convolution with batch norm."""

    @nn.compact
    def __call__(self, x, train=False):
        return nn.BatchNorm(use_running_average=not train, name='norm')(nn.Conv(4, (1, 1))(x)).mean((1, 2))


def test_overhaul_takes_its_margins_from_the_teacher_s_batch_norm():
    """Scale and bias come from a network, of whose scales one is negative and one is zero."""
    network = networks.from_linen(Normalized(), features='norm')
    tapped = networks.tap_parameters(network, ('norm/scale', 'norm/bias'))
    inputs = arrays({'x': (BATCH, 2, 2, 3)})['x']
    variables = jax.eval_shape(network.init, jax.random.key(0), inputs)
    variables = jax.tree.map(lambda x: np.random.default_rng(1).uniform(0.2, 1, x.shape).astype(x.dtype), variables)
    norm = {'scale': np.array([1.0, -0.7, 0.0, 2.0], np.float32), 'bias': np.array([0.3, -0.2, 0.4, -9.0], np.float32)}
    variables['params']['norm'] = norm
    teacher, _ = tapped.apply(variables, inputs)
    student = features(s=arrays({'s': (BATCH, 2, 2, 2)}, 2)['s'])
    objective = objectives.overhaul('s', 'norm')
    params = random_params(objective, student, teacher, {})

    @functools.partial(compile_quickly, static_argnames='objective')
    def apply(objective, teacher):
        return objective.apply(params, {'overhaul': {}}, student, teacher, {}, step=0)[0]

    value = apply(objective, teacher)
    regressed = batch_norm(params['overhaul']['BatchNorm_0'], convolution(params['overhaul']['Conv_0'], student.features['s']))
    margin = losses.overhaul_margin(norm['bias'], np.abs(norm['scale']))
    np.testing.assert_allclose(value, losses.overhaul(regressed, teacher.features['norm'], margin).mean(), rtol=1e-5)

    plain, _ = network.apply(variables, inputs)
    message = init_error(objective, student, plain, {})
    assert message.startswith("overhaul: the teacher gives no feature 'norm/scale' (it gives: norm)")
    elsewhere = features(t=teacher.features['norm'], **{f'bn/{name}': x for name, x in norm.items()})
    np.testing.assert_allclose(apply(objectives.overhaul('s', 't', norm='bn'), elsewhere), value, rtol=1e-6)


def review_gradient(objective, params, teacher):
    """The gradient of the parameters by student's stages: those of `expand_norm` see what came of their stage alone."""

    @compile_quickly
    def gradient(first, last):
        def loss(params):
            return objective.apply(params, {'hierarchical_context': {}}, features(a=first, b=last), teacher, {}, step=0)[0]

        grads = jax.grad(loss)(params)['hierarchical_context']
        return grads['expand_norm0'], grads['expand_norm1']

    return gradient


def test_stages_are_reviewed_from_the_last_to_the_first():
    """What the first stage is compared by depends on the last stage, and never the other way."""
    shapes = {'a': (BATCH, 4, 4, 2), 'b': (BATCH, 2, 2, 3)}
    stages, others = arrays(shapes, 0), arrays(shapes, 1)
    teacher = features(a=stages['a'][..., :1], b=stages['b'][..., :2])
    objective = objectives.hierarchical_context(['a', 'b'], ['a', 'b'])
    params = random_params(objective, features(**stages), teacher, {})
    gradient = review_gradient(objective, params, teacher)
    first, last = gradient(stages['a'], stages['b'])
    first_other, last_same = gradient(stages['a'], others['b'])
    assert np.all(first['scale'] != first_other['scale'])
    assert np.all(last['scale'] != last_same['scale'])
    first_other, last_same = gradient(others['a'], stages['b'])
    assert np.all(first['scale'] != first_other['scale'])
    np.testing.assert_array_equal(last['scale'], last_same['scale'])


def test_one_stage_has_nothing_to_be_fused_with_and_widths_end_at_512():
    objective = objectives.hierarchical_context(['s'], ['t'])
    params, _ = abstract_init(objective, *pair((2, 2, 600), (2, 2, 3)), {})
    review = params['hierarchical_context']
    assert set(review) == {'reduce0', 'reduce_norm0', 'expand0', 'expand_norm0'}
    assert review['reduce0']['kernel'].shape == (1, 1, 600, 512)
    assert review['expand0']['kernel'].shape == (3, 3, 512, 3)


def test_stages_and_layers_must_match():
    for make in (objectives.hierarchical_context, objectives.instance_graph, objectives.fsp):
        with pytest.raises(
            ValueError, match=rf'^{make.__name__}: name as many layers of the teacher as of the student; [^\n]+$'
        ):
            make(['a', 'b'], ['a'])
    message = init_error(objectives.vid('s', 't'), Outputs(None), Outputs(None), {})
    assert message.startswith("vid: the student gives no feature 's' (it gives: none)")
