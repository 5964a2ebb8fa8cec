"""Names for the leaves of a pytree, and patterns that pick leaves by name.

A path is the keys from root to leaf joined by slashes: `'stage1/block0/conv/kernel'`. A pattern is a shell pattern over the
whole path, where `*` also crosses slashes: `'*/kernel'`, `'stage1/*'`.
"""

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

Leaves = str | Sequence[str] | Callable[[str, jax.Array], bool]
"""Which arrays: patterns over their paths, or a predicate of path and array."""

_VECTORS = ('b', 'offset', 'beta', 'gamma', 'mean', 'var')


def path_of(keys: tuple[Any, ...]) -> str:
    """Joins a key path of `jax.tree_util`; the trailing `value` of an NNX variable is dropped, so Linen and NNX trees agree."""
    path = jax.tree_util.keystr(keys, simple=True, separator='/')
    return path.removesuffix('/value')


def leaves_with_paths(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by path, in the tree's order.

    >>> leaves_with_paths({'dense': {'kernel': 1, 'bias': 2}})
    {'dense/bias': 2, 'dense/kernel': 1}
    """
    return {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def map_with_paths(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Maps `function(path, leaf, *leaves of rest)` over a tree.

    >>> map_with_paths(lambda path, leaf: f'{path}={leaf}', {'a': 1})
    {'a': 'a=1'}
    """
    return jax.tree_util.tree_map_with_path(lambda keys, *leaves: function(path_of(keys), *leaves), tree, *rest)


def matching(patterns: Iterable[str], paths: Iterable[str]) -> set[str]:
    """Returns the paths that at least one pattern matches.

    Raises:
      ValueError: a pattern matches nothing; the message lists the paths.

    >>> sorted(matching(['*/kernel'], ['dense/kernel', 'dense/bias']))
    ['dense/kernel']
    """
    paths, matched = list(paths), set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = {path for path in paths if fnmatch.fnmatchcase(path, pattern)}
        if not found:
            raise ValueError(f'the pattern {pattern!r} matches no path; there are: {", ".join(paths)}')
        matched |= found
    return matched


def kernels(path: str, leaf: jax.Array) -> bool:
    """The arrays that are pruned and quantized unless said otherwise: those of two or more axes that no name says are vectors.

    Biases and scales of scanned layers have two axes, and so have the biases of attention, [heads, head_dim]. So what is named
    `b`, `offset`, `beta`, `gamma`, `mean` or `var`, or `...bias` or `...scale`, as in Flax and Haiku, is left alone. Tables of
    embeddings are picked: they are gathered, but often most of a network, and the head's kernel where they are tied.
    `pruning.product_kernels` asks the network rather than the names.

    >>> import jax.numpy as jnp
    >>> [kernels(path, jnp.ones((3, 4))) for path in ('layers/dense/kernel', 'layers/dense/bias', 'tokens/embedding')]
    [True, False, True]
    """
    name = path.rpartition('/')[2]
    return leaf.ndim >= 2 and name not in _VECTORS and not name.endswith(('bias', 'scale'))


def select(leaves: Leaves, tree: Any) -> dict[str, jax.Array]:
    """Picks arrays of a tree by pattern or predicate.

    Raises:
      ValueError: nothing is picked, or a pattern matches nothing.

    >>> import jax.numpy as jnp
    >>> sorted(select(kernels, {'dense': {'kernel': jnp.ones((2, 3)), 'bias': jnp.ones(3)}}))
    ['dense/kernel']
    """
    named = leaves_with_paths(tree)
    if not callable(leaves):
        matching(leaves, named)
    chosen = {path: leaf for path, leaf in named.items() if picks(leaves, path, leaf)}
    if callable(leaves) and not chosen:
        raise ValueError(f'the predicate picks no array; there are: {", ".join(named)}')
    return chosen


def picks(leaves: Leaves, path: str, leaf: Any) -> bool:
    """Whether patterns or a predicate pick an array.

    >>> picks('dense/*', 'dense/kernel', None), picks('dense', 'dense/kernel', None)
    (True, False)
    """
    if callable(leaves):
        return leaves(path, leaf)
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in ([leaves] if isinstance(leaves, str) else leaves))
