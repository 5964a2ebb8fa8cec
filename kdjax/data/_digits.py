"""The data set that comes with scikit-learn: 1797 handwritten digits of 8x8 pixels."""

import numpy as np

from kdjax.batches import Batch
from kdjax.dependencies import needed_for

_TEST_EXAMPLES = 360


def read_digits() -> tuple[Batch, Batch]:
    """Returns the training and the test split, 1437 and 360 examples; there is no official split, so this one is fixed here.

    Raises:
      ModuleNotFoundError: scikit-learn is not installed.
    """
    with needed_for('the data set of digits'):  # an extra
        from sklearn.datasets import load_digits
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    data = {
        # Pixels are 0 to 16.
        'inputs': np.round(images[order].reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8),
        'labels': labels[order].astype(np.int32),
    }
    return (
        {key: array[_TEST_EXAMPLES:] for key, array in data.items()},
        {key: array[:_TEST_EXAMPLES] for key, array in data.items()},
    )
