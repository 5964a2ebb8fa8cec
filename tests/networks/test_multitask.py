"""Networks of several tasks, against their members one by one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.oracles import kl, log_softmax
from helpers.toy_problem import SILENT, SmallNetwork

from kdjax import networks, objectives, training


class Two(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(x.mean((1, 2)))


def test_tasks_are_the_members_side_by_side(key):
    members = [networks.from_linen(SmallNetwork(4), features='block'), networks.from_linen(Two())]
    inputs = jax.random.normal(key, (6, 4, 4, 1))
    own = [member.init(jax.random.fold_in(key, i), inputs) for i, member in enumerate(members)]
    joined = networks.multitask(members)
    outputs, state = joined.apply(networks.ensemble_variables(own), inputs)
    alone = [member.apply(variables, inputs)[0] for member, variables in zip(members, own, strict=True)]
    assert outputs.logits.shape == (6, 2, 3)
    np.testing.assert_array_equal(outputs.logits[:, 0], alone[0].logits)
    np.testing.assert_array_equal(outputs.logits[:, 1, :2], alone[1].logits)
    assert np.isneginf(outputs.logits[:, 1, 2]).all()
    np.testing.assert_array_equal(outputs.features['0/block'], alone[0].features['block'])
    assert jax.tree.structure(state) == jax.tree.structure({'batch_stats': {'0': own[0]['batch_stats']}})
    made = joined.init(key, inputs)
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, networks.ensemble_variables(own))
    first = networks.postprocess(joined, lambda logits: logits[:, 0])
    np.testing.assert_array_equal(first.apply(made, inputs)[0].logits, joined.apply(made, inputs)[0].logits[:, 0])


def test_a_student_learns_every_task_from_its_own_teacher_and_its_own_labels(key):
    inputs = jax.random.normal(key, (8, 4, 4, 1))
    teacher = networks.multitask([networks.from_linen(Two()), networks.from_linen(nn.Sequential([Two(), nn.Dense(3)]))])
    student = networks.postprocess(
        networks.from_linen(nn.Sequential([lambda x: x.mean((1, 2)), nn.Dense(6)])), lambda logits: logits.reshape(-1, 2, 3)
    )
    objective = 0.5 * objectives.hard_labels() + 0.5 * objectives.soft_targets(temperature=2.0)
    problem = training.distillation(student, teacher, objective, optax.sgd(0.1))
    labels = jnp.stack([jnp.arange(8) % 2, jnp.full(8, -1)], axis=1)
    teacher_variables = teacher.init(key, inputs)
    batch = {'inputs': inputs, 'labels': labels}
    state = problem.init(key, batch)
    logits = np.asarray(student.apply(state.variables, inputs)[0].logits, np.float64)
    taught = np.asarray(teacher.apply(teacher_variables, inputs)[0].logits, np.float64)
    state, metrics = problem.step(state, teacher_variables, batch)

    cross_entropy = -np.take_along_axis(log_softmax(logits)[:, 0], np.asarray(labels[:, :1]), 1).mean()
    divergences = []
    for task, classes in enumerate((2, 3)):
        log_q = log_softmax(logits[:, task], 2)[:, :classes]
        divergences.append(4 * kl(log_softmax(taught[:, task, :classes], 2), log_q).mean())
    np.testing.assert_allclose(metrics['hard_labels'].total / metrics['hard_labels'].count, cross_entropy, rtol=1e-5)
    np.testing.assert_allclose(metrics['soft_targets'].total / metrics['soft_targets'].count, np.mean(divergences), rtol=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_members_without_logits_of_a_task_are_refused(key):
    with pytest.raises(ValueError, match='multitask: there must be at least one member'):
        networks.multitask([])
    with pytest.raises(ValueError, match=r'multitask: member 1 must give logits \[batch, classes\], got None'):
        networks.multitask([networks.from_linen(Two()), SILENT]).apply(
            {'params': {'0': networks.from_linen(Two()).init(key, jnp.ones((2, 4, 4, 1)))['params']}}, jnp.ones((2, 4, 4, 1))
        )
