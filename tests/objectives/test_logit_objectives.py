"""Objectives on logits that are kept, tapped, renormalised or standardized, against their losses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.objective_checks import arrays, compile_quickly, init_error

from kdjax import losses, objectives
from kdjax.networks import Outputs

BATCH, CLASSES = 6, 5
MASK = np.array([True, False, True, True, False, True])
LABELS = np.array([0, 4, -1, 2, 1, 3], np.int32)
DRAWN = arrays({'student': (BATCH, CLASSES), 'teacher': (BATCH, CLASSES), 'known': (BATCH, 3)})
STUDENT, TEACHER = Outputs(DRAWN['student']), Outputs(DRAWN['teacher'])


@functools.partial(compile_quickly, static_argnames='objective')
def run(objective, student, teacher, batch):
    """Metrics, and the gradients of the loss with respect to both networks' outputs, at step 2."""
    empty = {name: {} for name in objective.names}

    def loss(student, teacher):
        value, metrics, _ = objective.apply(empty, empty, student, teacher, batch, step=2)
        return value, metrics

    gradients, metrics = jax.grad(loss, argnums=(0, 1), has_aux=True)(student, teacher)
    return metrics, gradients


def value_and_gradient(objective, student=STUDENT, teacher=TEACHER, batch=None):
    """Loss, gradient of the student's outputs, and metrics."""
    metrics, (gradient, teacher_gradient) = jax.device_get(run(objective, student, teacher, batch or {}))
    for leaf in jax.tree.leaves(teacher_gradient):
        np.testing.assert_array_equal(leaf, np.zeros_like(leaf))
    return metrics['loss'].total, gradient, metrics


def check(objective, loss, *arguments, batch=None, student=STUDENT, teacher=TEACHER):
    """The objective is the mean of the loss on the student's logits, in value and gradient."""
    value, gradient, _ = value_and_gradient(objective, student, teacher, batch)
    expected = jax.value_and_grad(lambda logits: jnp.mean(loss(logits, *arguments)))
    expected, expected_gradient = compile_quickly(expected)(student.logits)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient.logits, expected_gradient, rtol=1e-5, atol=1e-6)


def test_standardized_logits_go_into_whatever_objective():
    def loss(logits):
        student, teacher = losses.standardize_logits(logits), losses.standardize_logits(TEACHER.logits)
        return losses.soft_targets(student, teacher, temperature=2.0) + 0.5 * losses.logit_mse(student, teacher)

    inner = 2.0 * objectives.soft_targets(temperature=2.0) + optax.linear_schedule(0.0, 1.0, 2) * objectives.logit_mse()
    objective = objectives.standardize_logits(0.5 * inner)
    assert objective.names == ('soft_targets', 'logit_mse')
    check(objective, loss)
    # Any scale and offset of either network's logits is as good.
    moved = value_and_gradient(objective, Outputs(3.0 * STUDENT.logits + 1.0), Outputs(7.0 * TEACHER.logits - 2.0))[0]
    np.testing.assert_allclose(moved, value_and_gradient(objective)[0], rtol=1e-5)
    assert init_error(objective, STUDENT, Outputs(None), {}) == (
        'soft_targets needs the logits of a teacher, and there are none'
    )


def test_top_k_targets_need_no_teacher():
    kept = losses.top_k_logits(TEACHER.logits, 2, temperature=3.0)
    batch = dict(zip(('top_logits', 'top_indices', 'rest'), kept, strict=True))
    objective = objectives.top_k_soft_targets(temperature=3.0)
    check(
        objective,
        lambda logits: losses.top_k_soft_targets(logits, *kept, temperature=3.0),
        batch=batch,
        teacher=Outputs(None),
    )
    for name in batch:
        rest = {other: x for other, x in batch.items() if other != name}
        message = init_error(objective, STUDENT, Outputs(None), rest)
        assert message == f"top_k_soft_targets needs batch['{name}']; the batch has {', '.join(sorted(rest))}"


def test_a_teacher_of_some_classes():
    classes, teacher = [4, 0, 2], Outputs(DRAWN['known'])
    check(
        objectives.subset_soft_targets(classes, temperature=3.0),
        lambda logits: losses.soft_targets(logits[:, jnp.array(classes)], teacher.logits, temperature=3.0),
        teacher=teacher,
    )


TERMS = {
    'hard_targets': (objectives.hard_targets(), losses.hard_targets),
    'dist': (objectives.dist(beta=2.0, gamma=0.5), functools.partial(losses.dist, beta=2.0, gamma=0.5)),
    'reverse_kl': (objectives.reverse_kl(temperature=2.0), functools.partial(losses.reverse_kl, temperature=2.0)),
    'jensen_shannon': (objectives.jensen_shannon(beta=0.3), functools.partial(losses.jensen_shannon, beta=0.3)),
    'skewed_kl': (objectives.skewed_kl(alpha=0.3), functools.partial(losses.skewed_kl, alpha=0.3)),
    'skewed_reverse_kl': (objectives.skewed_reverse_kl(alpha=0.3), functools.partial(losses.skewed_reverse_kl, alpha=0.3)),
    'total_variation': (objectives.total_variation(), losses.total_variation),
    'alpha_beta_divergence': (
        objectives.alpha_beta_divergence(alpha=0.3, beta=0.5),
        functools.partial(losses.alpha_beta_divergence, alpha=0.3, beta=0.5),
    ),
    'adaptive_kl': (objectives.adaptive_kl(mu=0.8), functools.partial(losses.adaptive_kl, mu=0.8)),
    'taid': (objectives.taid(interpolation=0.3), functools.partial(losses.taid, interpolation=0.3)),
    'universal_logit': (
        objectives.universal_logit(temperature=2.0),
        functools.partial(losses.universal_logit, temperature=2.0),
    ),
}
LABELLED = {
    'normalized_kd': (objectives.normalized_kd(gamma=2.0), functools.partial(losses.normalized_kd, gamma=2.0)),
    'weighted_soft_labels': (objectives.weighted_soft_labels(), losses.weighted_soft_labels),
}


