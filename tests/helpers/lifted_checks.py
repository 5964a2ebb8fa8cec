"""What the tests of lifted objectives share: outputs of a pair, values and gradients."""

import functools

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from helpers.objective_checks import abstract_init, random_params
from kdjax import parallel
from kdjax.networks import Outputs

BATCH, CLASSES = 8, 5
LABELS = np.array([0, 4, -1, 2, 1, -1, 3, 3], np.int32)
MASK = np.array([True, True, True, False, True, False, False, True])
KEY = jax.random.key(0)


def outputs():
    """What student and teacher give: logits, and images of 3 and of 6 channels."""
    rng = np.random.default_rng(0)

    def side(name, channels):
        logits, image = rng.normal(size=(BATCH, CLASSES)), rng.normal(size=(BATCH, 4, 4, channels))
        return Outputs(logits.astype(np.float32), {name: image.astype(np.float32)})

    return side('s', 3), side('t', 6)


def init(objective, student, teacher, batch):
    """Random parameters and the state, from shapes alone."""
    return random_params(objective, student, teacher, batch), abstract_init(objective, student, teacher, batch)[1]


def value_and_gradients(*arguments, step=0):
    """Loss, metrics, and the gradients with respect to parameters, student and teacher, as numpy arrays."""
    return jax.device_get(jitted(*arguments, step))


@functools.partial(jax.jit, static_argnames='objective')
def jitted(objective, params, state, student, teacher, batch, step):
    """`value_and_gradients` on the device."""

    def loss(params, student, teacher):
        value, metrics, _ = objective.apply(params, state, student, teacher, batch, step=step)
        return value, metrics

    (value, metrics), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(params, student, teacher)
    return value, metrics, gradients


def sharded(*trees):
    """Every device holds one example."""
    return jax.device_put(trees, NamedSharding(parallel.data_parallel(), PartitionSpec('data')))
