"""Tests for losses of one's own: the checks and the inputs that kdjax's own losses are tested with.

    def test_my_loss():
        student, teacher = np.random.default_rng(0).normal(size=(2, 8, 10))
        kdjax.testing.check_loss(my_loss, student, teacher)

`check_loss` runs all that apply. Single ones are for losses that promise less, and the strategies `logits`, `labels` and
`masks` are for properties of your own, with hypothesis. All raise an AssertionError that says which promise was not kept.
"""

from kdjax.testing._check_loss import check_loss
from kdjax.testing._checks import (
    Loss,
    check_axis,
    check_extremes,
    check_gradient,
    check_precision,
    check_transformations,
    check_where,
)
from kdjax.testing._strategies import labels, logits, masks

__all__ = [
    'Loss',
    'check_axis',
    'check_extremes',
    'check_gradient',
    'check_loss',
    'check_precision',
    'check_transformations',
    'check_where',
    'labels',
    'logits',
    'masks',
]
