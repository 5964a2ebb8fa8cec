"""Names of leaves, and patterns that pick them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kdjax import networks, paths

TREE = {
    'stage1': {'conv': {'kernel': jnp.ones((3, 3, 2, 4)), 'bias': jnp.ones(4)}, 'norm': {'scale': jnp.ones(4)}},
    'head': {'kernel': jnp.ones((4, 5)), 'bias': jnp.ones(5)},
}
PATHS = ['head/bias', 'head/kernel', 'stage1/conv/bias', 'stage1/conv/kernel', 'stage1/norm/scale']


def test_paths_are_the_keys_from_the_root_in_the_order_of_the_tree() -> None:
    named = paths.leaves_with_paths(TREE)
    assert list(named) == PATHS
    assert all(got is leaf for got, leaf in zip(named.values(), jax.tree.leaves(TREE), strict=True))


def test_sequences_and_attributes_have_paths_too() -> None:
    tree = {'a': [1, (2, 3)], 'outputs': networks.Outputs(4, {'stage1': 5})}
    assert paths.leaves_with_paths(tree) == {
        'a/0': 1,
        'a/1/0': 2,
        'a/1/1': 3,
        'outputs/logits': 4,
        'outputs/features/stage1': 5,
    }


def test_nnx_variables_have_the_paths_of_linen_parameters() -> None:
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    params = nn.Dense(3).init(jax.random.key(0), jnp.ones((1, 2)))['params']
    assert list(paths.leaves_with_paths(state)) == list(paths.leaves_with_paths(params)) == ['bias', 'kernel']
    pure = nnx.to_pure_dict(state)
    assert list(paths.leaves_with_paths(pure)) == ['bias', 'kernel']


def test_only_a_trailing_value_is_dropped() -> None:
    tree = {'attention': {'value': {'kernel': 1}}, 'head': {'kernel': {'value': 2}}, 'key_value': 3}
    assert paths.leaves_with_paths(tree) == {'attention/value/kernel': 1, 'head/kernel': 2, 'key_value': 3}


def test_map_keeps_the_structure_and_passes_the_leaves_of_all_trees() -> None:
    doubled = jax.tree.map(lambda leaf: 2 * leaf, TREE)
    got = paths.map_with_paths(lambda path, a, b: (path, float(a.sum()), float(b.sum())), TREE, doubled)
    assert got['head']['kernel'] == ('head/kernel', 20.0, 40.0)
    assert got['stage1']['norm']['scale'] == ('stage1/norm/scale', 4.0, 8.0)
    assert jax.tree.structure(paths.map_with_paths(lambda path, leaf: leaf, TREE)) == jax.tree.structure(TREE)
    with pytest.raises(ValueError, match=r'mismatch|different|structure'):
        paths.map_with_paths(lambda path, a, b: a, TREE, {'head': 1})


@pytest.mark.parametrize(
    'patterns, matched',
    [
        ('*', PATHS),
        (['*/kernel'], ['head/kernel', 'stage1/conv/kernel']),
        (('stage1/*', 'head/bias'), ['head/bias', 'stage1/conv/bias', 'stage1/conv/kernel', 'stage1/norm/scale']),
        ('stage?/[cn]*', ['stage1/conv/bias', 'stage1/conv/kernel', 'stage1/norm/scale']),
        (iter(['head/kernel']), ['head/kernel']),
        ([], []),
    ],
)
def test_patterns_match_whole_paths_across_slashes(patterns, matched: list[str]) -> None:
    assert sorted(paths.matching(patterns, iter(PATHS))) == matched


@pytest.mark.parametrize('pattern', ['kernel', 'Head/*', '*/kernel/', 'conv', 'stage1', ''])
def test_a_pattern_that_matches_nothing_is_an_error_even_beside_one_that_does(pattern: str) -> None:
    with pytest.raises(ValueError, match='matches no path; there are: ') as error:
        paths.matching(['*/bias', pattern], PATHS)
    assert str(error.value) == f'the pattern {pattern!r} matches no path; there are: {", ".join(PATHS)}'


def test_kernels_are_the_arrays_of_two_or_more_axes() -> None:
    assert sorted(paths.select(paths.kernels, TREE)) == ['head/kernel', 'stage1/conv/kernel']


def test_select_returns_the_arrays_in_the_order_of_the_tree() -> None:
    chosen = paths.select(('stage1/*', 'head/*'), TREE)
    assert list(chosen) == PATHS
    assert chosen['head/kernel'] is TREE['head']['kernel']
    by_predicate = paths.select(lambda path, leaf: path.startswith('head') and leaf.ndim == 1, TREE)
    assert list(by_predicate) == ['head/bias']
    assert list(paths.select('head/kernel', TREE)) == ['head/kernel']


def test_select_works_on_shapes_alone() -> None:
    shapes = jax.eval_shape(lambda: TREE)
    np.testing.assert_equal(paths.select('*/kernel', shapes)['head/kernel'].shape, (4, 5))


def test_select_of_nothing_is_an_error_that_lists_the_paths() -> None:
    listed = ', '.join(PATHS)
    with pytest.raises(ValueError, match=f'^the predicate picks no array; there are: {listed}$'):
        paths.select(lambda path, leaf: False, TREE)
    with pytest.raises(ValueError, match=f"^the pattern 'conv' matches no path; there are: {listed}$"):
        paths.select('conv', TREE)
