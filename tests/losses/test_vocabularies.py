"""Losses for large vocabularies against float64 oracles, against `soft_targets` of all logits, and what they promise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kdjax import losses

ROWS, CLASSES = 4, 6
INF = float('inf')
EXAMPLES = settings(max_examples=25, deadline=None, derandomize=True, database=None)
LOGITS = arrays(np.float32, (ROWS, CLASSES), elements=st.floats(-8, 8, width=32))
TEMPERATURES = st.sampled_from([0.5, 1.0, 4.0])


def log_softmax(z):
    """z - logsumexp(z), in float64, over the last axis."""
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def kl(log_p, log_q):
    """Σ p (log p - log q) over the last axis, where 0 log 0 = 0."""
    difference = np.where(np.isneginf(log_p), 0, log_p) - log_q
    return np.sum(np.where(np.isneginf(log_p), 0, np.exp(log_p) * difference), axis=-1)


def logsumexp(z):
    """log Σ exp z over the last axis; -inf for nothing."""
    return np.log(np.sum(np.exp(z), axis=-1))


def doubles(*numbers):
    return [np.asarray(x, np.float64) for x in numbers]


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def assert_slope(function, x, gradient, *, seed=0, rtol=1e-4, atol=2e-5):
    """The gradient of the sum of a function's values is what moving along a random direction says."""
    direction = np.random.default_rng(seed).normal(size=x.shape)
    up, down = (np.sum(function(x + step * direction)) for step in (1e-6, -1e-6))
    np.testing.assert_allclose(np.sum(np.float64(gradient) * direction), (up - down) / 2e-6, rtol=rtol, atol=atol)


def values_and_gradients(loss, *arguments):
    """The values, and the gradients of their sum with respect to all arguments."""
    values, pullback = jax.vjp(loss, *arguments)
    return values, pullback(jnp.ones_like(values))


@jax.jit
def soft_targets(student, teacher, temperature):
    """That of all logits."""
    loss = functools.partial(losses.soft_targets, temperature=temperature)
    return values_and_gradients(loss, student, teacher)


@functools.partial(jax.jit, static_argnames='k')
def top_k(student, teacher, temperature, k, where=None):
    """The loss of a triple that is made on the spot, with gradients through it."""

    def loss(student, teacher):
        triple = losses.top_k_logits(teacher, k, temperature=temperature, where=where)
        return losses.top_k_soft_targets(student, *triple, temperature=temperature, where=where)

    return values_and_gradients(loss, student, teacher)


def top_k_oracle(s, t, k, temperature):
    """T² · KL over the k largest and the sum of the rest."""
    order = np.argsort(-t, axis=-1, kind='stable')
    buckets = []
    for z in (t, s):
        log_p = np.take_along_axis(log_softmax(z / temperature), order, axis=-1)
        buckets.append(np.concatenate([log_p[..., :k], logsumexp(log_p[..., k:])[..., None]], axis=-1))
    return temperature**2 * kl(*buckets)


@pytest.mark.parametrize('k', [1, 3])
@EXAMPLES
@given(LOGITS, LOGITS, TEMPERATURES)
def test_top_k_equals_the_oracle(k, student, teacher, temperature):
    values, gradients = jax.device_get(top_k(student, teacher, temperature, k))
    s, t = doubles(student, teacher)
    expected = top_k_oracle(s, t, k, temperature)
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-5)
    assert_slope(lambda x: top_k_oracle(x, t, k, temperature), s, gradients[0])
    top = np.sort(t, axis=-1)[:, ::-1]
    if np.all(top[:, k - 1] - top[:, k] > 1e-4):  # else a step may change which are the largest
        assert_slope(lambda x: top_k_oracle(s, x, k, temperature), t, gradients[1], atol=1e-4)


