"""Trees of weights as integers and in half precision, from Linen and from NNX."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kdjax import networks, paths
from kdjax.quantization import (
    QuantizedArray,
    cast_weights,
    dequantize_weights,
    quantize,
    quantize_weights,
    shared_scale,
    symmetric_scale,
)


@functools.cache
def linen_params() -> dict:
    module = nn.Sequential([nn.Conv(4, (3, 3)), nn.relu, lambda x: x.reshape(x.shape[0], -1), nn.Dense(5)])
    inputs, rng = jax.ShapeDtypeStruct((2, 4, 4, 2), jnp.float32), np.random.default_rng(0)
    shapes = jax.eval_shape(networks.from_linen(module).init, jax.random.key(0), inputs)['params']
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype), shapes)


def test_kernels_become_integers_with_a_scale_per_output_channel_and_biases_stay() -> None:
    params = linen_params()
    tree = quantize_weights(params)
    assert sorted(tree) == sorted(params)
    for layer, weights in tree.items():
        kernel, original = weights['kernel'], np.asarray(params[layer]['kernel'])
        assert weights['bias'] is params[layer]['bias']
        assert isinstance(kernel, QuantizedArray)
        assert kernel.values.dtype == jnp.int8
        assert kernel.values.shape == original.shape
        assert kernel.scale.shape == (1,) * (original.ndim - 1) + original.shape[-1:]
        # Every channel uses its whole range, and no weight is off by more than half a step of its channel.
        magnitudes = np.abs(np.asarray(kernel.values, int)).reshape(-1, original.shape[-1])
        np.testing.assert_array_equal(magnitudes.max(0), 127)
        error = np.abs(np.asarray(kernel.dequantize()) - original)
        assert np.all(error <= np.asarray(kernel.scale) / 2 * (1 + 1e-5))


def test_dequantized_weights_are_a_tree_of_arrays_like_the_original() -> None:
    params = linen_params()
    back = dequantize_weights(quantize_weights(params))
    assert jax.tree.structure(back) == jax.tree.structure(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(back)} == {jnp.dtype('float32')}
    # Quantizing what lies on the grid changes nothing any more.
    again = dequantize_weights(quantize_weights(back))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=0), again, back)


def test_quantized_trees_go_through_jit_and_pruned_weights_stay_zero() -> None:
    params = {'kernel': jnp.array([[1.0, 0.0], [0.0, -3.0]], jnp.bfloat16)}
    back = jax.jit(lambda params: dequantize_weights(quantize_weights(params)))(params)
    np.testing.assert_array_equal(back['kernel'] == 0, params['kernel'] == 0)
    np.testing.assert_allclose(back['kernel'], [[1, 0], [0, -3]], rtol=1e-6)


def test_leaves_choose_what_is_quantized_and_nothing_chosen_is_an_error() -> None:
    tree = quantize_weights(linen_params(), leaves='layers_3/*')
    quantized = {path for path, leaf in paths.leaves_with_paths(tree).items() if 'values' in path}
    assert quantized == {'layers_3/kernel/values', 'layers_3/bias/values'}
    with pytest.raises(ValueError, match='matches no path; there are: layers_0/bias, layers_0/kernel'):
        quantize_weights(linen_params(), leaves='head/*')


# Bits, groups, sharing.


def attention_params() -> dict:
    rng = np.random.default_rng(0)
    draw = lambda scale, *shape: jnp.asarray(rng.normal(scale=scale, size=shape), jnp.float32)  # noqa: E731
    projections = {
        name: {'kernel': draw(scale, 64, 8), 'bias': draw(1, 8)} for name, scale in (('query', 1), ('key', 3), ('out', 2))
    }
    return {'attention': projections, 'head': {'kernel': draw(1, 8, 3)}}


def test_four_bits_in_groups_have_a_scale_per_group_of_inputs_and_lose_less_than_without() -> None:
    params = attention_params()
    kernel = params['attention']['key']['kernel']
    grouped = quantize_weights(params, leaves='*/key/kernel', bits=4, group_size=32)['attention']['key']['kernel']
    assert (grouped.bits, grouped.values.dtype, grouped.scale.shape) == (4, jnp.int8, (2, 8))
    assert (np.abs(grouped.values).max(), grouped.zero_point) == (7, None)
    whole = quantize_weights(params, leaves='*/key/kernel', bits=4, group_size=64)['attention']['key']['kernel']
    np.testing.assert_array_equal(whole.scale, symmetric_scale(kernel, channel_axis=-1, bits=4))
    squared = [float(jnp.sum((array.dequantize() - kernel) ** 2)) for array in (grouped, whole)]
    assert squared[0] < squared[1]
    halves = [quantize_weights({'kernel': half}, bits=4)['kernel'] for half in (kernel[:32], kernel[32:])]
    np.testing.assert_array_equal(grouped.values, jnp.concatenate([half.values for half in halves]))
    np.testing.assert_array_equal(grouped.dequantize(), jnp.concatenate([half.dequantize() for half in halves]))


@pytest.mark.parametrize('bits,narrow', [(8, True), (8, False), (3, True), (2, False)])
def test_one_scale_per_array_and_the_full_range_on_request(bits: int, narrow: bool) -> None:
    kernel = attention_params()['head']['kernel']
    array = quantize_weights({'kernel': kernel}, bits=bits, channel_axis=None, narrow=narrow)['kernel']
    assert array.scale.shape == (1, 1)
    scale = symmetric_scale(kernel, bits=bits, narrow=narrow)
    np.testing.assert_array_equal(array.values, quantize(kernel, scale, bits=bits, narrow=narrow))
    np.testing.assert_array_equal(array.scale, scale)
    assert np.all(np.abs(array.dequantize() - kernel) <= scale / 2 * (1 + 1e-5))


def test_arrays_that_share_have_one_scale_and_the_others_their_own() -> None:
    params = attention_params()
    shared = [('*/query/kernel', '*/key/kernel'), lambda path, leaf: path.startswith('head')]
    tree = jax.jit(functools.partial(quantize_weights, shared=shared, bits=6))(params)
    attention = tree['attention']
    query, key = attention['query']['kernel'], attention['key']['kernel']
    assert query.scale.shape == key.scale.shape == ()
    wanted = shared_scale([params['attention'][name]['kernel'] for name in ('query', 'key')], bits=6)
    np.testing.assert_allclose([query.scale, key.scale], [wanted, wanted], rtol=1e-6)
    assert np.abs(key.values).max() == 31 > np.abs(query.values).max()
    assert attention['out']['kernel'].scale.shape == (1, 8)
    assert tree['head']['kernel'].scale.shape == ()
    assert attention['query']['bias'].dtype == jnp.float32
    joined = jnp.concatenate([query.values, key.values], axis=1)
    whole = jnp.concatenate([params['attention'][name]['kernel'] for name in ('query', 'key')], axis=1)
    np.testing.assert_array_equal(joined, quantize(whole, query.scale, bits=6))


def test_a_second_call_quantizes_the_rest_with_other_bits() -> None:
    tree = quantize_weights(quantize_weights(attention_params(), leaves='head/*'), bits=4, group_size=32)
    assert tree['head']['kernel'].bits == 8
    assert {kernel['kernel'].bits for kernel in tree['attention'].values()} == {4}
    back = dequantize_weights(tree)
    assert jax.tree.map(jnp.shape, back) == jax.tree.map(jnp.shape, attention_params())
    with pytest.raises(ValueError, match='the predicate picks no array'):
        quantize_weights(tree)


def test_arrays_that_cannot_be_quantized_so_are_named() -> None:
    params = attention_params()
    with pytest.raises(ValueError, match='quantize_weights: head/kernel: symmetric_scale: groups of 32 do not divide axis 0'):
        quantize_weights(params, bits=4, group_size=32)
    with pytest.raises(ValueError, match='quantize_weights: head/kernel: symmetric_scale: x must be floating point'):
        quantize_weights({'head': {'kernel': jnp.ones((2, 2), jnp.int32)}})
    with pytest.raises(ValueError, match='attention/key/kernel would share two scales'):
        quantize_weights(params, shared=['*/key/*', '*/kernel'])
    with pytest.raises(ValueError, match='matches no path; there are: attention/key/kernel, '):
        quantize_weights(params, shared=['*/bias'])


def test_nnx_states_are_quantized_and_merged_again() -> None:
    module = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    graph, state = nnx.split(module)
    quantized = quantize_weights(state, bits=4, group_size=2)
    assert set(paths.leaves_with_paths(quantized)) == {'bias', 'kernel/value/values', 'kernel/value/scale'}
    back = dequantize_weights(quantized)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    x = jnp.ones((2, 4))
    kernel = quantize_weights({'kernel': module.kernel.get_value()}, bits=4, group_size=2)['kernel'].dequantize()
    np.testing.assert_allclose(nnx.merge(graph, back)(x), x @ kernel, rtol=1e-5, atol=1e-6)
    halved = cast_weights(state, jnp.bfloat16, leaves='kernel')
    assert [leaf.dtype for leaf in jax.tree.leaves(halved)] == [jnp.float32, jnp.bfloat16]


# Half precision.


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_casts_are_numpys_and_what_is_too_large_becomes_the_largest(dtype: str) -> None:
    x = np.array([1 / 3, -2.5, 0.0, 1e-9, 7e4, -7e4, np.inf, np.nan], np.float32)
    tree = jax.jit(functools.partial(cast_weights, dtype=dtype))(
        {'kernel': x, 'count': jnp.arange(3), 'half': jnp.ones(2, dtype)}
    )
    assert {path: str(leaf.dtype) for path, leaf in tree.items()} == {'kernel': dtype, 'count': 'int32', 'half': dtype}
    largest = {'float16': 65504, 'bfloat16': float(jnp.finfo(jnp.bfloat16).max)}[dtype]
    wanted = np.clip(x, -largest, largest).astype(jnp.dtype(dtype))
    np.testing.assert_array_equal(tree['kernel'].astype(jnp.float32), wanted.astype(np.float32))
    wide = cast_weights(tree, jnp.float32)
    np.testing.assert_array_equal(wide['kernel'], wanted.astype(np.float32))
    assert cast_weights(wide, jnp.float32)['kernel'].dtype == jnp.float32


def test_casts_leave_quantized_arrays_and_what_is_not_named_alone() -> None:
    tree = quantize_weights(attention_params(), leaves='*/kernel')
    cast = cast_weights(tree, jnp.float16)
    assert cast['head']['kernel'] is tree['head']['kernel']
    assert {name: layer['bias'].dtype for name, layer in cast['attention'].items()} == dict.fromkeys(
        cast['attention'], jnp.float16
    )
    named = cast_weights(attention_params(), jnp.float16, leaves='*/key/*')
    assert {path for path, leaf in paths.leaves_with_paths(named).items() if leaf.dtype == jnp.float16} == {
        'attention/key/bias',
        'attention/key/kernel',
    }


def test_casts_to_and_of_integers_are_an_error() -> None:
    with pytest.raises(ValueError, match='cast_weights: dtype must be floating point, got int8; use quantize_weights'):
        cast_weights(attention_params(), jnp.int8)
    with pytest.raises(ValueError, match='cast_weights: count is int32; leave arrays of integers out'):
        cast_weights({'count': jnp.arange(3)}, jnp.float16, leaves='*')
    with pytest.raises(ValueError, match='the predicate picks no array'):
        cast_weights({'count': jnp.arange(3)}, jnp.float16)
