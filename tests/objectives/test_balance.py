"""Terms brought to one size, and a temperature that is trained against the student."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdjax import losses, objectives
from kdjax.networks import Outputs

RNG = np.random.default_rng(0)
STUDENT, TEACHER = (Outputs(jnp.asarray(x, jnp.float32)) for x in 2 * RNG.normal(size=(2, 6, 5)))
BATCH = {'labels': np.array([0, 4, -1, 2, 1, 3], np.int32)}
TERMS = {'hard': objectives.hard_labels(), 'mse': objectives.logit_mse(), 'soft': objectives.soft_targets()}
WEIGHTS = {'hard': 1.0, 'mse': 0.5, 'soft': 30.0}
WEIGHTED = objectives.combine(**{name: WEIGHTS[name] * term for name, term in TERMS.items()})


def start(objective):
    return objective.init(jax.random.key(0), STUDENT, TEACHER, BATCH)


@functools.partial(jax.jit, static_argnums=0)
def gradient(objective, params, state, student, step=0):
    """Loss, metrics and state, and the gradients by parameters and by the student's outputs."""

    def loss(params, student):
        value, metrics, new = objective.apply(params, state, student, TEACHER, BATCH, step=step)
        return value, (metrics, new)

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, student)


def test_balanced_terms_count_by_their_weights_alone():
    """Each has the reference's value, and its own gradient times a number."""
    balanced = objectives.balance_by_magnitude(WEIGHTED, 'hard')
    (loss, (metrics, _)), (_, whole) = gradient(balanced, *start(balanced), STUDENT)
    values, gradients = {}, {}
    for name, term in TERMS.items():
        (values[name], _), (_, of_student) = gradient(term, *start(term), STUDENT)
        gradients[name] = np.asarray(of_student.logits)
    np.testing.assert_allclose(loss, values['hard'] * sum(WEIGHTS.values()), rtol=1e-6)
    expected = sum(WEIGHTS[name] * values['hard'] / values[name] * gradients[name] for name in TERMS)
    np.testing.assert_allclose(whole.logits, expected, rtol=1e-5, atol=1e-7)
    for name in TERMS:
        np.testing.assert_allclose(
            metrics[f'balance_by_magnitude/{name}/factor'].total, values['hard'] / values[name], rtol=1e-6
        )
        measured = metrics[f'balance_by_magnitude/{name}']
        np.testing.assert_allclose(measured.total / measured.count, values[name], rtol=1e-6)


def test_a_scale_of_one_term_changes_nothing_once_it_is_balanced():
    def scaled(scale):
        louder = objectives.from_function('mse', lambda s, t, b: scale * losses.logit_mse(s.logits, t.logits))
        balanced = objectives.balance_by_magnitude(objectives.combine(hard=TERMS['hard'], mse=louder), 'hard')
        (loss, _), (_, of_student) = gradient(balanced, *start(balanced), STUDENT)
        return loss, of_student.logits

    for x, y in zip(scaled(1.0), scaled(1e4), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)


def test_a_term_that_is_zero_is_left_alone_and_nan_comes_through():
    balanced = objectives.balance_by_magnitude(objectives.combine(hard=TERMS['hard'], mse=TERMS['mse']), 'hard')
    (loss, (metrics, _)), (_, of_student) = gradient(balanced, *start(balanced), TEACHER)
    assert np.all(np.isfinite(of_student.logits))
    np.testing.assert_allclose(loss, metrics['balance_by_magnitude/hard'].total / 5, rtol=1e-6)
    (loss, _), _ = gradient(balanced, *start(balanced), Outputs(STUDENT.logits.at[0, 0].set(jnp.nan)))
    assert np.isnan(loss)


def test_a_reference_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r'^balance_by_magnitude: the objective has no term hint, but hard, mse, soft$'):
        objectives.balance_by_magnitude(WEIGHTED, 'hint')


def test_balancing_keeps_the_checks_of_its_terms():
    balanced = objectives.balance_by_magnitude(WEIGHTED, 'soft')
    with pytest.raises(ValueError, match="batch\\['labels'\\] must be below 5"):
        balanced.check(STUDENT, TEACHER, {'labels': np.full(6, 7)})


@pytest.mark.parametrize('variant', ['global', 'example'])
def test_the_temperature_climbs_what_the_student_descends(variant):
    """At the end of the ramp with the whole gradient, in the middle with half of it, and not at all at its start."""
    objective = objectives.curriculum_temperature(10, variant=variant, hidden=8)
    params, state = start(objective)
    by_step = {}
    for step in (0, 5, 10, 1000):
        (loss, (metrics, _)), (by_step[step], of_student) = gradient(objective, params, state, STUDENT, step)
        measured = metrics['curriculum_temperature/temperature']
        temperature = measured.total / measured.count
        assert 1 < temperature < 21
        if variant == 'global':
            np.testing.assert_allclose(temperature, 1 + 20 / (1 + np.exp(-1.0)), rtol=1e-6)
            np.testing.assert_allclose(
                loss, np.mean(losses.soft_targets(STUDENT.logits, TEACHER.logits, temperature=temperature)), rtol=1e-5
            )
    for share, step in ((0.0, 0), (0.5, 5), (1.0, 1000)):
        for x, whole in zip(jax.tree.leaves(by_step[step]), jax.tree.leaves(by_step[10]), strict=True):
            np.testing.assert_allclose(x, share * np.asarray(whole), rtol=1e-5, atol=1e-9)
    if variant == 'global':

        def plain(theta):
            temperature = 1 + 20 * jax.nn.sigmoid(theta)
            return jnp.mean(losses.soft_targets(STUDENT.logits, TEACHER.logits, temperature=temperature))

        np.testing.assert_allclose(*jax.tree.leaves(by_step[10]), -jax.grad(plain)(jnp.float32(1)), rtol=1e-5)
    harder = optax.tree.add_scale(params, -0.1, by_step[10])
    (before, _), _ = gradient(objective, params, state, STUDENT, 10)
    (after, _), _ = gradient(objective, harder, state, STUDENT, 10)
    assert after > before
    (lower, _), _ = gradient(objective, params, state, Outputs(STUDENT.logits - 0.1 * of_student.logits), 10)
    assert lower < before


def test_temperatures_of_examples_are_their_own():
    objective = objectives.curriculum_temperature(10, variant='example', hidden=8)
    params, state = start(objective)
    whole = objective.apply(params, state, STUDENT, TEACHER, {}, step=10)[0]
    alone = [
        objective.apply(params, state, Outputs(STUDENT.logits[i][None]), Outputs(TEACHER.logits[i][None]), {}, step=10)[0]
        for i in range(6)
    ]
    np.testing.assert_allclose(whole, np.mean(alone), rtol=1e-5)


@pytest.mark.parametrize(
    'options', [{'steps': 0}, {'least': 0.0}, {'spread': float('inf')}, {'hidden': 0}, {'variant': 'class'}]
)
def test_a_curriculum_that_cannot_be_is_refused(options):
    with pytest.raises(ValueError, match=r'^curriculum_temperature: [^\n]+$'):
        objectives.curriculum_temperature(**{'steps': 10, **options})
