"""What kdjax means by a batch, or a data set: a dictionary of arrays with one number of examples."""

from typing import Any

import jax

Batch = dict[str, Any]
"""`{'inputs': ..., 'labels': ..., 'mask': ...}`. Labels are integers, negative for an example without a label; `mask` is
true for the examples that count. Both are optional."""


def check_batch(batch: Batch) -> None:
    """Raises unless the batch is a dictionary of arrays with one number of examples, `'inputs'` among them.

    >>> check_batch({'labels': 3})
    Traceback (most recent call last):
    ...
    ValueError: a batch is a dictionary with 'inputs' and perhaps 'labels' and 'mask', got labels
    """
    if not isinstance(batch, dict) or 'inputs' not in batch:
        found = ', '.join(sorted(batch)) if isinstance(batch, dict) else type(batch).__name__
        raise ValueError(f"a batch is a dictionary with 'inputs' and perhaps 'labels' and 'mask', got {found}")
    sizes = {name: jax.tree.leaves(value)[0].shape[:1] for name, value in batch.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f'the arrays of a batch must have the same number of examples, got {sizes}')
