"""Objectives without labels, and the adversary of domains: what they pick, what they train, and which way."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdjax import losses, metrics, networks, objectives, training
from kdjax.networks import Outputs

RNG = np.random.default_rng(0)
BATCH, KEPT = 6, np.array([0, 2, 3])
MASK = jnp.zeros(BATCH, jnp.bool_).at[KEPT].set(True)


def draw(*shape):
    return jnp.asarray(RNG.normal(size=(BATCH, *shape)), jnp.float32)


INPUTS = draw(5)
STUDENT = Outputs(draw(5), {'layer': draw(4, 3), 'image': draw(4, 4, 2), 'domain': draw(2, 2)})
TEACHER = Outputs(draw(5), {'layer': draw(4, 3), 'wide': draw(4, 7), 'small': draw(2, 2, 3), 'flat': draw(9)})
DOMAINS = jnp.array([0, 1, -1, 1, 0, -1])


def start(objective, student=STUDENT, teacher=TEACHER, batch=None):
    return jax.jit(objective.init)(jax.random.key(0), student, teacher, {} if batch is None else batch)


def apply(objective, params, student=STUDENT, teacher=TEACHER, batch=None, step=0):
    """Loss and metrics."""
    state = {name: {} for name in objective.names}
    return jax.jit(objective.apply)(params, state, student, teacher, {} if batch is None else batch, step=step)[:2]


@pytest.mark.parametrize(
    'paths, output, target',
    [
        ({}, STUDENT.logits, TEACHER.logits),
        ({'teacher': 'inputs'}, STUDENT.logits, INPUTS),
        ({'student': 'layer', 'teacher': 'layer'}, STUDENT.features['layer'], TEACHER.features['layer']),
    ],
    ids=['logits', 'inputs', 'features'],
)
def test_reconstruction_is_the_squared_distance_from_its_target(paths, output, target):
    objective, batch = objectives.reconstruction(**paths), {'inputs': INPUTS}
    distances = np.sum(np.square(np.asarray(output, np.float64) - target), axis=tuple(range(1, output.ndim)))
    params, _ = start(objective, batch=batch)
    np.testing.assert_allclose(apply(objective, params, batch=batch)[0], distances.mean(), rtol=1e-5)
    masked, _ = apply(objective, params, batch={**batch, 'mask': MASK})
    np.testing.assert_allclose(masked, distances[KEPT].mean(), rtol=1e-5)


class Autoencoder(nn.Module):
    """Linear, through two numbers."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(x.shape[-1], name='decoder')(nn.Dense(2, name='code')(x))


def test_an_autoencoder_learns_its_inputs_without_a_teacher():
    """Inputs on a plane are what two numbers can hold; the best that one direction could do is known from the other."""
    inputs = np.einsum('bi,ij->bj', RNG.normal(size=(16, 2)), np.eye(2, 4)) + 1.0
    batch = {'inputs': jnp.asarray(inputs, jnp.float32)}
    problem = training.distillation(
        networks.from_linen(Autoencoder()), None, objectives.reconstruction(teacher='inputs'), optax.adam(0.05)
    )
    train = jax.jit(lambda state: jax.lax.scan(lambda state, _: problem.step(state, {}, batch), state, length=400))
    _, measured = train(problem.init(jax.random.key(0), batch))
    assert measured['reconstruction'].total[-1] < 1e-3 * np.sum(np.square(inputs))


@pytest.mark.parametrize('variant', ['layer', 'inner_product'])
def test_layers_of_one_shape_are_compared_without_a_connector(variant):
    objective = objectives.attention_distillation('layer', 'layer', variant=variant)
    params, _ = start(objective)
    assert params == {'attention_distillation': {}}
    student, teacher = (np.asarray(outputs.features['layer'], np.float64) for outputs in (STUDENT, TEACHER))
    if variant == 'layer':
        attention = np.exp(teacher) / np.exp(teacher).sum(-1, keepdims=True)
        expected = np.mean(np.square((student - teacher) * attention), axis=(1, 2))
    else:
        expected = np.square(np.sum(student * teacher, axis=(1, 2))) + np.sum(student**2, axis=(1, 2))
    np.testing.assert_allclose(apply(objective, params)[0], expected.mean(), rtol=1e-5)
    np.testing.assert_allclose(apply(objective, params, batch={'mask': MASK})[0], expected[KEPT].mean(), rtol=1e-5)


