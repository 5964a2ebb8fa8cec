"""The cross-entropy with labels: missing labels, smoothing, sequences and extremes."""

import jax
import numpy as np
import pytest
from helpers.lifted_checks import CLASSES, LABELS, outputs, value_and_gradients
from helpers.objective_checks import init_error
from helpers.oracles import log_softmax, softmax

from kdjax import objectives
from kdjax.networks import Outputs


def hard_labels_oracle(logits, labels, smoothing=0.0):
    """-Σ_c target log p over labelled rows, in float64, target = (1 - ε)·onehot + ε / C; their mean."""
    log_p = log_softmax(logits)
    targets = (1 - smoothing) * np.eye(logits.shape[-1])[labels] + smoothing / logits.shape[-1]
    return np.mean(-np.sum(targets * log_p, axis=-1)[labels >= 0])


def hard_labels_value(objective, logits, labels, batch=None, step=0):
    """Loss and gradient."""
    state = {'hard_labels': {}}
    value, metrics, gradients = value_and_gradients(
        objective, state, state, Outputs(logits), Outputs(None), {'labels': labels, **(batch or {})}, step=step
    )
    return value, metrics, gradients[1].logits


def test_hard_labels_is_cross_entropy_over_the_labelled_examples():
    student, _ = outputs()
    value, metrics, gradient = hard_labels_value(objectives.hard_labels(), student.logits, LABELS)
    np.testing.assert_allclose(value, hard_labels_oracle(student.logits, LABELS), rtol=1e-5)
    assert metrics['hard_labels'].count == 6
    p = softmax(student.logits)
    expected = (LABELS >= 0)[:, None] * (p - np.eye(CLASSES)[LABELS]) / 6
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)


def test_label_smoothing_spreads_the_target_and_may_be_scheduled():
    student, _ = outputs()
    objective = objectives.hard_labels(label_smoothing=lambda step: 0.1 * step)
    for step in range(3):
        value, metrics, _ = hard_labels_value(objective, student.logits, LABELS, step=step)
        np.testing.assert_allclose(value, hard_labels_oracle(student.logits, LABELS, 0.1 * step), rtol=1e-5)
        np.testing.assert_allclose(metrics['hard_labels/label_smoothing'].total, 0.1 * step, rtol=1e-6)
    value, metrics, _ = hard_labels_value(objectives.hard_labels(label_smoothing=0.3), student.logits, LABELS)
    np.testing.assert_allclose(value, hard_labels_oracle(student.logits, LABELS, 0.3), rtol=1e-5)
    assert 'hard_labels/label_smoothing' not in metrics


def test_hard_labels_of_sequences_count_labelled_tokens():
    """[batch, length, classes], with padding at -1 and one sequence masked out."""
    logits = np.random.default_rng(1).normal(size=(3, 4, CLASSES)).astype(np.float32)
    labels = np.array([[0, 1, 2, -1], [3, -1, -1, -1], [4, 4, 0, 1]], np.int32)
    mask = np.array([True, True, False])
    value, metrics, gradient = hard_labels_value(objectives.hard_labels(), logits, labels, {'mask': mask})
    np.testing.assert_allclose(value, hard_labels_oracle(logits[:2].reshape(8, -1), labels[:2].reshape(8)), rtol=1e-5)
    assert metrics['hard_labels'].count == 4
    counted = (labels >= 0) & mask[:, None]
    np.testing.assert_array_equal(np.any(gradient != 0, axis=-1), counted)


def test_hard_labels_are_finite_for_logits_of_minus_infinity():
    """A class that is not the label is as good as sliced away; the label costs 1e30; rows that do not count may be anything."""
    logits = np.array([[1, -np.inf, 2], [1e4, -1e4, -np.inf], [-np.inf, -np.inf, -np.inf]], np.float32)
    value, _, gradient = hard_labels_value(objectives.hard_labels(), logits, np.array([0, 1, -1], np.int32))
    np.testing.assert_allclose(value, (np.log1p(np.e) + 2e4) / 2, rtol=1e-6)
    softmax = np.exp([-1.0, 0.0]) / np.sum(np.exp([-1.0, 0.0]))
    expected = np.array([[softmax[0] - 1, 0, softmax[1]], [1, -1, 0], [0, 0, 0]]) / 2
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)
    for labels in ([1, 2, -1], [1, 2, 0]):
        for objective in (objectives.hard_labels(), objectives.hard_labels(label_smoothing=0.1)):
            value, _, gradient = hard_labels_value(objective, logits, np.array(labels, np.int32))
            np.testing.assert_array_less(1e29, value)
            assert np.isfinite(value)
            assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize('labels, mask', [([-1, 1], None), ([0, 1], np.array([False, True]))])
def test_the_gradient_is_finite_where_a_row_that_does_not_count_is_all_minus_infinity(labels, mask):
    logits = np.array([[-np.inf, -np.inf], [0.0, 1.0]], np.float32)
    batch = {} if mask is None else {'mask': mask}
    _, _, gradient = hard_labels_value(objectives.hard_labels(), logits, np.array(labels, np.int32), batch)
    assert np.all(np.isfinite(gradient))


def test_a_label_that_is_ruled_out_costs_a_finite_number_with_smoothing_or_without():
    logits = np.array([[-np.inf, 0.0], [0.0, 1.0]], np.float32)
    for labels, options in (([0, 1], {}), ([1, 1], {'label_smoothing': 0.1})):
        value, _, gradient = hard_labels_value(objectives.hard_labels(**options), logits, np.array(labels, np.int32))
        assert np.isfinite(value)
        assert np.all(np.isfinite(gradient))


