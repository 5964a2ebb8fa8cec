"""The cross-entropy with labels: missing labels, smoothing, sequences and extremes."""

import numpy as np
from lifted_checks import CLASSES, LABELS, outputs, value_and_gradients

from kdjax import objectives
from kdjax.networks import Outputs


def hard_labels_oracle(logits, labels, smoothing=0.0):
    """-Σ_c target log p over labelled rows, in float64, target = (1 - ε)·onehot + ε / C; their mean."""
    logits = logits.astype(np.float64)
    log_p = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
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
    p = np.exp(student.logits) / np.sum(np.exp(student.logits), axis=1, keepdims=True)
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
