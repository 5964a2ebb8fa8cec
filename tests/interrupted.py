"""A small run with a checkpoint after each epoch, as a program that tests can kill: `python interrupted.py FOLDER`."""

import pathlib
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from kdjax import metrics, networks, objectives, training

EPOCHS = 60
STEPS = 4
network = networks.from_linen(nn.Sequential([nn.Dense(8), nn.Dropout(0.1, deterministic=False), nn.Dense(3)]))
problem = training.supervised(
    network, objectives.hard_labels(), optax.sgd(optax.cosine_decay_schedule(0.1, EPOCHS * STEPS), 0.9)
)
rng = np.random.default_rng(0)
data = {'inputs': rng.normal(size=(35, 5)).astype(np.float32), 'labels': rng.integers(0, 3, 35).astype(np.int32)}
epoch = training.in_memory_epoch(problem, batch_size=8, augment=lambda key, x: x + 0.1 * jax.random.normal(key, x.shape))


def validate(variables):
    """How small the weights are: something that differs from epoch to epoch."""
    return {'accuracy': metrics.Average(-sum(jnp.sum(jnp.abs(x)) for x in jax.tree.leaves(variables)), 1.0)}


def fit(folder=None, run=epoch, epochs=EPOCHS, **more):
    """Trains, or goes on to train."""
    if folder is not None:
        more = {'directory': pathlib.Path(folder) / 'checkpoints', 'log': pathlib.Path(folder) / 'log.jsonl', **more}
    start = problem.init(jax.random.key(0), data)
    return training.fit(run, start, None, data, epochs=epochs, validate=validate, progress=False, **more)


if __name__ == '__main__':
    import conftest  # noqa: F401 - the settings of JAX under which the tests run

    fit(sys.argv[1])
