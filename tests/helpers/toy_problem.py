"""A small distillation problem that the training tests share."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from kdjax import networks, objectives, training


class Block(nn.Module):
    """Convolution, batch norm and ReLU."""

    width: int

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(self.width, (3, 3), use_bias=False)(x)
        return nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))


class SmallNetwork(nn.Module):
    """One block, dropout and a head: everything that training treats differently."""

    width: int

    @nn.compact
    def __call__(self, x, train=False):
        x = Block(self.width, name='block')(x, train)
        x = nn.Dropout(0.1, deterministic=not train)(x)
        return nn.Dense(3, name='head')(x.mean((1, 2)))


SILENT = networks.Network(lambda key, inputs: {}, lambda variables, inputs, **more: (networks.Outputs(None), {}))
"""A network without logits, features or variables."""


class Problem(NamedTuple):
    """A pair, what it learns, and data for it."""

    student: networks.Network
    teacher: networks.Network
    distillation: training.Problem
    teacher_variables: dict
    data: dict

    def start(self, seed=0):
        """A fresh state."""
        return self.distillation.init(jax.random.key(seed), {name: x[:16] for name, x in self.data.items()})


def make(dropout=True, optimizer=None, examples=72):
    """Images of three classes that differ in brightness, with a connector and a relational term in the objective."""
    student = networks.from_linen(SmallNetwork(4), features='block')
    teacher = networks.from_linen(SmallNetwork(6), features='block')
    objective = objectives.combine(
        hard=0.5 * objectives.hard_labels(),
        soft=optax.linear_schedule(1.0, 0.1, 20) * objectives.soft_targets(temperature=2.0),
        hint=objectives.hint('block', 'block', normalize=True),
        similarity=10.0 * objectives.similarity_preserving('block', 'block'),
    )
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, examples).astype(np.int32)
    data = {
        'inputs': (rng.normal(size=(examples, 4, 4, 1)) + labels[:, None, None, None]).astype(np.float32),
        'labels': labels,
    }
    distillation = training.distillation(student, teacher, objective, optimizer or optax.adam(1e-2))
    return Problem(student, teacher, distillation, teacher.init(jax.random.key(9), jnp.asarray(data['inputs'][:1])), data)


def spoilt_from(step):
    """A term that is NaN from a step on, whatever the batch."""
    return objectives.from_function(
        'spoilt',
        lambda student, teacher, batch, at: jnp.mean(student.logits) * at,
        at=lambda now: jnp.where(now < step, 1.0, jnp.nan),
    )
