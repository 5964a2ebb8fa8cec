"""Half precision and rematerialisation: the same network, computed otherwise."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import toy_problem

from kdjax import models, networks, objectives, training

IMAGES = jax.random.normal(jax.random.key(0), (8, 8, 8, 3))
PLAIN = networks.from_linen(models.ResNet(8, widths=(4, 4, 8, 8)), features='stage3')


@pytest.fixture(scope='module')
def variables():
    return PLAIN.init(jax.random.key(1), IMAGES)


def test_products_are_in_half_precision_and_everything_that_leaves_is_not(variables):
    network = networks.mixed_precision(PLAIN)
    outputs, state = jax.jit(lambda v, x: network.apply(v, x, train=True))(variables, IMAGES)
    text = str(jax.make_jaxpr(lambda v, x: network.apply(v, x, train=True)[0].logits)(variables, IMAGES))
    convolutions = [line for line in text.splitlines() if 'conv_general_dilated[' in line or 'dot_general[' in line]
    assert convolutions
    assert all(':bf16[' in line for line in convolutions)
    assert {x.dtype for x in jax.tree.leaves((outputs, state))} == {jnp.dtype(jnp.float32)}


def test_half_precision_is_close_to_full_in_values_gradients_and_statistics():
    network = networks.from_linen(toy_problem.SmallNetwork(4))
    variables = network.init(jax.random.key(1), IMAGES)

    def run(network):
        def loss(params):
            outputs, state = network.apply({**variables, 'params': params}, IMAGES, train=True, rng=jax.random.key(2))
            return jnp.mean(jnp.square(outputs.logits - 1)), (outputs, state)

        return jax.jit(jax.grad(loss, has_aux=True))(variables['params'])

    wanted, got = run(network), run(networks.mixed_precision(network))
    for x, y in zip(jax.tree.leaves(wanted), jax.tree.leaves(got), strict=True):
        assert y.dtype == jnp.float32
        # bfloat16 has 8 bits of precision; a batch norm multiplies what is lost.
        assert np.linalg.norm(x - y) <= 0.05 * np.linalg.norm(x) + 1e-6
    assert not np.array_equal(wanted[1][0].logits, got[1][0].logits)


def test_integers_pass_and_integer_types_are_refused(variables):
    network = networks.mixed_precision(networks.preprocess(PLAIN, lambda x: x.astype(jnp.float32) / 255))
    assert network.apply(variables, jnp.zeros((2, 8, 8, 3), jnp.uint8))[0].logits.dtype == jnp.float32
    with pytest.raises(ValueError, match='mixed_precision: dtype must be floating point, such as bfloat16, got int8'):
        networks.mixed_precision(PLAIN, jnp.int8)


def test_a_student_distils_in_half_precision():
    problem = toy_problem.make()
    student, teacher = networks.mixed_precision(problem.student), networks.mixed_precision(problem.teacher)
    distillation = training.distillation(student, teacher, objectives.soft_targets(), optax.adam(1e-2))
    batch = {name: jnp.asarray(x[:16]) for name, x in problem.data.items()}
    state = distillation.init(jax.random.key(0), batch)
    losses = []
    for _ in range(20):
        state, metrics = distillation.step(state, problem.teacher_variables, batch)
        losses.append(float(metrics['loss'].total))
    assert losses[-1] < losses[0]
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.float32)}


def test_rematerialised_gradients_are_the_same_and_take_less_memory(variables):
    inputs = jnp.tile(IMAGES, (4, 1, 1, 1))

    def compiled(network):
        def loss(params):
            outputs, _ = network.apply({**variables, 'params': params}, inputs, train=True)
            return jnp.sum(jnp.square(outputs.logits))

        return jax.jit(jax.grad(loss)).lower(variables['params']).compile()

    plain, again = compiled(PLAIN), compiled(networks.rematerialize(PLAIN))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
        plain(variables['params']),
        again(variables['params']),
    )
    everything = compiled(networks.rematerialize(PLAIN, jax.checkpoint_policies.everything_saveable))
    text = [str(each.as_text()).count(' convolution(') for each in (plain, again, everything)]
    assert text[1] > text[0]
    assert text[2] == text[0]
