"""Every recipe makes an objective that trains a pair of networks."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import architectures
from kdjax import recipes, training
from kdjax.recipes import RECIPES, TRANSFORMER_RECIPES

BATCH = 8


class Stage(nn.Module):
    """Half the size."""

    width: int

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(self.width, (3, 3), (2, 2))(x)
        return nn.relu(nn.BatchNorm(use_running_average=not train, name='norm')(x))


class Stages(nn.Module):
    """Two stages and a head."""

    width: int
    classes: int

    @nn.compact
    def __call__(self, x, train=False):
        x = Stage(self.width, name='stage1')(x, train)
        x = Stage(2 * self.width, name='stage2')(x, train)
        return nn.Dense(self.classes)(x.mean((1, 2)))


def convolutional(width):
    stages = ('stage1', 'stage2')
    return architectures.Architecture(
        lambda classes: Stages(width, classes), stages, tuple(f'{stage}/norm' for stage in stages)
    )


def train(recipe, name, student, teacher, steps=4):
    rng = np.random.default_rng(0)
    batch = {
        'inputs': jnp.asarray(rng.normal(size=(BATCH, 8, 8, 1)), jnp.float32),
        'labels': jnp.asarray(rng.integers(0, 3, BATCH), jnp.int32),
        'index': jnp.arange(BATCH),
    }
    networks = [architectures.network(x, 3, recipe=name) for x in (student, teacher)]
    labels = np.asarray(batch['labels'])
    pair = recipes.pair(*networks, batch['inputs'], steps_per_epoch=2, epochs=2, labels=labels)
    assert (pair.student, pair.teacher) == (student.stages, teacher.stages)
    assert (pair.student_norms, pair.teacher_norms) == (student.norms, teacher.norms)
    problem = training.distillation(*networks, recipe(pair), optax.sgd(1e-3))
    state = problem.init(jax.random.key(0), batch)
    teacher_variables = networks[1].init(jax.random.key(1), batch['inputs'])
    before = jax.device_get(state)
    for _ in range(steps):
        state, metrics = problem.step(state, teacher_variables, batch)
    return before, jax.device_get(state), jax.device_get(metrics)


def check(before, after, metrics):
    for metric in jax.tree.leaves(metrics):
        assert np.isfinite(metric)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((after.params, after.objective_params)))
    # Everything that the student and the connectors train moves.
    still = [
        path
        for (path, x), y in zip(
            jax.tree_util.tree_leaves_with_path((before.params, before.objective_params)),
            jax.tree.leaves((after.params, after.objective_params)),
            strict=True,
        )
        if np.array_equal(x, y)
    ]
    assert not still


@pytest.mark.parametrize('name', RECIPES)
def test_recipes_train_student_and_connectors(name):
    check(*train(RECIPES[name], name, convolutional(2), convolutional(3)))


@pytest.mark.parametrize('name', sorted(set(TRANSFORMER_RECIPES) - set(RECIPES)))
def test_transformer_recipes_train_student_and_connectors(name):
    check(*train(TRANSFORMER_RECIPES[name], name, architectures.transformer(1, 4, 2), architectures.transformer(2, 8, 2)))
