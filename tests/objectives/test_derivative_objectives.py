"""Objectives on derivatives: what the taps hand over gives the losses of derivatives that are made by hand."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdjax import losses, metrics, networks, objectives, training
from kdjax.networks import Outputs

CLASSES = 3
INPUTS = jax.random.normal(jax.random.key(0), (4, 2, 3, 1))
DIRECTIONS = jnp.array([[1.0, 0.0, -1.0], [0.5, 2.0, 0.0]])
MASK = jnp.array([True, False, True, True])


class Smooth(nn.Module):
    """Second derivatives everywhere."""

    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(self.width, name='hidden')(x.reshape(x.shape[0], -1)))
        return nn.Dense(CLASSES, name='head')(x)


class Images(nn.Module):
    """A layer, and a head that does not treat all positions alike."""

    channels: int

    @nn.compact
    def __call__(self, x):
        return Head(name='head')(nn.Conv(self.channels, (2, 2), name='layer')(x))


class Head(nn.Module):
    """Not linear."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(CLASSES, name='out')(nn.tanh(x.reshape(x.shape[0], -1)))


def apply(objective, student, teacher, batch):
    """The loss of an objective without parameters."""
    empty = {name: {} for name in objective.names}
    return objective.apply(empty, empty, student, teacher, batch, step=0)[0]


def close(one, other):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6), one, other)


@pytest.mark.parametrize('directions', [None, DIRECTIONS], ids=['classes', 'directions'])
def test_jacobian_is_the_loss_of_the_networks_as_functions(directions):
    """Value and gradient, a second derivative; the networks' sizes differ."""
    plain = [networks.from_linen(Smooth(width)) for width in (4, 6)]
    student, teacher = (networks.tap_jacobian(network, directions) for network in plain)
    params, teacher_params = (jax.jit(network.init)(jax.random.key(i), INPUTS) for i, network in enumerate(plain))

    def tapped(params):
        outputs = [network.apply(p, INPUTS)[0] for network, p in ((student, params), (teacher, teacher_params))]
        return apply(objectives.jacobian(), *outputs, {'mask': MASK})

    def functions(params):
        chosen, products = jnp.eye(CLASSES) if directions is None else directions, []
        for network, p in zip(plain, (params, teacher_params), strict=True):
            single = jax.vmap(jax.jacrev(lambda x, network=network, p=p: network.apply(p, x[None])[0].logits[0]))(INPUTS)
            products.append(jnp.einsum('dc,bc...->bd...', chosen, single, precision='highest'))
        return jnp.mean(losses.jacobian(*products), where=MASK)

    got, expected = (jax.jit(jax.value_and_grad(function))(params) for function in (tapped, functions))
    close(got, expected)
    assert np.any(got[1]['params']['hidden']['kernel'] != 0)


def test_training_with_the_jacobian_alone_brings_a_linear_student_s_derivative_to_the_teacher_s():
    """Its values, which nothing compares, stay apart by the biases."""
    network = networks.tap_jacobian(networks.from_linen(nn.Dense(CLASSES)))
    batch = {'inputs': jax.random.normal(jax.random.key(0), (4, 5))}
    problem = training.distillation(network, network, objectives.jacobian(), optax.sgd(0.5))
    teacher = network.init(jax.random.key(1), batch['inputs'])
    teacher['params']['bias'] = jnp.arange(3.0)
    state = problem.init(jax.random.key(2), batch)
    for _ in range(40):
        state, measured = problem.step(state, teacher, batch)
    np.testing.assert_allclose(state.params['kernel'], teacher['params']['kernel'], atol=1e-5)
    np.testing.assert_array_equal(state.params['bias'], np.zeros(3))
    assert metrics.compute(measured)['jacobian'] < 1e-9


def features(**arrays):
    return Outputs(jnp.zeros((4, CLASSES)), {name.replace('__', '/'): jnp.ones(shape) for name, shape in arrays.items()})


