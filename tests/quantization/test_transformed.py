"""Fake-quantized networks go through every transformation that networks go through, from Linen and NNX."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers.model_checks import filled

from kdjax import metrics, networks, objectives, parallel, quantization, training
from kdjax.networks import Network
from kdjax.quantization import Rule

IMAGES = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 6, 6, 2)), jnp.float32)


class Convolutional(nnx.Module):
    """The convolution and head of `LINEN`, with their names."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv, self.norm, self.head = (
            nnx.Conv(2, 4, (3, 3), rngs=rngs),
            nnx.BatchNorm(4, momentum=0.9, rngs=rngs),
            nnx.Linear(4, 3, rngs=rngs),
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


class LinenConvolutional(nn.Module):
    """The same in Linen."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Conv(4, (3, 3), name='conv')(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name='norm')(x))
        return nn.Dense(3, name='head')(x.mean((1, 2)))


LINEN = networks.from_linen(LinenConvolutional())


def test_linen_and_nnx_agree_in_outputs_and_state() -> None:
    variables = quantization.calibrate(LINEN, Rule(), filled(LinenConvolutional(), IMAGES[0]), IMAGES)
    results = [
        jax.jit(quantization.fake_quantize_network(network, Rule()).apply, static_argnames='train')(
            variables, IMAGES[0], train=True
        )
        for network in (LINEN, networks.from_nnx(Convolutional))
    ]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), *results)
    assert sorted(results[0][1]) == ['batch_stats', 'quantization']


@pytest.fixture(scope='module')
def student() -> tuple[Network, dict[str, Any], Callable[..., Any]]:
    """A quantized network, its variables, and a training step of plain gradient descent."""
    network = quantization.fake_quantize_network(LINEN, Rule())
    variables = quantization.calibrate(LINEN, Rule(), filled(LinenConvolutional(), IMAGES[0]), [IMAGES[0]])

    def step(variables: Any, inputs: jax.Array, network: Network = network) -> tuple[Any, jax.Array]:
        def loss(params: Any) -> Any:
            outputs, state = network.apply({**variables, 'params': params}, inputs, train=True)
            return jnp.mean(outputs.logits**2), state

        (value, state), gradient = jax.value_and_grad(loss, has_aux=True)(variables['params'])
        return {'params': jax.tree.map(lambda p, g: p - 0.1 * g, variables['params'], gradient), **state}, value

    return network, variables, step


def assert_close(one: Any, other: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), one, other)


def test_training_steps_scan_rematerialize_and_map(student: Any) -> None:
    network, variables, step = student
    batches, once = jnp.stack([IMAGES[0], IMAGES[1], IMAGES[0]]), jax.jit(step)
    looped, losses = variables, []
    for batch in batches:
        looped, loss = once(looped, batch)
        losses.append(loss)
    assert losses[2] < losses[0]
    scanned = jax.jit(lambda variables, batches: jax.lax.scan(step, variables, batches))(variables, batches)
    assert_close(scanned, (looped, jnp.stack(losses)))
    rematerialized = Network(
        network.init, lambda v, x, train: jax.checkpoint(lambda v, x: network.apply(v, x, train=train))(v, x)
    )
    assert_close(jax.jit(lambda v, x: step(v, x, rematerialized))(variables, IMAGES[0]), once(variables, IMAGES[0]))
    mapped = jax.jit(jax.vmap(step))(jax.tree.map(lambda x: jnp.stack([x, x]), variables), IMAGES)
    for i in range(2):
        assert_close(jax.tree.map(lambda x, i=i: x[i], mapped), once(variables, IMAGES[i]))


def test_eight_devices_equal_one(student: Any) -> None:
    _, variables, step = student
    batch, mesh = {'inputs': IMAGES.reshape(8, 6, 6, 2)}, parallel.data_parallel()
    sharded = jax.jit(step)(parallel.replicate(mesh, variables), parallel.shard_batch(mesh, batch)['inputs'])
    assert_close(sharded, jax.jit(step)(variables, batch['inputs']))


def test_sweeps_train_the_students_that_train_alone(student: Any) -> None:
    network, variables, _ = student
    batch = {'inputs': IMAGES[0], 'labels': jnp.arange(4) % 3}

    def problem(rate: Any) -> training.Problem:
        return training.distillation(network, None, objectives.hard_labels(), optax.sgd(rate))

    rates = jnp.array([0.5, 0.1])
    students = training.sweep(problem, rates)
    both = jax.tree.map(lambda x: jnp.stack([x, x]), variables)
    state, measured = students.step(students.init(jax.random.key(0), batch, student_variables=both), {'params': {}}, batch)
    alone, loss = problem(rates[1]).step(
        problem(rates[1]).init(jax.random.key(0), batch, student_variables=variables), {'params': {}}, batch
    )
    assert_close(jax.tree.map(lambda x: x[1], (state.params, state.model_state)), (alone.params, alone.model_state))
    np.testing.assert_allclose(metrics.divide(measured['loss'])[1], metrics.divide(loss['loss']), rtol=1e-5)
