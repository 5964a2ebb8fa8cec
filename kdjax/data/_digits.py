"""The data set that comes with scikit-learn: 1797 handwritten digits of 8x8 pixels."""

import numpy as np

from kdjax.data._arrays import of_arrays
from kdjax.data._splits import Found
from kdjax.dependencies import needed_for

_TEST_EXAMPLES = 360


def read_digits() -> Found:
    """Returns 1437 training and 360 test examples; there is no official split, so this one is fixed here.

    Raises:
      ModuleNotFoundError: scikit-learn is not installed.
    """
    with needed_for('the data set of digits'):  # an extra
        from sklearn.datasets import load_digits
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    # Pixels are 0 to 16.
    pixels = np.round(images[order].reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    numbers = np.asarray(labels)[order].astype(np.int32)
    train, test = (of_arrays(pixels[part], numbers[part]) for part in (slice(_TEST_EXAMPLES, None), slice(_TEST_EXAMPLES)))
    return Found(tuple(map(str, range(10))), {'train': train, 'test': test}, stratified=False)
