"""Rules account for every array on both sides, and nothing takes memory before its time."""

import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kdjax.pretrained import Rule, from_state_dict, to_state_dict, transposed

SHAPES = {'params': {f'block{i}': {'kernel': jax.ShapeDtypeStruct((3, 2), jnp.float32)} for i in range(2)}}
RULES = [transposed('layers.{}.weight', 'params/block{}/kernel'), Rule('layers.{}.count', None)]


def theirs(**changed):
    arrays = {f'layers.{i}.weight': np.arange(6.0, dtype=np.float32).reshape(2, 3) + i for i in range(2)}
    return arrays | {'layers.0.count': np.array(3)} | changed


def test_arrays_are_renamed_transposed_and_left_out():
    variables = from_state_dict(theirs(), RULES, SHAPES)
    for i in range(2):
        np.testing.assert_array_equal(variables['params'][f'block{i}']['kernel'], np.arange(6).reshape(2, 3).T + i)
    assert jax.tree.structure(variables) == jax.tree.structure(SHAPES)


def test_transposed_arrays_are_views_until_they_are_cast():
    arrays = theirs()
    kernel = from_state_dict(arrays, RULES, SHAPES)['params']['block1']['kernel']
    assert np.shares_memory(kernel, arrays['layers.1.weight'])
    half = from_state_dict(arrays, RULES, SHAPES, dtype=jnp.bfloat16)['params']['block1']['kernel']
    assert half.dtype == jnp.bfloat16
    assert not np.shares_memory(half, arrays['layers.1.weight'])


def test_arrays_are_split_and_joined():
    fused = np.arange(12.0).reshape(6, 2)
    shapes = {name: jax.ShapeDtypeStruct((2, 2), jnp.float32) for name in 'qkv'}
    rules = [Rule('qkv', name, lambda x, i=i: x[2 * i : 2 * i + 2].T) for i, name in enumerate('qkv')]
    split = from_state_dict({'qkv': fused}, rules, shapes)
    for i, name in enumerate('qkv'):
        np.testing.assert_array_equal(split[name], fused[2 * i : 2 * i + 2].T)
    whole = {'all0': jax.ShapeDtypeStruct((4, 2), jnp.float32)}
    rule = Rule(('a.{}', 'b.{}'), 'all{}', lambda a, b: np.concatenate([a, b]))
    joined = from_state_dict({'a.0': fused[:1], 'b.0': fused[1:4]}, [rule], whole)
    np.testing.assert_array_equal(joined['all0'], fused[:4])
    with pytest.raises(ValueError, match=r'^from_state_dict: missing: a.0 with b.0; not used: a.0$'):
        from_state_dict({'a.0': fused[:1]}, [rule], whole)
    with pytest.raises(ValueError, match=r'the rule of all0 has no inverse'):
        to_state_dict(joined, [rule])


def test_the_way_back():
    variables = from_state_dict(theirs(), RULES, SHAPES)
    back = to_state_dict(variables, RULES)
    assert back.keys() == {'layers.0.weight', 'layers.1.weight'}
    for name, array in back.items():
        np.testing.assert_array_equal(array, theirs()[name])
    with pytest.raises(ValueError, match=r'^to_state_dict: no rule makes other; add one$'):
        to_state_dict({'other': np.ones(2)}, RULES)


@pytest.mark.parametrize(
    'arrays, said',
    [
        ({'layers.0.weight': np.ones((2, 3))}, 'missing: layers.1.weight'),
        (theirs(**{'layers.2.weight': np.ones((2, 3))}), 'not used: layers.2.weight'),
        (
            theirs(**{'layers.1.weight': np.ones((2, 3), np.int8)}),
            'of another kind: layers.1.weight is int8, and params/block1/kernel is float32',
        ),
        (theirs(extra=np.ones(1)), 'not used: extra'),
        (
            theirs(**{'layers.1.weight': np.ones((3, 2))}),
            'of another shape: layers.1.weight is (3, 2), which makes (2, 3), and params/block1/kernel is (3, 2)',
        ),
        (
            {'layers.0.weight': np.ones(6), 'layer.1.weight': np.ones((2, 3))},
            (
                'missing: layers.1.weight; not used: layer.1.weight; '
                'of another shape: layers.0.weight is (6,), which makes (6,), and params/block0/kernel is (3, 2)'
            ),
        ),
    ],
)
def test_one_line_says_all_that_is_wrong(arrays, said):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  compared as a whole
        from_state_dict(arrays, RULES, SHAPES)
    assert str(caught.value) == f'from_state_dict: {said}'


def test_rules_that_contradict_themselves_are_errors():
    with pytest.raises(ValueError, match=r'^from_state_dict: params/block0/kernel comes from both layers.0.weight and extra'):
        from_state_dict(theirs(extra=np.ones((3, 2))), [*RULES, Rule('extra', 'params/block0/kernel')], SHAPES)
    missing = {**SHAPES, 'head': jax.ShapeDtypeStruct((2,), jnp.float32)}
    with pytest.raises(ValueError, match=r'missing: head \(which no rule makes\)$'):
        from_state_dict(theirs(), RULES, missing)


def test_casting_takes_little_more_than_the_result():
    count, size = 24, 40_000
    arrays = {f'layers.{i}.weight': np.ones((2, size), ml_dtypes.bfloat16) for i in range(count)}
    shapes = {f'block{i}': jax.ShapeDtypeStruct((size, 2), jnp.float32) for i in range(count)}
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    variables = from_state_dict(arrays, [transposed('layers.{}.weight', 'block{}')], shapes, dtype=np.float32)
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert peak < 1.2 * sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
