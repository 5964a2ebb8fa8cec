"""Objectives between the members of one ensemble: the same as training each with the others as teachers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdjax import networks, objectives, training


@pytest.fixture(scope='module')
def pair():
    """Two networks of different widths, their variables, and a batch."""
    members = [
        networks.from_linen(nn.Sequential([nn.Dense(width), nn.relu, nn.Dense(3)]), features='layers_0') for width in (4, 6)
    ]
    inputs = jax.random.normal(jax.random.key(2), (8, 5))
    batch = {'inputs': inputs, 'labels': jnp.arange(8, dtype=jnp.int32) % 3}
    return members, [member.init(jax.random.key(i), inputs) for i, member in enumerate(members)], batch


def together(pair, objective):
    """The members' variables after one step of the ensemble, and the metrics."""
    members, variables, batch = pair
    ensemble = networks.ensemble([networks.tap_logits(member) for member in members])
    problem = training.distillation(ensemble, None, objective, optax.sgd(0.5))
    joined = networks.ensemble_variables(variables)
    state, metrics = problem.step(problem.init(jax.random.key(3), batch, student_variables=joined), {}, batch)
    return [networks.member_variables(state.variables, i) for i in range(2)], metrics


def apart(pair, i, objective):
    """A member's variables after one step with the other as a teacher that does not learn."""
    members, variables, batch = pair
    problem = training.distillation(members[i], members[1 - i], objective, optax.sgd(0.5))
    state = problem.init(jax.random.key(3), batch, student_variables=variables[i])
    return problem.step(state, variables[1 - i], batch)[0].variables


def close(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one, other)


def test_a_step_of_mutual_learning_is_one_of_each_with_the_other_as_teacher(pair):
    learned, metrics = together(pair, objectives.mutual_learning(2, temperature=2.0))
    for i in range(2):
        close(learned[i], apart(pair, i, objectives.hard_labels() + objectives.soft_targets(temperature=2.0)))
    divergences = [float(metrics[f'soft_targets_of_{i}_from_{1 - i}'].total) for i in range(2)]
    assert min(divergences) > 0
    assert divergences[0] != divergences[1]


def test_a_teacher_that_learns_jointly_learns_from_its_own_terms_alone(pair):
    labels, soft = objectives.hard_labels(), objectives.soft_targets(temperature=2.0)
    three_terms = objectives.of_member(labels, 0) + objectives.of_member(labels, 1) + objectives.of_member(soft, 1, teacher=0)
    learned, _ = together(pair, three_terms)
    close(learned[0], apart(pair, 0, labels))
    close(learned[1], apart(pair, 1, labels + soft))


def test_members_learn_from_features_too(pair):
    hint = objectives.of_member(objectives.hint('layers_0', 'layers_0'), 0, teacher=1)
    learned, metrics = together(pair, hint)
    assert metrics['hint_of_0_from_1'].total > 0
    _, variables, _ = pair
    assert np.any(learned[0]['params']['layers_0']['kernel'] != variables[0]['params']['layers_0']['kernel'])
    np.testing.assert_array_equal(learned[0]['params']['layers_2']['kernel'], variables[0]['params']['layers_2']['kernel'])
    jax.tree.map(np.testing.assert_array_equal, learned[1], variables[1])


def test_weights_of_three_students_are_shared_among_the_others():
    objective = objectives.mutual_learning(3)
    weights = [term.weights for term in objective.terms if term.name.startswith('soft')]
    assert weights == [(0.5,)] * 6


def test_members_that_are_not_there_are_errors(pair):
    with pytest.raises(ValueError, match="the student gives no feature '2/logits'"):
        together(pair, objectives.of_member(objectives.hard_labels(), 2))
    with pytest.raises(ValueError, match='there must be at least 2 members, got 1'):
        objectives.mutual_learning(1)
