"""Means that are divided once: however the examples are dealt to batches, devices and masks, the mean is the same."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kdjax import metrics, networks
from kdjax.metrics import Average

checked = settings(derandomize=True, deadline=None, max_examples=25)
vectors = arrays(np.float32, 12, elements=st.floats(-100, 100, width=32))
masks = arrays(bool, 12)


@checked
@given(vectors, masks)
def test_mean_is_numpys_of_the_elements_that_count(values: np.ndarray, where: np.ndarray) -> None:
    metric = metrics.mean(values, where)
    np.testing.assert_allclose(metric.total, values[where].sum(dtype=np.float64), rtol=1e-5, atol=1e-4)
    assert float(metric.count) == where.sum()
    wanted = values[where].mean(dtype=np.float64) if where.any() else 0
    np.testing.assert_allclose(metrics.divide(metric), wanted, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(metrics.divide(metrics.mean(values)), values.mean(dtype=np.float64), rtol=1e-5, atol=1e-4)


@checked
@given(vectors, masks, st.lists(st.integers(0, 12), max_size=4))
def test_batches_of_any_size_add_up_to_the_whole(values: np.ndarray, where: np.ndarray, cuts: list[int]) -> None:
    where[0] = True
    edges = [0, *sorted(cuts), 12]
    parts = [Average(values[a:b][where[a:b]].sum(), where[a:b].sum()) for a, b in itertools.pairwise(edges)]
    total = metrics.add(*({'loss': part, 'twice': Average(2 * part.total, part.count)} for part in parts))
    computed = metrics.compute(total)
    np.testing.assert_allclose(computed['loss'], values[where].mean(dtype=np.float64), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(computed['twice'], 2 * computed['loss'], rtol=1e-6, atol=1e-6)


def test_where_equals_slicing_and_what_it_leaves_out_may_be_anything() -> None:
    values = jnp.array([[1.0, jnp.nan], [3.0, jnp.inf], [-jnp.inf, 5.0]])
    where = jnp.isfinite(values)
    assert metrics.divide(metrics.mean(values, where)) == 3
    gradient = jax.grad(lambda values: metrics.divide(metrics.mean(values, where)))(values)
    np.testing.assert_allclose(gradient, np.where(where, 1 / 3, 0), rtol=1e-6)


def test_nothing_counted_is_zero_with_a_zero_gradient_on_the_device_and_nan_for_people() -> None:
    nothing = jnp.zeros(3, bool)
    value, gradient = jax.value_and_grad(lambda x: metrics.divide(metrics.mean(x, nothing)))(jnp.ones(3))
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)
    # Rounding may leave a rest where nothing is left to count.
    value, slopes = jax.value_and_grad(metrics.divide)(Average(1e-3, 0.0))
    assert value == slopes.total == slopes.count == 0
    assert np.isnan(metrics.compute({'loss': Average(0.0, 0.0)})['loss'])


def test_divide_can_be_differentiated_and_jitted() -> None:
    value, slopes = jax.jit(jax.value_and_grad(metrics.divide))(Average(6.0, 4.0))
    assert value == 1.5
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(slopes, (0.25, -6 / 16), rtol=1e-6)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16', 'int32', 'bool'])
def test_sums_are_in_float32(dtype: str) -> None:
    """A thousand ones are 256 in bfloat16 arithmetic."""
    metric = metrics.mean(jnp.ones(1000, dtype))
    assert metric.total.dtype == metric.count.dtype == jnp.float32
    assert metric.total == metric.count == 1000


def test_adding_up_is_in_double_precision_on_the_host() -> None:
    """In float32 one more example after sixteen million would be lost."""
    total = metrics.add(
        {'n': Average(jnp.float32(2**24), jnp.float32(2**24))}, {'n': Average(1, 1)}, {'n': Average(jnp.float32(1), 1.0)}
    )
    assert total['n'].total == total['n'].count == 2**24 + 2
    assert isinstance(total['n'].total, np.float64)
    assert metrics.add({'n': Average(jnp.array([1.0, 2.0]), 2.0)}, {'n': Average(np.array([0.5, 0.5]), 1.0)})[
        'n'
    ].total.tolist() == [
        1.5,
        2.5,
    ]


def test_add_needs_the_same_names() -> None:
    with pytest.raises(ValueError, match='the same names, got loss and accuracy, loss'):
        metrics.add({'loss': Average(1.0, 1.0)}, {'loss': Average(1.0, 1.0), 'accuracy': Average(1.0, 1.0)})


def test_compute_gives_plain_floats_and_arrays_of_what_is_several() -> None:
    computed = metrics.compute({'accuracy': Average(jnp.float32(3), jnp.float32(4)), 'loss': Average(-3.0, 2.0)})
    assert computed == {'accuracy': 0.75, 'loss': -1.5}
    assert {type(number) for number in computed.values()} == {float}
    several = metrics.compute({'of_class': Average(jnp.array([1.0, -2.0, 0.0]), np.array([2.0, 4.0, 0.0]))})['of_class']
    np.testing.assert_array_equal(several, [0.5, -0.5, np.nan])


def test_weights_are_factors_and_a_weight_of_zero_leaves_out() -> None:
    values, weights = np.array([[1.0, np.nan], [3.0, 8.0]], np.float32), np.array([[2.0], [0.5]], np.float32)
    where = np.array([[True, False], [True, True]])
    metric = metrics.mean(values, where, weights)
    assert (float(metric.total), float(metric.count)) == (2 * 1 + 0.5 * (3 + 8), 2 + 0.5 + 0.5)
    left = metrics.mean(values, weights=np.array([[1.0, 0.0], [0.0, 1.0]], np.float32))
    assert left == metrics.mean(values, np.eye(2, dtype=bool)) == Average(9.0, 2.0)
    gradient = jax.grad(lambda *of: metrics.divide(metrics.mean(of[0], where, of[1])), argnums=(0, 1))(values, weights)
    np.testing.assert_allclose(gradient[0], np.where(where, weights / 3, 0), rtol=1e-6)
    assert np.isfinite(gradient[1]).all()


def test_over_devices_the_mean_is_that_of_one() -> None:
    mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
    values, where = np.arange(16.0, dtype=np.float32), np.arange(16) % 3 > 0
    sharded = [jax.device_put(x, NamedSharding(mesh, PartitionSpec('data'))) for x in (values, where)]
    metric = jax.jit(metrics.mean)(*sharded)
    assert (float(metric.total), float(metric.count)) == (values[where].sum(), where.sum())


def test_means_are_trees_that_add_field_by_field() -> None:
    a, b = metrics.mean(jnp.array([1.0, 2.0])), metrics.mean(jnp.array([6.0]))
    joined = jax.tree.map(jnp.add, a, b)
    assert isinstance(joined, Average)
    assert metrics.divide(joined) == 3
    summed = functools.reduce(functools.partial(jax.tree.map, jnp.add), [{'x': a}, {'x': b}, {'x': a}])
    assert metrics.divide(summed['x']) == 12 / 5


def test_bits_per_byte_count_the_bytes_of_the_labels_that_count():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(3, 4, 5)), rng.integers(-1, 5, (3, 4))
    batch = {
        'labels': labels,
        'bytes': rng.integers(1, 9, (3, 4)),
        'mask': rng.random((3, 4)) < 0.7,
        'weights': np.array([1.0, 0.5, 2.0], np.float32),
    }
    bits = size = 0.0
    for i, j in zip(*np.nonzero(batch['mask'] & (labels >= 0)), strict=True):
        p = np.exp(logits[i, j]) / np.exp(logits[i, j]).sum()
        bits -= batch['weights'][i] * np.log2(p[labels[i, j]])
        size += batch['weights'][i] * batch['bytes'][i, j]
    measured = metrics.bits_per_byte()(networks.Outputs(logits.astype(np.float32)), batch)
    np.testing.assert_allclose(measured.compute(), bits / size, rtol=1e-5)
    with pytest.raises(
        ValueError, match=r"^bits_per_byte: batch\['bytes'\] \(3, 3\) must have the shape of the labels, \(3, 4\)$"
    ):
        metrics.bits_per_byte()(networks.Outputs(logits), {**batch, 'bytes': batch['bytes'][:, 1:]})
    with pytest.raises(ValueError, match=r"^bits_per_byte needs batch\['sizes'\]"):
        metrics.bits_per_byte('sizes')(networks.Outputs(logits), batch)