def test_layers_of_other_shapes_are_compared_through_a_trained_regressor():
    objective = objectives.attention_distillation('image', 'small')
    params, _ = start(objective)
    gradients = jax.jit(jax.grad(lambda params, student: apply(objective, params, student)[0], (0, 1)))
    gradient, student = gradients(params, STUDENT)
    assert jax.tree.leaves(params)
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(gradient))
    assert np.any(student.features['image'] != 0)


def test_a_regressor_equals_the_loss_of_what_it_gives():
    objective = objectives.attention_distillation('layer', 'wide')
    params, _ = start(objective)
    dense = params['attention_distillation']['Dense_0']
    assert jax.tree.map(jnp.shape, dense) == {'kernel': (3, 7), 'bias': (7,)}
    regressed = jnp.einsum('blc,cw->blw', STUDENT.features['layer'], dense['kernel']) + dense['bias'][None, None]
    expected = jnp.mean(losses.attention_distillation(regressed, TEACHER.features['wide']))
    np.testing.assert_allclose(apply(objective, params)[0], expected, rtol=1e-5)


def test_activation_size_is_the_squared_norm_and_needs_no_teacher():
    objective = objectives.activation_size('image')
    norms = np.sum(np.square(np.asarray(STUDENT.features['image'], np.float64)), axis=(1, 2, 3))
    params, _ = start(objective, teacher=Outputs(None))
    np.testing.assert_allclose(apply(objective, params, teacher=Outputs(None))[0], norms.mean(), rtol=1e-5)
    masked, _ = apply(objective, params, teacher=Outputs(None), batch={'mask': MASK})
    np.testing.assert_allclose(masked, norms[KEPT].mean(), rtol=1e-5)


def test_diversity_of_a_masked_batch_is_that_of_the_rest():
    objective = objectives.diversity(threshold=0.6, beta=optax.linear_schedule(0.0, 1.0, 2))
    params, _ = start(objective, teacher=Outputs(None))
    loss, values = apply(objective, params, batch={'mask': MASK}, step=1)
    by_hand = jax.jit(lambda logits: losses.diversity(logits, threshold=0.6, beta=0.5))
    np.testing.assert_allclose(loss, by_hand(STUDENT.logits[KEPT]), rtol=1e-5)
    everything = {'mask': jnp.ones(BATCH, jnp.bool_)}
    assert not np.isclose(loss, apply(objective, params, batch=everything, step=1)[0])
    assert values['diversity/beta'].total == 0.5


def test_diversity_takes_the_mask_of_tokens_as_one_of_examples():
    """An example counts where any of its tokens does."""
    objective = objectives.diversity()
    tokens = MASK[:, None] & jnp.array([[True, False]])
    np.testing.assert_array_equal(*(apply(objective, {'diversity': {}}, batch={'mask': m})[0] for m in (MASK, tokens)))


