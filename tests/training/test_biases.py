"""The best shift of a class's logit, against trying every one."""

import numpy as np
import pytest

from kdjax.training import best_class_shift


def right(logits, labels, label, shift):
    shifted = logits.copy()
    shifted[:, label] += shift
    return int(np.sum(shifted.argmax(axis=1) == labels))


@pytest.mark.parametrize('seed', range(20))
def test_no_other_shift_is_better(seed):
    rng = np.random.default_rng(seed)
    label = int(rng.integers(4))
    labels = rng.integers(4, size=30)
    # Whole numbers make ties; the class of the seed is far too unlikely, or likely.
    logits = rng.integers(-5, 6, (30, 4)) + 3.0 * np.eye(4)[labels]
    logits[:, label] += rng.choice([-8.0, 0.0, 8.0])
    shift = best_class_shift(logits, labels, label)
    assert right(logits, labels, label, shift) == max(right(logits, labels, label, x) for x in np.arange(-40.25, 40.25, 0.5))
    assert best_class_shift(logits + 100.0, labels, label) == pytest.approx(shift)


def test_nothing_is_shifted_without_need():
    logits = np.array([[2.0, 0.0, 1.0], [0.0, 2.0, 1.0], [5.0, 0.0, 9.0]])
    assert best_class_shift(logits, np.array([0, 1, 2]), 2) == 0.0
    assert best_class_shift(logits, np.array([0, 1, 0]), 2) == pytest.approx(-5.0)


def test_examples_without_a_label_do_not_count():
    logits = np.array([[2.0, 0.0], [3.0, 0.0], [1.0, 0.0], [9.0, 0.0]])
    assert best_class_shift(logits, np.array([1, 0, 1, -1]), 1) == best_class_shift(logits[:3], np.array([1, 0, 1]), 1)


@pytest.mark.parametrize(
    'logits,labels,label,message',
    [
        (np.zeros((3, 2)), np.zeros(4, int), 0, 'logits must be'),
        (np.zeros(3), np.zeros(3, int), 0, 'logits must be'),
        (np.zeros((3, 2)), np.zeros(3, int), 2, 'label must be one of at least two classes, got 2 of 2'),
        (np.zeros((3, 1)), np.zeros(3, int), 0, 'label must be one of at least two classes, got 0 of 1'),
        (np.zeros((3, 2)), np.full(3, -1), 0, 'no example with a label'),
    ],
)
def test_bad_arguments_are_refused(logits, labels, label, message):
    with pytest.raises(ValueError, match=message):
        best_class_shift(logits, labels, label)