def test_masks_and_missing_labels_equal_slicing():
    """Every value, and the gradient of their sum."""
    objective = objectives.combine(**{name: made for name, (made, _) in (TERMS | LABELLED).items()})
    batch, labelled = {'mask': MASK, 'labels': LABELS}, MASK & (LABELS >= 0)

    def by_hand(logits):
        values = {name: loss(logits[MASK], TEACHER.logits[MASK]) for name, (_, loss) in TERMS.items()}
        for name, (_, loss) in LABELLED.items():
            values[name] = loss(logits[labelled], TEACHER.logits[labelled], LABELS[labelled])
        means = {name: jnp.mean(value) for name, value in values.items()}
        return sum(means.values()), means

    _, gradient, metrics = value_and_gradient(objective, batch=batch)
    expected_gradient, expected = compile_quickly(jax.grad(by_hand, has_aux=True))(STUDENT.logits)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name].total / metrics[name].count, value, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(gradient.logits, expected_gradient, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(gradient.logits[~MASK], np.zeros((2, CLASSES)))
    _, gradient, metrics = value_and_gradient(objective, batch={**batch, 'mask': np.zeros(BATCH, bool)})
    assert all(metric.total == 0 for metric in metrics.values())
    np.testing.assert_array_equal(gradient.logits, np.zeros((BATCH, CLASSES)))


@pytest.mark.parametrize('name', [*TERMS, *LABELLED])
def test_what_is_missing_is_named(name):
    objective = (TERMS | LABELLED)[name][0]
    message = init_error(objective, Outputs(None), TEACHER, {'labels': LABELS})
    assert message == f'{name} needs the logits of a student, and there are none'
    if name in LABELLED:
        assert init_error(objective, STUDENT, TEACHER, {'mask': MASK}) == f"{name} needs batch['labels']; the batch has mask"


@pytest.mark.parametrize(
    'name', ['soft_targets', 'hard_targets', 'dist', 'reverse_kl', 'jensen_shannon', 'skewed_kl', 'diversity', *LABELLED]
)
def test_a_softmax_over_one_logit_is_refused(name):
    """It is 1 whatever the network says, and nothing would be learnt."""
    one = Outputs(np.ones((BATCH, 1), np.float32))
    message = init_error(getattr(objectives, name)(), one, one, {'labels': np.zeros(BATCH, np.int32)})
    assert message.startswith(f'{name} compares classes, and logits (6, 1) have 1: take binary_labels for one yes or no')


def test_one_logit_may_be_regressed_to():
    one, other = Outputs(np.ones((BATCH, 1), np.float32)), Outputs(np.zeros((BATCH, 1), np.float32))
    state = {'logit_mse': {}}
    assert objectives.logit_mse().apply(state, state, one, other, {}, step=0)[0] == 1


def test_the_share_of_the_teacher_rises_in_a_line_and_faster_while_the_loss_falls():
    """The paper's rule, followed by hand; the loss of a step is that of the share before it."""
    steps, begin, rate, momentum = 8, 0.2, 0.5, 0.6
    objective = objectives.adaptive_taid(steps, begin=begin, end=0.9, rate=rate, momentum=momentum)
    _, state = objective.init(jax.random.key(0), STUDENT, TEACHER, {})
    share, moved, last = begin, 0.0, None
    apply = jax.jit(lambda state, student, step: objective.apply({'taid': {}}, state, student, TEACHER, {}, step=step))
    for step in range(steps):
        # A student that comes nearer, and then goes away again.
        near = 0.15 * step if step < 5 else 0.2
        student = Outputs((1 - near) * STUDENT.logits + near * TEACHER.logits)
        value, metrics, state = apply(state, student, jnp.int32(step))
        expected = np.mean(losses.taid(student.logits, TEACHER.logits, interpolation=np.float32(share)))
        np.testing.assert_allclose(value, expected, rtol=1e-4)
        np.testing.assert_allclose(metrics['taid/interpolation'].total, share, rtol=1e-5)
        progress, gained = (step + 1) / steps, 0.0
        if last is not None:
            moved = momentum * moved + (1 - momentum) * (last - expected) / last
            gained = rate / (1 + np.exp(-moved)) * (1 - progress)
        share, last = min(max(begin + (0.9 - begin) * progress, share + gained), 0.9), expected
        np.testing.assert_allclose(state['taid']['interpolation'], share, rtol=1e-4)
    assert share == pytest.approx(0.9)
    with pytest.raises(ValueError, match=r'^adaptive_taid: steps must be at least 1'):
        objectives.adaptive_taid(0)