@pytest.mark.parametrize(
    'objective, student, teacher, message',
    [
        (objectives.jacobian(), features(), features(jacobian=(4, 3, 5)), "^jacobian: the student gives no feature 'jacobian'"),
        (objectives.jacobian(), features(jacobian=(4, 3, 5)), features(), "^jacobian: the teacher gives no feature 'jacobian'"),
        (
            objectives.jacobian(),
            features(jacobian=(4, 2, 5)),
            features(jacobian=(4, 3, 5)),
            r'^jacobian: student \(4, 2, 5\) and teacher \(4, 3, 5\) must have the same shape',
        ),
        (
            objectives.loss_gradient_attention('layer', 'layer'),
            features(layer=(4, 2, 2, 5)),
            features(layer=(4, 2, 2, 5), layer__class_gradients=(4, 3, 5)),
            "^loss_gradient_attention: the student gives no feature 'layer/class_gradients'",
        ),
        (
            objectives.loss_gradient_attention('layer', 'other'),
            features(layer=(4, 2, 2, 5), layer__class_gradients=(4, 3, 5)),
            features(layer=(4, 2, 2, 5), layer__class_gradients=(4, 3, 5)),
            "^loss_gradient_attention: the teacher gives no feature 'other",
        ),
    ],
)
def test_what_is_not_tapped_or_does_not_fit_is_a_one_line_error_at_init(objective, student, teacher, message):
    with pytest.raises(ValueError, match=message) as error:
        objective.init(jax.random.key(0), student, teacher, {})
    assert '\n' not in str(error.value)


@functools.cache
def pair():
    """Student and teacher with their inputs, those of the teacher larger; layers of 2 x 3 and 4 x 6 positions."""
    result = []
    for i, (channels, scale) in enumerate([(2, 1), (5, 2)]):
        network = networks.from_linen(Images(channels), features='layer', class_gradients='layer')
        inputs = jax.random.normal(jax.random.key(i), (4, 2 * scale, 3 * scale, 1))
        result.append((network, jax.jit(network.init)(jax.random.key(i), inputs), inputs))
    return result


def test_loss_gradient_attention_is_the_loss_of_hand_made_heads():
    """Value and gradient with respect to all of the student's parameters, for the class that the teacher finds likeliest."""
    (student, params, inputs), (teacher, teacher_params, teacher_inputs) = pair()
    reference = jax.jit(teacher.apply)(teacher_params, teacher_inputs)[0]
    labels = jnp.argmax(reference.logits, axis=-1)
    assert len(set(labels.tolist())) > 1

    def tapped(params):
        outputs = student.apply(params, inputs)[0]
        return apply(objectives.loss_gradient_attention('layer', 'layer'), outputs, reference, {'mask': MASK})

    def by_hand(params):
        layer = nn.Conv(2, (2, 2)).apply({'params': params['params']['layer']}, inputs)
        layers, gradients = (layer, reference.features['layer']), []
        for features, p in zip(layers, (params, teacher_params), strict=True):
            head = lambda x, label, p=p: Head().apply({'params': p['params']['head']}, x[None])[0, label]  # noqa: E731
            gradients.append(jax.vmap(jax.grad(head))(features, labels).mean(axis=(1, 2)))
        return jnp.mean(losses.loss_gradient_attention(*layers, *gradients), where=MASK)

    got, expected = (jax.jit(jax.value_and_grad(function))(params) for function in (tapped, by_hand))
    close(got, expected)
    assert np.any(got[1]['params']['layer']['kernel'] != 0)
    assert np.any(got[1]['params']['head']['out']['kernel'] != 0)


def test_a_student_learns_where_the_teacher_looks():
    student, params, inputs = pair()[0]
    teacher_params = jax.jit(student.init)(jax.random.key(7), inputs)
    objective = objectives.loss_gradient_attention('layer', 'layer')
    problem = training.distillation(student, student, objective, optax.adam(0.03))
    batch = {'inputs': inputs}
    train = jax.jit(lambda state: jax.lax.scan(lambda state, _: problem.step(state, teacher_params, batch), state, length=150))
    _, measured = train(problem.init(jax.random.key(0), batch, student_variables=params))
    values = measured['loss'].total
    assert values[-1] < 0.3 * values[0]