@EXAMPLES
@given(LOGITS, LOGITS, TEMPERATURES)
def test_top_k_grows_with_k_from_zero_to_soft_targets(student, teacher, temperature):
    """Fewer buckets never tell two distributions further apart."""
    whole, gradients = jax.device_get(soft_targets(student, teacher, temperature))
    values = [jax.device_get(top_k(student, teacher, temperature, k)) for k in (1, 3, CLASSES)]
    previous = np.zeros(ROWS)
    for value, _ in values:
        assert np.all(value >= previous - 1e-5 * (1 + previous))
        previous = value
    np.testing.assert_allclose(previous, whole, rtol=1e-5, atol=1e-5)
    for x, y in zip(values[-1][1], gradients, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@EXAMPLES
@given(LOGITS, LOGITS, st.integers(-8, 0))
def test_top_k_is_never_negative_however_close(teacher, noise, exponent):
    values, _ = top_k(teacher + noise * np.float32(10.0**exponent), teacher, 4.0, 3)
    assert np.all(np.asarray(values) >= 0)


def test_top_k_of_equal_logits_is_zero_and_constants_do_not_matter():
    student, teacher = random(2, ROWS, CLASSES)
    values, gradients = top_k(teacher, teacher, 4.0, 2)
    np.testing.assert_allclose(values, 0, atol=1e-10)
    np.testing.assert_allclose(gradients, 0, atol=1e-5)
    shifted = top_k(student + 3, teacher - 5, 2.0, 2)
    np.testing.assert_allclose(shifted[0], top_k(student, teacher, 2.0, 2)[0], rtol=1e-5)


def test_top_k_logits_are_the_largest_their_classes_and_the_mass_of_the_rest_at_the_temperature():
    teacher = random(2, 2, CLASSES)
    logits, indices, rest = losses.top_k_logits(teacher, 2, temperature=3.0)
    order = np.argsort(-teacher, axis=-1)
    np.testing.assert_array_equal(indices, order[..., :2])
    np.testing.assert_array_equal(logits, np.take_along_axis(teacher, order, axis=-1)[..., :2])
    np.testing.assert_allclose(rest, logsumexp(np.take_along_axis(np.float64(teacher), order[..., 2:], -1) / 3), rtol=1e-6)
    assert (logits.dtype, indices.dtype, rest.dtype) == (jnp.float32, jnp.int32, jnp.float32)
    np.testing.assert_array_equal(losses.top_k_logits(teacher, CLASSES)[2], np.full((2, 2), -INF))
    default = losses.top_k_logits(teacher, 2)[2]
    np.testing.assert_array_equal(default, losses.top_k_logits(teacher, 2, temperature=4.0)[2])


def test_top_k_has_a_default_temperature_of_four_and_takes_other_axes_and_halves():
    student, teacher = random(2, ROWS, CLASSES)
    expected, _ = top_k(student, teacher, 4.0, 2)
    np.testing.assert_allclose(losses.top_k_soft_targets(student, *losses.top_k_logits(teacher, 2)), expected, rtol=1e-5)
    moved = losses.top_k_soft_targets(student.T, *losses.top_k_logits(teacher.T, 2, axis=0), axis=0)
    np.testing.assert_allclose(moved, expected, rtol=1e-5)
    half = [jnp.asarray(x, jnp.bfloat16) for x in (student, teacher)]
    values, gradients = top_k(*half, 4.0, 2)
    upcast, _ = top_k(*(x.astype(jnp.float32) for x in half), 4.0, 2)
    np.testing.assert_allclose(values, upcast, rtol=1e-6)
    assert values.dtype == jnp.float32
    assert all(gradient.dtype == jnp.bfloat16 for gradient in gradients)


@pytest.mark.parametrize('kept', [[0, 2, 3, 5], [4], []])
def test_top_k_under_a_mask_is_that_of_the_slice(kept):
    """Also where more are asked for than are kept."""
    student, teacher = random(2, ROWS, CLASSES)
    where = np.isin(np.arange(CLASSES), kept)
    values, gradients = jax.device_get(top_k(student, teacher, 2.0, 2, where))
    if kept:
        expected, slopes = jax.device_get(top_k(student[:, kept], teacher[:, kept], 2.0, min(2, len(kept))))
        np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)
        for gradient, slope in zip(gradients, slopes, strict=True):
            np.testing.assert_allclose(gradient[:, kept], slope, rtol=1e-5, atol=1e-6)
    else:
        np.testing.assert_array_equal(values, 0)
    for gradient in gradients:
        np.testing.assert_array_equal(gradient[:, ~where], 0)