@pytest.mark.parametrize(
    'objective, batch, message',
    [
        (objectives.reconstruction(teacher='inputs'), {'labels': DOMAINS}, r"reconstruction needs batch\['inputs'\]"),
        (objectives.reconstruction(teacher='other'), {}, "reconstruction: the teacher gives no feature 'other'"),
        (objectives.reconstruction(student='other'), {}, "reconstruction: the student gives no feature 'other'"),
        (objectives.reconstruction(student='layer'), {}, 'reconstruction: '),
        (objectives.attention_distillation('layer', 'flat'), {}, r'no regressor leads from an activation \(6, 4, 3\) to'),
        (objectives.attention_distillation('layer', 'layer', variant='other'), {}, "attention_distillation: variant .*'other'"),
        (objectives.activation_size('other'), {}, "activation_size: the student gives no feature 'other'"),
        (objectives.domain_discrimination('domain'), {'labels': DOMAINS}, r"domain_discrimination needs batch\['domains'\]"),
        (
            objectives.domain_discrimination('other'),
            {'domains': DOMAINS},
            'domain_discrimination: the student gives no feature',
        ),
        (objectives.domain_discrimination('domain'), {'domains': DOMAINS[:3]}, 'domain_discrimination: '),
        (
            objectives.domain_discrimination('domain'),
            {'domains': jnp.zeros(BATCH)},
            r"domain_discrimination: batch\['domains'\] ",
        ),
        (
            objectives.reconstruction(None, 'inputs'),
            {'inputs': {'ids': INPUTS}},
            'reconstruction: the inputs are several arrays',
        ),
    ],
)
def test_what_is_missing_is_a_one_line_error_at_init(objective, batch, message):
    with pytest.raises(ValueError, match=message) as error:
        start(objective, batch=batch)
    assert '\n' not in str(error.value)


def test_losses_of_logits_say_that_a_network_has_none():
    for objective in (objectives.reconstruction(), objectives.diversity()):
        with pytest.raises(ValueError, match='needs the logits of a student, and there are none'):
            start(objective, student=Outputs(None))


def discriminate(params, feature, domains):
    """By hand: the mean cross-entropy of a discriminator with one hidden layer over the examples of a known domain."""
    hidden, out = params['Dense_0'], params['Dense_1']
    pooled = feature.mean(1)
    x = jnp.maximum(jnp.einsum('bi,ih->bh', pooled, hidden['kernel']) + hidden['bias'][None], 0.0)
    log_p = jax.nn.log_softmax(jnp.einsum('bh,hd->bd', x, out['kernel']) + out['bias'][None])
    known = domains >= 0
    costs = -jnp.take_along_axis(log_p, jnp.maximum(domains, 0)[:, None], axis=1)[:, 0]
    return jnp.sum(costs, where=known) / jnp.sum(known, dtype=jnp.float32)


def adversary(objective):
    """A jitted function of (params, feature, batch, step) to the loss and the gradients of both."""

    @jax.jit
    def gradients(params, feature, batch, step):
        def loss(params, feature):
            student = Outputs(None, {'domain': feature})
            return apply(objective, {'domain_discrimination': params}, student, Outputs(None), batch, step)[0]

        return jax.value_and_grad(loss, (0, 1))(params, feature)

    return gradients


@pytest.fixture(scope='module')
def discriminator():
    """Parameters of a discriminator of three domains."""
    objective = objectives.domain_discrimination('domain', domains=3, hidden=8)
    return start(objective, batch={'domains': DOMAINS})[0]['domain_discrimination']


def test_the_discriminator_goes_downhill_and_the_student_uphill(discriminator):
    objective = objectives.domain_discrimination('domain', domains=3, hidden=8, reversal=0.3)
    feature = STUDENT.features['domain']
    value, (params, back) = adversary(objective)(discriminator, feature, {'domains': DOMAINS}, 0)
    by_hand = jax.jit(jax.value_and_grad(discriminate, (0, 1)))
    expected, (expected_params, expected_feature) = by_hand(discriminator, feature, DOMAINS)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), params, expected_params)
    np.testing.assert_allclose(back, -0.3 * expected_feature, rtol=1e-4, atol=1e-6)
    # A step of both against their gradients.
    descended = jax.tree.map(lambda x, g: x - 0.1 * g, discriminator, params)
    assert by_hand(descended, feature, DOMAINS)[0] < value
    assert by_hand(discriminator, feature - 0.1 * back, DOMAINS)[0] > value


