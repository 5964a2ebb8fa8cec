"""Objectives for several labels at a time and for numbers: means over what counts, one output, schedules, errors."""

import numpy as np
import pytest
from helpers.lifted_checks import value_and_gradients
from helpers.objective_checks import init_error

from kdjax import losses, objectives
from kdjax.networks import Outputs

BATCH, LENGTH, CLASSES = 6, 3, 4
RNG = np.random.default_rng(0)
STUDENT, TEACHER, NUMBERS = RNG.normal(size=(3, BATCH, LENGTH, CLASSES)).astype(np.float32)
LABELS = RNG.integers(-1, 2, (BATCH, LENGTH, CLASSES)).astype(np.int32)
LABELS[1] = -1
MASK = np.array([[True, True, False]] * BATCH) & (np.arange(BATCH) != 2)[:, None]
CLASS_WEIGHTS = np.array([1, 0, 2, 0.5], np.float32)


def binary_labels(student, teacher, labels):
    return losses.binary_labels(student, labels, class_weights=CLASS_WEIGHTS[: student.shape[-1]])


CASES = {
    'binary_labels': (objectives.binary_labels(class_weights=CLASS_WEIGHTS), binary_labels, LABELS),
    'binary_soft_targets': (
        objectives.binary_soft_targets(temperature=lambda step: 2.0 + step),
        lambda s, t, y: losses.binary_soft_targets(s, t, temperature=3.0),
        NUMBERS,
    ),
    'regression': (objectives.regression(), lambda s, t, y: losses.regression(s, y), NUMBERS),
    'huber': (
        objectives.combine(huber=objectives.regression(delta=lambda step: 0.3 * step)),
        lambda s, t, y: losses.regression(s, y, delta=0.3),
        NUMBERS,
    ),
    'bounded_regression': (
        objectives.bounded_regression(margin=0.5),
        lambda s, t, y: losses.bounded_regression(s, t, y, margin=0.5),
        NUMBERS,
    ),
}
every_case = pytest.mark.parametrize('name', list(CASES))


def run(objective, student, teacher, batch):
    """The loss, its count and the student's gradient in step 1."""
    outputs, (name,) = (Outputs(student), Outputs(teacher)), objective.names
    value, metrics, gradients = value_and_gradients(objective, {name: {}}, {name: {}}, *outputs, batch, step=1)
    assert not np.any(gradients[2].logits), 'the teacher is not trained'
    return value, metrics[name].count, gradients[1].logits


@every_case
def test_the_mean_is_over_the_positions_of_which_a_label_counts(name):
    """Of tokens under a mask, with NaN where it does not count; examples of which no label is known do not count either."""
    objective, loss, labels = CASES[name]
    hidden = ~MASK[..., None]
    arrays = [np.where(hidden, np.float32(np.nan), x) for x in (STUDENT, TEACHER)]
    filled = np.where(hidden, 7 if labels is LABELS else np.nan, labels).astype(labels.dtype)
    value, count, gradient = run(objective, *arrays, {'labels': filled, 'mask': MASK})
    counted = MASK & np.any((labels >= 0) & (CLASS_WEIGHTS > 0), axis=-1) if name == 'binary_labels' else MASK
    assert 0 < count == np.sum(counted)
    np.testing.assert_allclose(value, np.mean(loss(STUDENT, TEACHER, labels)[counted]), rtol=1e-5)
    np.testing.assert_array_equal(np.any(gradient != 0, axis=-1) & ~counted, False)
    assert np.all(np.isfinite(gradient))


@every_case
def test_a_mask_of_the_labels_leaves_single_ones_out(name):
    """As slicing them away would: here all but the last class, and all of the first example."""
    objective, loss, labels = CASES[name]
    mask = np.ones((BATCH, CLASSES), bool) & (np.arange(CLASSES) < CLASSES - 1) & (np.arange(BATCH) > 0)[:, None]
    student, teacher, labels = (x[:, 0] for x in (STUDENT, TEACHER, np.abs(labels)))
    value, count, gradient = run(objective, student, teacher, {'labels': labels, 'mask': mask})
    sliced = [x[1:, :-1] for x in (student, teacher, labels)]
    assert count == BATCH - 1
    np.testing.assert_allclose(value, np.mean(loss(*sliced)), rtol=1e-5)
    np.testing.assert_array_equal(gradient[~mask], 0)


@pytest.mark.parametrize('name', [name for name in CASES if name != 'binary_soft_targets'])
def test_labels_of_one_output_may_leave_out_its_axis(name):
    objective, _, labels = CASES[name]
    if name == 'binary_labels':
        objective = objectives.binary_labels()
    arrays, labels = [x[:, 0, :1] for x in (STUDENT, TEACHER)], np.abs(labels[:, 0, 0])
    short = run(objective, *arrays, {'labels': labels})
    whole = run(objective, *arrays, {'labels': labels[:, None]})
    for one, other in zip(short, whole, strict=True):
        np.testing.assert_array_equal(one, other)
    assert short[1] == BATCH
    assert np.any(short[2])


@pytest.mark.parametrize('dtype', ['bool', 'float32'])
def test_binary_labels_are_yes_or_no_or_between(dtype):
    labels = np.array(np.clip(NUMBERS[:, 0], 0, 1), dtype)
    value, count, _ = run(objectives.binary_labels(), STUDENT[:, 0], None, {'labels': labels})
    assert count == BATCH
    np.testing.assert_allclose(value, np.mean(losses.binary_labels(STUDENT[:, 0], labels)), rtol=1e-5)


@pytest.mark.parametrize('name', ['binary_labels', 'regression', 'bounded_regression'])
def test_labels_and_weights_that_do_not_fit_are_named(name):
    objective, outputs = CASES[name][0], (Outputs(STUDENT), Outputs(TEACHER))
    for labels in (NUMBERS[..., :1], NUMBERS[..., 0], NUMBERS[:, 0]):
        message = init_error(objective, *outputs, {'labels': labels})
        assert str(labels.shape) in message
        assert str(STUDENT.shape) in message
    message = init_error(objective, *outputs, {'labels': NUMBERS, 'weights': np.ones(NUMBERS.shape, np.float32)})
    assert message.startswith(f"{name}: batch['weights'] must be of examples or positions, (6, 3), got (6, 3, 4)")
    message = init_error(objective, *(Outputs(x.logits[:, 0, 0]) for x in outputs), {'labels': NUMBERS[:, 0, 0]})
    assert message == f'{name}: logits must be [batch, ..., outputs], got (6,)'
    assert "needs batch['labels']" in init_error(objective, *outputs, {})


def test_binary_labels_that_are_wrong_are_found_where_values_are_at_hand():
    """In all the data, which has more examples than a batch; what the mask leaves out may be anything."""
    objective, outputs = objectives.binary_labels(), (Outputs(STUDENT[:2]), Outputs(None))
    labels = LABELS.copy()
    objective.check(*outputs, {'labels': labels})
    labels[4, 1, 3] = 2
    with pytest.raises(ValueError, match=r'^binary_labels: labels must be 0 or 1, .* got 2$'):
        objective.check(*outputs, {'labels': labels, 'mask': MASK})
    objective.check(*outputs, {'labels': labels, 'mask': MASK & (np.arange(BATCH) != 4)[:, None]})
