"""What the tests of linear heads share."""

import jax
import numpy as np


def assert_close(results, expected, tolerance=1e-5):
    """Two trees agree, each array by its own size."""
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(results), jax.tree.leaves(expected), strict=True):
        scale = max(1.0, float(np.abs(y).max()))
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * scale, err_msg=str(path))