def test_unknown_domains_and_masked_examples_do_not_count(discriminator):
    gradients = adversary(objectives.domain_discrimination('domain', domains=3, hidden=8))
    feature = STUDENT.features['domain']
    batch = {'domains': DOMAINS, 'mask': MASK}
    value, (_, back) = gradients(discriminator, feature, batch, 0)
    counted = np.asarray((DOMAINS >= 0) & MASK)
    expected = jax.jit(discriminate)(discriminator, feature[counted], DOMAINS[counted])
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_array_equal(np.any(back != 0, axis=(1, 2)), counted)
    value, back = gradients(discriminator, feature, {'domains': jnp.full(BATCH, -1), 'mask': MASK}, 0)
    assert value == 0
    assert not any(np.any(leaf != 0) for leaf in jax.tree.leaves(back))


def test_a_domain_that_there_is_not_is_an_error_or_nan(discriminator):
    objective = objectives.domain_discrimination('domain', domains=3, hidden=8)
    feature, told = (
        STUDENT.features['domain'],
        r"^domain_discrimination: batch\['domains'\] must be below 3, [^\n]+got 3 \(1 such\)$",
    )
    with pytest.raises(ValueError, match=told):
        objective.check(STUDENT, TEACHER, {'domains': DOMAINS.at[0].set(3)})
    gradients = adversary(objective)
    assert np.isnan(gradients(discriminator, feature, {'domains': DOMAINS.at[0].set(3), 'mask': MASK}, 0)[0])
    masked = {'domains': DOMAINS.at[1].set(3), 'mask': MASK}
    assert np.isfinite(gradients(discriminator, feature, masked, 0)[0])
    objective.check(STUDENT, TEACHER, masked)


def test_the_reversal_may_be_a_schedule(discriminator):
    schedule = losses.reversal_schedule(10)
    objective = objectives.domain_discrimination('domain', domains=3, hidden=8, reversal=schedule)
    feature, gradients = STUDENT.features['domain'], adversary(objective)
    batch = {'domains': DOMAINS, 'mask': jnp.ones(BATCH, jnp.bool_)}
    back = jax.jit(jax.grad(discriminate, 1))(discriminator, feature, DOMAINS)
    for step in (0, 5, 10):
        _, (_, got) = gradients(discriminator, feature, batch, step)
        np.testing.assert_allclose(got, -np.tanh(0.5 * step) * np.asarray(back), rtol=1e-4, atol=1e-6)
    _, values = apply(objective, {'domain_discrimination': discriminator}, batch=batch, step=5)
    np.testing.assert_allclose(metrics.compute(values)['domain_discrimination/reversal'], np.tanh(2.5), rtol=1e-6)


class Shift(nn.Module):
    """Adds a number of its own to the inputs of the second domain, which the last input names."""

    @nn.compact
    def __call__(self, x):
        shift = self.param('shift', nn.initializers.zeros, (1,))
        return nn.Dense(2, name='head')(Feature(name='feature')(x[:, :1] + shift[None] * x[:, 1:]))


class Feature(nn.Module):
    """A name for a tensor."""

    @nn.compact
    def __call__(self, x):
        return x


def test_a_student_learns_to_shift_a_domain_onto_the_other():
    """The second domain lies 1 beside the first, so that a shift of -1 hides it."""
    points, second = np.tile(np.linspace(-1, 1, 16), 2), np.repeat([0, 1], 16)
    batch = {'inputs': jnp.asarray(np.stack([points + second, second], axis=1), jnp.float32), 'domains': jnp.asarray(second)}
    objective = objectives.domain_discrimination('feature', hidden=8)
    student = networks.from_linen(Shift(), features='feature')
    # The discriminator learns faster than the student, or both would chase each other in circles.
    problem = training.distillation(
        student, None, objective, optax.sgd(0.03), objective_optimizer=optax.adamw(0.03, weight_decay=0.1)
    )
    train = jax.jit(lambda state: jax.lax.scan(lambda state, _: problem.step(state, {}, batch), state, length=300))
    state, _ = train(problem.init(jax.random.key(0), batch))
    np.testing.assert_allclose(state.params['shift'], [-1.0], atol=0.1)
