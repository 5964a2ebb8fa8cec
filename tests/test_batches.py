"""What counts in a batch, and by how much."""

import numpy as np
import pytest

from kdjax import batches

MASK = np.array([[True, True, False], [False, False, False], [True, False, False]])
WEIGHTS = np.array([[0.5, 2.0, 9.0], [1.0, 1.0, 1.0], [0.0, 3.0, 0.0]], np.float32)


def counts(shape, **batch):
    """What counts, broadcast to values of a shape."""
    where = batches.counts(batch, shape)
    assert where.ndim == len(shape)
    return np.broadcast_to(where, shape)


def test_everything_counts_where_nothing_says_otherwise():
    assert batches.counts({'labels': np.zeros(3)}, (3,)) is None
    assert batches.weights_of({'mask': MASK}, (3, 3)) is None
    assert batches.counted_examples({}) is None


def test_values_of_more_axes_count_by_position_and_of_fewer_if_any_position_does():
    np.testing.assert_array_equal(counts((3, 3, 2), mask=MASK), np.repeat(MASK[..., None], 2, 2))
    np.testing.assert_array_equal(counts((3,), mask=MASK), [True, False, True])
    np.testing.assert_array_equal(counts((3, 2), mask=MASK[:, 0]), np.repeat(MASK[:, :1], 2, 1))


def test_a_position_counts_by_mask_and_weight_at_once():
    """The last example's mask leaves only a position of weight 0."""
    both = MASK & (WEIGHTS != 0)
    np.testing.assert_array_equal(counts((3, 3), mask=MASK, weights=WEIGHTS), both)
    np.testing.assert_array_equal(counts((3,), mask=MASK, weights=WEIGHTS), [True, False, False])
    np.testing.assert_array_equal(batches.counted_examples({'mask': MASK, 'weights': WEIGHTS}), [True, False, False])
    np.testing.assert_array_equal(counts((3,), mask=MASK[:, 0], weights=WEIGHTS), [True, False, True])
    np.testing.assert_array_equal(counts((3,), mask=MASK, weights=WEIGHTS[:, 0]), [True, False, False])


def test_an_example_weighs_what_its_heaviest_position_does():
    np.testing.assert_array_equal(batches.weights_of({'weights': WEIGHTS}, (3,)), [9.0, 1.0, 3.0])
    np.testing.assert_array_equal(batches.weights_of({'weights': WEIGHTS, 'mask': MASK}, (3,)), [2.0, 0.0, 0.0])
    np.testing.assert_array_equal(batches.weights_of({'weights': WEIGHTS[:, 0]}, (3, 2)), WEIGHTS[:, :1])


@pytest.mark.parametrize(
    'batch, told',
    [
        ({'mask': np.ones(3, np.int32)}, r"batch\['mask'\] must be boolean, .* got int32 \(3,\)"),
        ({'mask': np.ones((3, 2), bool)}, r"batch\['mask'\] must be boolean, .* shape \(3, 3\), got bool \(3, 2\)"),
        ({'mask': np.ones((), bool)}, r"batch\['mask'\] must be boolean, .*"),
        ({'weights': np.ones(3, np.int32)}, r"batch\['weights'\] must be floating point, .* got int32 \(3,\)"),
        ({'mask': MASK[..., None], 'weights': WEIGHTS[..., None].repeat(2, 2)}, r"batch\['mask'\] \(3, 3, 1\) and .*"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(batch, told):
    with pytest.raises(ValueError, match=rf'^{told}$'):
        batches.counts(batch, (3, 3))


def test_weights_under_another_name_are_refused():
    inputs = np.zeros(3)
    batches.check_batch({'inputs': inputs, 'weight': inputs, 'weights': inputs})
    with pytest.raises(ValueError, match=r"^a batch has its weights under 'weights', [^\n]+$"):
        batches.check_batch({'inputs': inputs, 'weight': inputs})
