"""Soft targets from hidden states and kernels: against float64 oracles, and against `soft_targets` of the products."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.logit_checks import assert_slope, doubles, random
from helpers.oracles import kl, log_softmax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kdjax import losses

TOKENS, WIDTHS, VOCABULARY = (2, 3), (3, 4), 7


def heads(seed=0, scale=1.0, tokens=TOKENS, vocabulary=VOCABULARY):
    """Hidden states and kernels of a student and a teacher of other widths."""
    rng = np.random.default_rng(seed)
    shapes = [shape for width in WIDTHS for shape in ((*tokens, width), (width, vocabulary))]
    return [(scale * rng.normal(size=shape)).astype(np.float32) for shape in shapes]


def linear_oracle(s, s_kernel, t, t_kernel, temperature):
    """T² · KL of the softmax of the products."""
    return temperature**2 * kl(log_softmax(t @ t_kernel / temperature), log_softmax(s @ s_kernel / temperature))


@functools.partial(jax.jit, static_argnames='chunk')
def linear(arrays, temperature, weights, chunk, where=None):
    """The values, and the gradients of their weighted sum with respect to the four arrays and the temperature."""

    def loss(arrays, temperature):
        return losses.linear_soft_targets(*arrays, temperature=temperature, chunk=chunk, where=where)

    values, pullback = jax.vjp(loss, arrays, temperature)
    return values, pullback(weights)


@pytest.mark.parametrize('chunk', [1, 2, 4, 6, 100])
@pytest.mark.parametrize('temperature', [0.5, 4.0])
def test_linear_equals_the_oracle_in_values_and_all_five_gradients(chunk, temperature):
    """For chunks that divide the tokens and the vocabulary and chunks that do not; tokens of other weights."""
    arrays, weights = heads(chunk), random(*TOKENS, seed=1)
    values, (gradients, of_temperature) = jax.device_get(linear(arrays, np.float32(temperature), weights, chunk))
    exact = doubles(*arrays)
    np.testing.assert_allclose(values, linear_oracle(*exact, temperature), rtol=1e-5, atol=1e-5)
    for i, gradient in enumerate(gradients):

        def oracle(x, i=i):
            return weights * linear_oracle(*exact[:i], x, *exact[i + 1 :], temperature)

        assert_slope(oracle, exact[i], gradient, seed=i, atol=1e-4)
    assert_slope(lambda x: weights * linear_oracle(*exact, x), np.float64(temperature), of_temperature, atol=1e-4)


@pytest.mark.parametrize('chunk', [1, 5])
def test_linear_equals_soft_targets_of_the_products(chunk):
    """Every element of every gradient."""
    arrays, weights = heads(scale=2.0), random(*TOKENS, seed=1)

    def naive(arrays, temperature):
        student, student_kernel, teacher, teacher_kernel = arrays
        return losses.soft_targets(student @ student_kernel, teacher @ teacher_kernel, temperature=temperature)

    values, pullback = jax.vjp(naive, [jnp.asarray(x) for x in arrays], jnp.float32(2))
    expected = values, pullback(jnp.asarray(weights))
    for x, y in zip(jax.tree.leaves(linear(arrays, np.float32(2), weights, chunk)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * max(1.0, np.abs(y).max()))


def test_linear_has_a_default_temperature_of_four_and_takes_one_token_or_none():
    student, student_kernel, teacher, teacher_kernel = heads()
    kernels = student_kernel, teacher_kernel
    expected = linear_oracle(*doubles(*heads()), 4.0)
    np.testing.assert_allclose(losses.linear_soft_targets(*heads()), expected, rtol=1e-5, atol=1e-6)
    one = losses.linear_soft_targets(student[0, 0], kernels[0], teacher[0, 0], kernels[1], where=np.array(True))
    np.testing.assert_allclose(one, expected[0, 0], rtol=1e-5)
    assert losses.linear_soft_targets(student[:0], kernels[0], teacher[:0], kernels[1]).shape == (0, 3)


@pytest.mark.parametrize('temperature, noise', [(1.0, 1e-3), (1e3, 0.1)])
def test_linear_keeps_its_digits_near_equality_and_at_high_temperatures(temperature, noise):
    """Where log p_s and log p_t agree in all but their last digits; exactly 0 at equality."""
    arrays = heads()
    arrays[2], arrays[3] = arrays[0] + np.float32(noise) * random(*arrays[0].shape, seed=3), arrays[1]
    values, _ = linear(arrays, np.float32(temperature), np.ones(TOKENS, np.float32), 2)
    np.testing.assert_allclose(values, linear_oracle(*doubles(*arrays), temperature), rtol=2e-2)
    arrays[2] = arrays[0]
    values, (gradients, of_temperature) = linear(arrays, np.float32(temperature), np.ones(TOKENS, np.float32), 2)
    for x in (values, *gradients, of_temperature):
        np.testing.assert_array_equal(x, np.zeros_like(x))


def test_linear_is_finite_at_extremes():
    """Logits of ±1e4 on opposite sides, zeros, and both."""
    arrays = [x * np.float32(100) for x in heads()]
    arrays[0][0, 0] = arrays[2][0, 1] = 0
    for kernels in (arrays, [arrays[0], 0 * arrays[1], arrays[2], arrays[3]]):
        values, gradients = linear(kernels, np.float32(0.5), np.ones(TOKENS, np.float32), 2)
        assert np.all(values >= 0)
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((values, gradients)))


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_linear_of_halves_sums_in_float32(dtype):
    """It equals that of the inputs upcast first; the gradients come back rounded, once."""
    halves, weights = [jnp.asarray(x, dtype) for x in heads()], random(*TOKENS, seed=1)
    values, (gradients, _) = linear(halves, np.float32(4), weights, 2)
    upcast = linear([x.astype(jnp.float32) for x in halves], np.float32(4), weights, 2)
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, upcast[0], rtol=1e-5, atol=1e-6)
    for gradient, reference, x in zip(gradients, upcast[1][0], halves, strict=True):
        assert gradient.dtype == x.dtype
        digits = float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(np.float32(gradient), reference, rtol=digits, atol=1e-5)


@pytest.mark.parametrize('axis', [0, 1])
def test_linear_takes_a_width_that_is_not_last_among_three_axes(axis):
    arrays = heads()
    moved = [np.moveaxis(x, -1, axis) if x.ndim == 3 else x for x in arrays]
    values = losses.linear_soft_targets(*moved, axis=axis)
    np.testing.assert_allclose(values, losses.linear_soft_targets(*arrays), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('fill', [3e38, np.inf, np.nan])
def test_linear_never_multiplies_tokens_that_are_masked(fill):
    """Products with them would overflow, and zero times those is NaN."""
    arrays, where = heads(), np.array([[True, False, True], [True, True, True]])
    expected = jax.tree.leaves(jax.device_get(linear(arrays, np.float32(4), np.ones(TOKENS, np.float32), 2, where)))
    arrays[0][0, 1] = arrays[2][0, 1] = fill
    results = jax.tree.leaves(linear(arrays, np.float32(4), np.ones(TOKENS, np.float32), 2, where))
    for result, reference in zip(results, expected, strict=True):
        np.testing.assert_array_equal(result, reference)


@pytest.mark.parametrize('chunk', [4, 6, 9, 10])
def test_linear_holds_the_logits_of_no_more_tokens_than_a_chunk(chunk):
    """Where the tokens do not divide, there are more chunks and not larger ones."""
    arrays = heads(tokens=(2, 5), vocabulary=23)
    program = jax.jit(functools.partial(losses.linear_soft_targets, chunk=chunk)).lower(*arrays).as_text()
    rows = [int(count) for count in re.findall(r'tensor<(\d+)x23xf32>', program)]  # those of the kernels are no more than 4
    assert max(rows) <= chunk


@pytest.mark.parametrize('chunk', [2, 100])
def test_linear_adds_the_biases_of_both_heads(chunk):
    arrays, biases = [jnp.asarray(x) for x in heads()], {'student_bias': random(VOCABULARY), 'teacher_bias': random(VOCABULARY)}

    def ours(arrays, biases, temperature):
        return jnp.mean(losses.linear_soft_targets(*arrays, **biases, temperature=temperature, chunk=chunk))

    def naive(arrays, biases, temperature):
        student, student_kernel, teacher, teacher_kernel = arrays
        own, other = (biases[name][None, None] for name in ('student_bias', 'teacher_bias'))
        pair = student @ student_kernel + own, teacher @ teacher_kernel + other
        return jnp.mean(losses.soft_targets(*pair, temperature=temperature))

    results = [jax.jit(jax.value_and_grad(f, (0, 1, 2)))(arrays, biases, jnp.float32(2)) for f in (ours, naive)]
    for x, y in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_linear_names_biases_that_do_not_fit():
    with pytest.raises(ValueError, match=r'^linear_soft_targets: a bias must be \(7,\), as the vocabulary, got \(6,\)$'):
        losses.linear_soft_targets(*heads(), teacher_bias=np.zeros(6, np.float32))
    with pytest.raises(ValueError, match=r'^linear_soft_targets: the bias of the student must be floating point, got int32$'):
        losses.linear_soft_targets(*heads(), student_bias=np.zeros(VOCABULARY, np.int32))


def student_gradients(loss, arrays, argnums=(0, 1)):
    """The compiled value and gradients of a loss's mean."""
    return jax.jit(jax.value_and_grad(lambda *x: loss(*x).mean(), argnums=argnums)).lower(*arrays).compile()