def test_masks_of_another_batch_or_dtype_are_refused():
    for mask in (np.ones(1, bool), np.ones(3, bool), np.ones(2, np.int32)):
        with pytest.raises(ValueError, match='mask'):
            hard_labels_value(
                objectives.hard_labels(), np.zeros((2, 3), np.float32), np.array([0, 1], np.int32), {'mask': mask}
            )


def dense(seed=2):
    """Logits [2, 4, 5] and labels of which some are 255."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(2, 4, CLASSES)).astype(np.float32)
    labels = np.array([[0, 255, 255, 4], [255, 2, 255, 255]], np.int32)
    return logits, labels


def test_a_label_of_255_does_not_count_once_it_is_ignored():
    """As where it is negative; left as it is, it would be a class that nothing predicts, of a loss of 0."""
    logits, labels = dense()
    value, metrics, gradient = hard_labels_value(objectives.hard_labels(ignore=255), logits, labels)
    kept = labels != 255
    np.testing.assert_allclose(value, hard_labels_oracle(logits[kept], labels[kept]), rtol=1e-5)
    assert metrics['hard_labels'].count == 3
    np.testing.assert_array_equal(np.any(gradient != 0, axis=-1), kept)
    for name in ('decoupled_kd', 'normalized_kd', 'weighted_soft_labels'):
        make, state = getattr(objectives, name), {name: {}}
        teacher = Outputs(logits[::-1])
        ignored = value_and_gradients(make(ignore=255), state, state, Outputs(logits), teacher, {'labels': labels})
        missing = value_and_gradients(make(), state, state, Outputs(logits), teacher, {'labels': np.where(kept, labels, -1)})
        for x, y in zip(jax.tree.leaves(ignored), jax.tree.leaves(missing), strict=True):
            np.testing.assert_array_equal(x, y)


def test_class_weights_multiply_the_values_and_what_they_are_divided_by():
    student, _ = outputs()
    weights = np.array([1.0, 0.0, 2.0, 0.5, 3.0])
    log_p = log_softmax(student.logits)
    rows = np.flatnonzero(LABELS >= 0)
    own = np.abs(np.random.default_rng(3).normal(size=len(LABELS))).astype(np.float32)
    for batch, factors in (({}, weights[LABELS[rows]]), ({'weights': own}, weights[LABELS[rows]] * own[rows])):
        value, metrics, _ = hard_labels_value(objectives.hard_labels(class_weights=weights), student.logits, LABELS, batch)
        np.testing.assert_allclose(value, -np.sum(factors * log_p[rows, LABELS[rows]]) / np.sum(factors), rtol=1e-5)
        np.testing.assert_allclose(metrics['hard_labels'].count, np.sum(factors), rtol=1e-6)


LABELLED = {
    'hard_labels': objectives.hard_labels(),
    'decoupled_kd': objectives.decoupled_kd(),
    'normalized_kd': objectives.normalized_kd(),
    'weighted_soft_labels': objectives.weighted_soft_labels(),
    'mixed_labels': objectives.mixed_labels(),
}


@pytest.mark.parametrize('name', list(LABELLED))
def test_a_label_beyond_the_classes_is_an_error_or_nan_and_never_a_number(name):
    """For example, labels from 1 to the number of classes. Behind a mask it may be anything."""
    logits, labels = dense()
    labels = np.where(labels == 255, 1, labels)
    objective, state = LABELLED[name], {name: {}}
    batch = {'labels': labels, 'other_labels': labels, 'share': np.full(labels.shape, 0.5, np.float32)}
    wrong = {**batch, 'labels': labels + 1}
    told = rf"^{name}: batch\['labels'\] must be below 5, or negative where there is none, got 5 \(1 such\)$"
    arguments = state, state, Outputs(logits), Outputs(logits[::-1])
    with pytest.raises(ValueError, match=told):
        objective.apply(*arguments, wrong, step=0)
    shapes = [Outputs(jax.ShapeDtypeStruct((9, 4, CLASSES), np.float32))] * 2
    objective.check(*shapes, batch)
    for each in (
        objective,
        objectives.in_stages([objective, objectives.logit_mse()], [3]),
        objectives.constraint(2.0 * objective, 0.1),
        objectives.combine(a=objectives.logit_mse(), b=objective),
        objectives.standardize_logits(objective),
    ):
        with pytest.raises(ValueError, match=told):
            each.check(*shapes, wrong)
    with pytest.raises(ValueError, match=told):
        objectives.from_recorded_logits(objective).check(*shapes, {**wrong, 'teacher_logits': logits})
    member = Outputs(None, {'0/logits': shapes[0].logits, '1/logits': shapes[0].logits})
    with pytest.raises(ValueError, match='must be below 5'):
        objectives.of_member(objective, 1).check(member, shapes[1], wrong)

    traced = value_and_gradients(objective, *arguments, wrong)
    assert np.isnan(traced[0])
    hidden = labels + 1 < 5
    value, _, gradients = value_and_gradients(objective, *arguments, {**wrong, 'mask': hidden})
    assert np.isfinite(value)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradients))
    objective.check(*shapes, {**wrong, 'mask': hidden})


@pytest.mark.parametrize('name', list(LABELLED))
def test_labels_that_are_no_integers_and_logits_of_one_class_are_refused(name):
    logits, labels = dense()
    batch = {'labels': labels, 'other_labels': labels, 'share': np.ones(labels.shape, np.float32)}
    message = init_error(LABELLED[name], Outputs(logits), Outputs(logits), {**batch, 'labels': labels.astype(np.float32)})
    assert message == f"{name}: batch['labels'] must be integers from 0, got float32"
    message = init_error(LABELLED[name], Outputs(logits[..., :1]), Outputs(logits[..., :1]), batch)
    assert message == (
        f'{name} compares classes, and logits (2, 4, 1) have 1: take binary_labels for one yes or no, regression for a number'
    )
