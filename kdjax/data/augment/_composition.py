"""What an augmentation is, and several in turn."""

from collections.abc import Callable
from typing import Any

import jax

Augment = Callable[[jax.Array, Any], Any]
"""`augment(key, input) -> input`, a pure function of a key and one example, such as an image."""


def chain(*augments: Augment) -> Augment:
    """Applies several in turn, each with a key of its own.

    >>> import jax, jax.numpy as jnp
    >>> from kdjax.data.augment import random_crop, random_flip
    >>> chain(random_crop(padding=1), random_flip())(jax.random.key(0), jnp.ones((4, 4, 1))).shape
    (4, 4, 1)
    """

    def augment(key: jax.Array, image: Any) -> Any:
        for i, function in enumerate(augments):
            image = function(jax.random.fold_in(key, i), image)
        return image

    return augment