EXTREME_ROWS = np.array(
    [
        [0.0, 0.0, 0.0, 0.0],
        [1e4, -1e4, 0.0, 1.0],
        [-1e4, 1e4, 1e4, -1e4],
        [0.0, 1.0, -INF, 2.0],
        [-INF, -INF, -INF, 3.0],
        [3.0, -INF, -INF, -INF],
        [1e4, -INF, -1e4, -INF],
        [-INF, -INF, -INF, -INF],
    ],
    np.float32,
)


@pytest.mark.parametrize('temperature', [0.5, 4.0])
@pytest.mark.parametrize('k', [1, 2, 4])
def test_top_k_is_finite_for_every_pair_of_extreme_rows(temperature, k):
    student, teacher = (np.stack(x) for x in zip(*[(s, t) for s in EXTREME_ROWS for t in EXTREME_ROWS], strict=True))
    values, gradients = jax.device_get(top_k(student, teacher, temperature, k))
    assert np.all(np.isfinite(values))
    assert np.all(values >= 0)
    assert np.all(np.isfinite(gradients))


def test_one_class_and_classes_that_are_not_there_are_finite():
    student = random(ROWS, CLASSES)
    for indices in ([[-1, 99]] * ROWS, [[2, 2]] * ROWS):
        values = losses.top_k_soft_targets(student, student[:, :2], np.array(indices), student[:, 0])
        assert np.all(np.isfinite(values))
    np.testing.assert_array_equal(top_k(student[:, :1], student[:, 1:2], 4.0, 1)[0], 0)


@pytest.mark.parametrize(
    'shapes, indices, parts',
    [
        (((3, 5), (3, 2), (3,)), np.zeros((3, 3), np.int32), ['(3, 5)', '(3, 2)', '(3, 3)']),
        (((3, 5), (4, 2), (3,)), np.zeros((4, 2), np.int32), ['(3, 5)', '(4, 2)']),
        (((3, 5), (3, 2), (4,)), np.zeros((3, 2), np.int32), ['(3, 5)', '(4,)']),
        (((3, 5), (2,), (3,)), np.zeros((2,), np.int32), ['(3, 5)', '(2,)']),
        (((3, 5), (3, 2), (3,)), np.zeros((3, 2), np.float32), ['integer', 'float32']),
    ],
)
def test_triples_that_do_not_fit_are_named(shapes, indices, parts):
    student, logits, rest = (np.zeros(shape, np.float32) for shape in shapes)
    with pytest.raises(ValueError, match=r'^top_k_soft_targets: [^\n]+$') as error:
        losses.top_k_soft_targets(student, logits, indices, rest)
    assert all(part in str(error.value) for part in parts)


def test_what_is_no_logit_no_k_or_no_temperature_is_refused():
    student = np.zeros((3, 5), np.float32)
    triple = losses.top_k_logits(student, 2)
    for i, name in enumerate(('student', 'top_logits', None, 'rest')):
        arguments = [student, *triple]
        arguments[i] = np.zeros(arguments[i].shape, np.complex64)
        with pytest.raises(ValueError, match=f'^top_k_soft_targets: .*{name or "top_indices"} must be'):
            losses.top_k_soft_targets(*arguments)
    for options in ({'axis': 2}, {'temperature': 0.0}, {'where': np.ones(5)}):
        with pytest.raises(ValueError, match=r'^top_k_soft_targets: [^\n]+$'):
            losses.top_k_soft_targets(student, *triple, **options)
        with pytest.raises(ValueError, match=r'^top_k_logits: [^\n]+$'):
            losses.top_k_logits(student, 2, **options)
    for k in (0, 6):
        with pytest.raises(ValueError, match=f'^top_k_logits: k must be between 1 and the number of classes, 5, got {k}$'):
            losses.top_k_logits(student, k)
    with pytest.raises(ValueError, match=r'^top_k_logits: teacher must be floating point, got int32$'):
        losses.top_k_logits(student.astype(np.int32), 2)