def test_linear_needs_an_eighth_of_the_memory():
    shapes = [(256, 32), (32, 8192)] * 2
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    ours = student_gradients(functools.partial(losses.linear_soft_targets, chunk=32), arrays)
    naive = student_gradients(lambda s, v, t, w: losses.soft_targets(s @ v, t @ w), arrays)
    needed = ours.memory_analysis().temp_size_in_bytes
    assert needed <= naive.memory_analysis().temp_size_in_bytes / 8
    assert needed < 4 * 256 * 8192  # less than the logits of one network


def test_gradients_of_the_teacher_that_nobody_asks_for_cost_nothing():
    """Four products forward and backward, and two for each network that learns."""
    counts = []
    for argnums in ((0, 1), (2, 3), (0, 1, 2, 3)):
        program = student_gradients(functools.partial(losses.linear_soft_targets, chunk=2), heads(), argnums).as_text()
        counts.append(program.count(' dot('))
    assert counts == [6, 6, 8]


def gradients(*arrays):
    return jax.grad(lambda *x: losses.linear_soft_targets(*x, chunk=16).sum(), argnums=(0, 1, 2, 3))(*arrays)


def assert_near(results, expected):
    for x, y in zip(results, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * np.abs(y).max())


@pytest.mark.parametrize('tokens', [(16, 5), (8, 7)])
def test_hidden_states_that_are_split_over_devices_stay_there(tokens):
    """Where the tokens do not divide by the chunk, a few rows move to the next device; none goes to all."""
    mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
    split, whole = NamedSharding(mesh, PartitionSpec('data')), NamedSharding(mesh, PartitionSpec())
    layout = (split, whole) * 2
    program = jax.jit(gradients, in_shardings=layout, out_shardings=layout).lower(*heads(tokens=tokens)).compile()
    collectives = re.findall(r' (all-\w+|collective-permute)(?:-start)?\(', program.as_text())
    assert 'all-reduce' in collectives, 'of the gradients of the kernels'
    assert not {'all-gather', 'all-to-all'} & set(collectives)
    assert_near(program(*heads(tokens=tokens)), gradients(*heads(tokens=tokens)))


