"""A small run with a checkpoint after each epoch, as a program that tests can kill: `python interrupted.py FOLDER STEP`.

Whatever the speed of the machine it does not end before that: from STEP on it waits for a file `signalled` in the folder.
"""

import pathlib
import sys
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from kdjax import metrics, networks, objectives, training

EPOCHS = 60
STEPS = 4
network = networks.from_linen(nn.Sequential([nn.Dense(8), nn.Dropout(0.1, deterministic=False), nn.Dense(3)]))
problem = training.distillation(
    network, None, objectives.hard_labels(), optax.sgd(optax.cosine_decay_schedule(0.1, EPOCHS * STEPS), 0.9)
)
rng = np.random.default_rng(0)
data = {'inputs': rng.normal(size=(35, 5)).astype(np.float32), 'labels': rng.integers(0, 3, 35).astype(np.int32)}


def noise(key, x):
    """Augmentation."""
    return x + 0.1 * jax.random.normal(key, x.shape)


def validate(variables):
    """How small the weights are: something that differs from epoch to epoch."""
    return {'accuracy': metrics.Average(-sum(jnp.sum(jnp.abs(x)) for x in jax.tree.leaves(variables)), 1.0)}


def fit(folder=None, epochs=EPOCHS, **more):
    """Trains, or goes on to train."""
    if folder is not None:
        more = {'directory': pathlib.Path(folder) / 'checkpoints', 'log': pathlib.Path(folder) / 'log.jsonl', **more}
    arguments = {'key': jax.random.key(0), 'batch_size': 8, 'augment': noise, 'validate': validate, 'progress': False, **more}
    return training.fit(problem, arguments.pop('data', data), epochs=epochs, **arguments)


if __name__ == '__main__':
    import conftest  # noqa: F401 - the settings of JAX under which the tests run

    folder, last = pathlib.Path(sys.argv[1]), int(sys.argv[2])

    def wait(record):
        """For the signal."""
        while record['step'] >= last and not (folder / 'signalled').exists():
            time.sleep(0.002)

    fit(folder, on_record=wait)