@jax.jit
def subset(student, teacher, classes, temperature=4.0):
    """The loss and its gradients; `classes` are traced."""
    loss = functools.partial(losses.subset_soft_targets, classes=classes, temperature=temperature)
    return values_and_gradients(lambda s, t: loss(s, t), student, teacher)


@EXAMPLES
@given(LOGITS, LOGITS, st.permutations(range(CLASSES)), TEMPERATURES)
def test_a_subset_is_soft_targets_of_the_students_logits_of_those_classes(student, teacher, order, temperature):
    """In the teacher's order. The student's other logits have no gradient."""
    classes = np.array(order[:4])
    values, gradients = jax.device_get(subset(student, teacher[:, :4], classes, temperature))
    s, t = doubles(student[:, classes], teacher[:, :4])

    def oracle(s, t):
        return temperature**2 * kl(log_softmax(t / temperature), log_softmax(s / temperature))

    np.testing.assert_allclose(values, oracle(s, t), rtol=1e-5, atol=1e-5)
    assert_slope(lambda x: oracle(x, t), s, gradients[0][:, classes])
    assert_slope(lambda x: oracle(s, x), t, gradients[1], atol=1e-4)
    np.testing.assert_array_equal(gradients[0][:, order[4:]], 0)


def test_a_subset_may_be_a_list_an_array_or_all_classes():
    student, teacher = random(2, ROWS, CLASSES)
    values = losses.subset_soft_targets(student, teacher[:, :2], [4, 1])
    np.testing.assert_array_equal(losses.subset_soft_targets(student, teacher[:, :2], (4, 1)), values)
    np.testing.assert_array_equal(losses.subset_soft_targets(student, teacher[:, :2], jnp.array([4, 1])), values)
    np.testing.assert_allclose(subset(student, teacher[:, :2], jnp.array([4, 1]))[0], values, rtol=1e-5)
    whole = losses.subset_soft_targets(student, teacher, range(CLASSES))
    np.testing.assert_allclose(whole, losses.soft_targets(student, teacher), rtol=1e-6)


def test_a_mask_of_a_subset_is_over_the_classes_of_the_teacher():
    student, teacher = random(2, ROWS, CLASSES)
    masked = losses.subset_soft_targets(student, teacher[:, :3], [5, 0, 2], where=np.array([True, False, True]))
    sliced = losses.subset_soft_targets(student, teacher[:, [0, 2]], [5, 2])
    np.testing.assert_allclose(masked, sliced, rtol=1e-5)


@pytest.mark.parametrize(
    'classes, part',
    [([0, 0], 'repeat'), ([0, 5], 'in [0, 5)'), ([-1, 0], 'in [0, 5)'), ([[0, 1]], '(1, 2)'), ([0.0, 1.0], 'float64')],
)
def test_classes_that_cannot_be_are_refused(classes, part):
    with pytest.raises(ValueError, match=r'^subset_soft_targets: classes must [^\n]+$') as error:
        losses.subset_soft_targets(np.zeros((3, 5), np.float32), np.zeros((3, 2), np.float32), classes)
    assert part in str(error.value)


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


def test_linear_takes_no_integers():
    for i in range(4):
        arrays = heads()
        arrays[i] = arrays[i].astype(np.int32)
        with pytest.raises(ValueError, match=r'^linear_soft_targets: .* must be floating point, got int32$'):
            losses.linear_soft_targets(*arrays)