def test_gradients_inside_shard_map_are_those_of_the_whole_batch():
    """Of hidden states those of the device's own, of the kernels, which all have, the sum over the devices."""
    mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
    specs = (PartitionSpec('data'), PartitionSpec()) * 2
    arrays = heads(tokens=(8, 7))
    inside = jax.jit(jax.shard_map(gradients, mesh=mesh, in_specs=specs, out_specs=specs))(*arrays)
    assert_near(inside, gradients(*arrays))


@pytest.mark.parametrize(
    'index, shape, part',
    [
        (0, (2, 3, 5), 'width'),
        (1, (4, 7), 'width'),
        (3, (3, 7), 'width'),
        (1, (3,), 'width'),
        (1, (3, 8), 'vocabulary'),
        (2, (2, 4, 4), 'tokens'),
        (2, (6, 4), 'tokens'),
    ],
)
def test_linear_names_shapes_that_do_not_fit(index, shape, part):
    arrays = heads()
    arrays[index] = np.ones(shape, np.float32)
    with pytest.raises(ValueError, match=r'^linear_soft_targets: [^\n]+$') as error:
        losses.linear_soft_targets(*arrays)
    assert part in str(error.value)
    assert str(shape) in str(error.value)


@pytest.mark.parametrize(
    'options', [{'chunk': 0}, {'chunk': 2.0}, {'temperature': -1.0}, {'axis': 3}, {'where': np.ones((3, 2), bool)}]
)
def test_linear_names_options_that_do_not_fit(options):
    with pytest.raises(ValueError, match=rf'^linear_soft_targets: {next(iter(options))} [^\n]+$'):
        losses.linear_soft_targets(*heads(), **options)


def test_linear_compares_no_single_class():
    with pytest.raises(ValueError, match=r'^linear_soft_targets: .* one class .* one column'):
        losses.linear_soft_targets(*heads(vocabulary=1))


def test_linear_takes_no_integers():
    for i in range(4):
        arrays = heads()
        arrays[i] = arrays[i].astype(np.int32)
        with pytest.raises(ValueError, match=r'^linear_soft_targets: .* must be floating point, got int32$'):
            losses.linear_soft_targets(*arrays)
