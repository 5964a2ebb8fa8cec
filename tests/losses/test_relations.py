"""Losses on relations against float64 oracles written from the papers' formulas, and the properties that they promise."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import gradient_checks
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kdjax import losses
from kdjax.losses import _embeddings

BATCH = 4
EXAMPLES = settings(max_examples=10, deadline=None, derandomize=True, database=None)


def embeddings(*shape):
    """Odd multiples of 1/16 in [-4, 4]: exact in float32, and never a zero vector, at which finite differences fail."""
    integers = arrays(np.int32, shape, elements=st.integers(-32, 31), fill=st.nothing())
    return integers.map(lambda x: ((2 * x + 1) / 16).astype(np.float32))


def similarity_preserving(student, teacher):
    """Σ_ij (G_t - G_s)²_ij / B², with G = F Fᵀ and its rows divided by their L2 norms."""
    matrices = []
    for features in (student, teacher):
        flat = features.reshape(len(features), -1)
        similarities = flat @ flat.T
        matrices.append(similarities / np.linalg.norm(similarities, axis=1, keepdims=True))
    return np.sum((matrices[1] - matrices[0]) ** 2) / len(student) ** 2


def cosines(x):
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    return x @ x.T


def pkt(student, teacher, epsilon=1e-7):
    """mean_ij p_t log((p_t + ε) / (p_s + ε)), with rows of (cosine + 1) / 2 divided by their sums."""
    p, q = ((cosines(x) + 1) / 2 for x in (teacher, student))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    return np.mean(p * np.log((p + epsilon) / (q + epsilon)))


def huber(x):
    return np.where(np.abs(x) < 1, x**2 / 2, np.abs(x) - 0.5)


def rkd_distance(student, teacher):
    """mean_ij huber(d_s - d_t), distances divided by the mean of the positive ones."""
    distances = [np.array([[math.dist(a, b) for a in x] for b in x]) for x in (student, teacher)]
    relative = [d / (d[d > 0].mean() if np.any(d > 0) else 1.0) for d in distances]
    return np.mean(huber(relative[0] - relative[1]))


def rkd_angle(student, teacher):
    """mean_ijk huber of the difference of the cosines at i between j and k, by three loops."""

    def cosine(x, i, j, k):
        a, b = x[j] - x[i], x[k] - x[i]
        lengths = math.hypot(*a) * math.hypot(*b)
        return a @ b / lengths if lengths else 0.0

    triples = itertools.product(range(len(student)), repeat=3)
    return np.mean([huber(cosine(student, *triple) - cosine(teacher, *triple)) for triple in triples])


def correlation_congruence(student, teacher, gamma=0.4, order=2):
    """mean_ij of the squared difference of e^(-2γ) Σ_p (2γ)^p / p! cosine^p."""

    def kernel(x):
        powers = range(order + 1)
        return np.exp(-2 * gamma) * sum((2 * gamma) ** p / math.factorial(p) * cosines(x) ** p for p in powers)

    return np.mean((kernel(student) - kernel(teacher)) ** 2)


def adjacent(student, teacher):
    """mean over neighbours of Σ_d δ_i δ_{i+1}, δ = |f_s - f_t|."""
    delta = np.abs(student - teacher)
    return np.mean([delta[i] @ delta[i + 1] for i in range(len(delta) - 1)]) if len(delta) > 1 else 0.0


ORACLES = {
    'similarity_preserving': similarity_preserving,
    'pkt': pkt,
    'rkd_distance': rkd_distance,
    'rkd_angle': rkd_angle,
    'correlation_congruence': correlation_congruence,
}
every_loss = pytest.mark.parametrize('name', list(ORACLES))
distances = pytest.mark.parametrize('name', ['rkd_distance', 'rkd_angle'])


def value_and_gradients(name, student, teacher, where=None, **options):
    """The value, and its gradients with respect to student and teacher, as numpy arrays."""
    value, *gradients = gradient_checks.value_and_gradients(name, student, teacher, where=where, **options)
    return value, gradients


def assert_equals_oracle(oracle, student, teacher, value, gradients):
    """To 1e-5: values, and gradients by finite differences of the oracle."""
    s, t = student.astype(np.float64), teacher.astype(np.float64)
    np.testing.assert_allclose(value, oracle(s, t), rtol=1e-5, atol=1e-6)
    expected = (
        gradient_checks.central_difference(lambda x: oracle(x, t), s),
        gradient_checks.central_difference(lambda x: oracle(s, x), t),
    )
    for gradient, reference in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(gradient, reference, rtol=1e-5, atol=1e-5 * max(1.0, np.abs(reference).max()))


def distinct(x):
    """Whether no two examples coincide: finite differences fail there."""
    return len(np.unique(x, axis=0)) == len(x)


@every_loss
@EXAMPLES
@given(embeddings(BATCH, 3).filter(distinct), embeddings(BATCH, 2).filter(distinct))
def test_value_and_gradients_equal_the_oracle_for_other_widths(name, student, teacher):
    assert_equals_oracle(ORACLES[name], student, teacher, *value_and_gradients(name, student, teacher))


@every_loss
@EXAMPLES
@given(embeddings(BATCH, 3).filter(distinct), embeddings(BATCH, 2).filter(distinct), arrays(np.bool_, (BATCH,)))
def test_value_and_gradients_equal_the_oracle_on_the_kept_examples(name, student, teacher, where):
    def kept(s, t):
        return ORACLES[name](s[where], t[where]) if where.any() else 0.0

    assert_equals_oracle(kept, student, teacher, *value_and_gradients(name, student, teacher, where))


@every_loss
def test_images_are_flattened(name):
    rng = np.random.default_rng(0)
    student, teacher = (rng.normal(size=shape).astype(np.float32) for shape in ((BATCH, 2, 3, 4), (BATCH, 5, 1, 2)))
    expected = ORACLES[name](*(x.astype(np.float64).reshape(BATCH, -1) for x in (student, teacher)))
    np.testing.assert_allclose(value_and_gradients(name, student, teacher)[0], expected, rtol=1e-5)


@every_loss
@EXAMPLES
@given(embeddings(BATCH, 3), embeddings(BATCH, 2), st.permutations(range(BATCH)))
def test_the_order_of_the_examples_does_not_matter_and_gradients_follow_it(name, student, teacher, order):
    order = np.array(order)
    value, gradients = value_and_gradients(name, student, teacher)
    permuted, permuted_gradients = value_and_gradients(name, student[order], teacher[order])
    np.testing.assert_allclose(permuted, value, rtol=1e-5, atol=1e-6)
    for x, y in zip(gradients, permuted_gradients, strict=True):
        np.testing.assert_allclose(y, x[order], rtol=1e-5, atol=1e-5 * max(1.0, np.abs(x).max()))


@every_loss
@EXAMPLES
@given(embeddings(BATCH, 3), embeddings(BATCH, 2), st.permutations(range(3)), st.permutations(range(2)))
def test_the_order_of_the_channels_does_not_matter(name, student, teacher, first, second):
    value, _ = value_and_gradients(name, student, teacher)
    permuted, _ = value_and_gradients(name, student[:, np.array(first)], teacher[:, np.array(second)])
    np.testing.assert_allclose(permuted, value, rtol=1e-5, atol=1e-6)


@every_loss
@EXAMPLES
@given(embeddings(BATCH, 3).filter(distinct), embeddings(BATCH, 2).filter(distinct), st.integers(0, 2**32 - 1))
def test_rotations_and_positive_scales_do_not_matter(name, student, teacher, seed):
    """Each network may have its own coordinates and its own scale; and shifts, where the loss is on differences."""
    rng = np.random.default_rng(seed)
    rotations = [np.linalg.qr(rng.normal(size=(width, width)))[0] for width in (3, 2)]
    scales = 10.0 ** rng.uniform(-3, 3, size=2)
    shifts = rng.normal(size=2) * name.startswith('rkd')
    moved = [
        (scale * (x.astype(np.float64) @ rotation + shift)).astype(np.float32)
        for x, rotation, scale, shift in zip((student, teacher), rotations, scales, shifts, strict=True)
    ]
    value, _ = value_and_gradients(name, student, teacher)
    np.testing.assert_allclose(value_and_gradients(name, *moved)[0], value, rtol=1e-5, atol=1e-5)


@EXAMPLES
@given(embeddings(BATCH, 3), embeddings(BATCH, 2))
def test_values_lie_within_their_bounds(student, teacher):
    bounds = {'similarity_preserving': 4 / BATCH, 'rkd_angle': 1.5, 'correlation_congruence': 1.0}
    for name in ORACLES:
        value, _ = value_and_gradients(name, student, teacher)
        assert -1e-7 <= value <= bounds.get(name, np.inf)


@every_loss
@EXAMPLES
@given(embeddings(BATCH, 3), st.sampled_from([1.0, 0.1, 3.0]))
def test_equal_relations_give_zero_and_zero_gradients(name, features, scale):
    """As they are for equal features, and for those of another scale."""
    value, gradients = value_and_gradients(name, np.float32(scale) * features, features)
    np.testing.assert_allclose(value, 0, atol=1e-12)
    np.testing.assert_allclose(gradients, np.zeros((2, BATCH, 3)), atol=1e-5)


@every_loss
@EXAMPLES
@given(embeddings(1, 3), embeddings(1, 2))
def test_one_example_has_no_relations(name, student, teacher):
    """That to itself is the same whatever the features, and so is not learnt from."""
    value, gradients = value_and_gradients(name, student, teacher)
    np.testing.assert_allclose(value, 0, atol=1e-12)
    for gradient in gradients:
        np.testing.assert_allclose(gradient, np.zeros(gradient.shape), atol=1e-6)


def extreme_batches():
    """Batches [n, BATCH, 3] at the ends of float32, with zeros among them."""
    features = np.random.default_rng(1).normal(size=(BATCH, 3)).astype(np.float32)
    dead = features * np.array([[0], [1], [1], [0]], np.float32)
    aligned = np.tile(features[:1], (BATCH, 1))
    opposite = aligned * np.array([[1], [-1], [1], [-1]], np.float32)
    fading = features * np.array([[1], [1e-13], [1e-16], [1e-25]], np.float32)
    plain = [
        fading,
        np.zeros_like(features),
        np.ones_like(features),
        features,
        dead,
        aligned,
        opposite,
        features[:, :1] * np.eye(BATCH, 3),
    ]
    return np.stack([*plain, *(1e15 * x for x in plain), *(1e-25 * x for x in plain[1:])]).astype(np.float32)


@every_loss
def test_values_and_gradients_are_finite_for_every_pair_of_extreme_batches(name):
    """Zero examples, zero batches, examples far smaller than others, equal, opposite and orthogonal, at 1e15, 1 and 1e-25."""
    batches = extreme_batches()
    student, teacher = (np.stack(x) for x in zip(*[(s, t) for s in batches for t in batches], strict=True))
    loss = jax.jit(jax.vmap(functools.partial(gradient_checks.with_gradients, name)))
    values, *gradients = jax.device_get(loss(student, teacher))
    assert np.all(np.isfinite(values))
    assert np.all(values >= -1e-6)
    for gradient in gradients:
        assert np.all(np.isfinite(gradient))


@every_loss
@pytest.mark.parametrize('scale', [1e15, 1e-25])
def test_huge_and_tiny_features_are_worth_ordinary_ones(name, scale):
    rng = np.random.default_rng(2)
    student, teacher = (rng.normal(size=(BATCH, width)).astype(np.float32) for width in (3, 2))
    value, (gradient, _) = value_and_gradients(name, student, teacher)
    scaled, (scaled_gradient, _) = value_and_gradients(name, student * np.float32(scale), teacher)
    np.testing.assert_allclose(scaled, value, rtol=1e-5)
    np.testing.assert_allclose(scaled_gradient * np.float32(scale), gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('ratio', [1e-12, 1e-13, 1e-16, 1e-19, 1e-25])
def test_one_example_may_be_much_smaller_than_the_rest(ratio):
    """The scale of an example does not matter to the value, and leaves the gradients finite."""
    student = np.array([[1, 2], [ratio, -ratio], [-1, 1.5]], np.float32)
    teacher = np.array([[1, 0.3], [0.2, 0.5], [0.5, 0.6]], np.float32)
    value, gradients = value_and_gradients('similarity_preserving', student, teacher)
    np.testing.assert_allclose(value, 0.4444534, rtol=1e-4)
    assert all(np.all(np.isfinite(gradient)) for gradient in gradients)


def test_a_zero_example_has_a_row_of_zeros_and_no_gradient():
    """It differs from a row of the teacher's, of norm 1, by 1."""
    student, teacher = np.eye(BATCH, 3, dtype=np.float32), np.eye(BATCH, dtype=np.float32)
    value, (gradient, _) = value_and_gradients('similarity_preserving', student, teacher)
    np.testing.assert_allclose(value, 1 / BATCH**2, rtol=1e-6)
    np.testing.assert_array_equal(gradient[3], np.zeros(3))


@every_loss
def test_an_empty_selection_is_zero_with_zero_gradients(name):
    student, teacher = np.ones((BATCH, 3), np.float32), np.eye(BATCH, 2, dtype=np.float32)
    value, gradients = value_and_gradients(name, student, teacher, np.zeros(BATCH, bool))
    assert value == 0
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, np.zeros(gradient.shape))


def batch(size, width, seed):
    return np.random.default_rng(seed).normal(size=(size, width)).astype(np.float32)


@every_loss
def test_eight_devices_compute_what_one_does(name):
    """Several anchors at a time and several times, too."""
    student, teacher = batch(32, 3, 0), batch(32, 5, 1)
    where = np.arange(32) % 5 > 0
    expected = value_and_gradients(name, student, teacher, where)
    sharding = NamedSharding(jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,)), PartitionSpec('data'))
    value, gradients = value_and_gradients(name, *(jax.device_put(x, sharding) for x in (student, teacher, where)))
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    for gradient, reference in zip(gradients, expected[1], strict=True):
        np.testing.assert_allclose(gradient, reference, rtol=1e-5, atol=1e-5 * np.abs(reference).max())


@distances
@pytest.mark.parametrize('anchors', [1, 5])
def test_the_number_of_anchors_at_a_time_does_not_matter(name, anchors, monkeypatch):
    """Nor does a rest: 13 is no multiple of 5."""
    student, teacher = batch(13, 3, 2), batch(13, 5, 3)
    loss = jax.value_and_grad(getattr(losses, name), argnums=(0, 1))
    at_once = jax.jit(loss)(student, teacher)
    monkeypatch.setattr(_embeddings, '_CHUNK', anchors * 13 * 13)
    for x, y in zip(*map(jax.tree.leaves, (jax.jit(lambda s, t: loss(s, t))(student, teacher), at_once)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('name, width', [('rkd_angle', 64), ('rkd_distance', 256)])
def test_no_array_of_all_triples_exists_forward_or_backward(name, width):
    """It would be 67 MB, and more than one would be needed. Here there are a few of those for the anchors of one step."""
    shape = jax.ShapeDtypeStruct((256, width), jnp.float32)
    loss = jax.jit(jax.value_and_grad(getattr(losses, name), argnums=(0, 1)))
    assert loss.lower(shape, shape).compile().memory_analysis().temp_size_in_bytes < 16e6


@distances
def test_coincident_examples_have_no_distance_and_no_direction_even_where_xla_fuses_what_precedes(name):
    """Normalised inside of the same program, as students' embeddings are: products whose rounding fusion may skip."""
    student, teacher = batch(6, 3, 4), batch(6, 5, 5)
    student[1], teacher[4] = student[0], teacher[3]

    def normalized(x):
        return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=1, keepdims=True))

    loss = jax.jit(jax.value_and_grad(lambda s, t: getattr(losses, name)(normalized(s), normalized(t)), argnums=(0, 1)))
    value, gradients = loss(student, teacher)
    expected = ORACLES[name](*(x / np.linalg.norm(x, axis=1, keepdims=True) for x in (student, teacher)))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for gradient in gradients:
        assert np.abs(gradient).max() < 1


@distances
def test_examples_that_are_near_each_other_but_far_from_zero_keep_their_distances(name):
    """Inner products would have lost them."""
    student, teacher = (np.round(64 * batch(5, width, 6)) / 64 for width in (3, 5))
    moved = (student + 1000).astype(np.float32)
    expected, (gradient, _) = value_and_gradients(name, student, teacher)
    value, (moved_gradient, _) = value_and_gradients(name, moved, teacher)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(moved_gradient, gradient, rtol=1e-4, atol=1e-6)


def test_large_differences_of_distance_count_linearly():
    """The oracle's huber beyond 1, which random batches seldom reach."""
    student, teacher = np.eye(BATCH, dtype=np.float32), batch(BATCH, 1, 0) / 100
    teacher[0] = 1.0
    assert_equals_oracle(rkd_distance, student, teacher, *value_and_gradients('rkd_distance', student, teacher))


@pytest.mark.parametrize('epsilon', [1e-7, 1e-3])
def test_epsilon_keeps_opposite_neighbours_apart(epsilon):
    student = np.array([[1.0, 0.1], [-1.0, -0.1], [0.3, 1.0], [-0.5, 1.0]], np.float32)
    teacher = np.array([[1.0, 0.2], [0.9, 0.4], [1.0, -1.0], [1.0, 1.0]], np.float32)
    value, _ = value_and_gradients('pkt', student, teacher, epsilon=epsilon)
    np.testing.assert_allclose(value, pkt(student.astype(np.float64), teacher.astype(np.float64), epsilon), rtol=1e-5)


def test_near_equal_neighbourhoods_keep_their_digits():
    """As they are after training, at the published weight of 30000."""
    student, teacher = batch(32, 8, 0), batch(32, 8, 0) + batch(32, 8, 1) / 1000
    value, _ = value_and_gradients('pkt', student, teacher)
    np.testing.assert_allclose(value, pkt(student.astype(np.float64), teacher.astype(np.float64)), rtol=1e-3)


@pytest.mark.parametrize('gamma, order', [(0.4, 2), (1.5, 1), (0.7, 5)])
def test_the_kernel_of_correlation_congruence_has_all_its_terms(gamma, order):
    student, teacher = batch(BATCH, 3, 7), batch(BATCH, 2, 8)
    oracle = functools.partial(correlation_congruence, gamma=gamma, order=order)
    assert_equals_oracle(
        oracle, student, teacher, *value_and_gradients('correlation_congruence', student, teacher, gamma=gamma, order=order)
    )


def test_the_kernel_of_correlation_congruence_tends_to_the_gaussian():
    """exp(-γ ||x - y||²) of unit vectors."""
    student, teacher = batch(BATCH, 3, 7), batch(BATCH, 2, 8)
    units = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (student, teacher)]
    kernels = [np.exp(-0.4 * np.sum((x[:, None] - x[None]) ** 2, axis=2)) for x in units]
    value, _ = value_and_gradients('correlation_congruence', student, teacher, order=12)
    np.testing.assert_allclose(value, np.mean((kernels[0] - kernels[1]) ** 2), rtol=1e-5)


@EXAMPLES
@given(embeddings(BATCH, 3), embeddings(BATCH, 3), arrays(np.bool_, (BATCH,)))
def test_adjacent_products_are_those_of_the_kept_neighbours(student, teacher, where):
    teacher = teacher + np.float32(1 / 64)  # never equal to the student, where |x| has no derivative
    options = {'variant': 'adjacent'}
    assert_equals_oracle(
        lambda s, t: adjacent(s[where], t[where]),
        *(student, teacher),
        *value_and_gradients('correlation_congruence', student, teacher, where, **options),
    )
    value, gradients = value_and_gradients('correlation_congruence', student, teacher, **options)
    assert_equals_oracle(adjacent, student, teacher, value, gradients)


def test_adjacent_products_of_one_example_or_of_equal_ones_are_zero():
    for x in (batch(1, 3, 0), batch(BATCH, 3, 0)):
        for result in jax.tree.leaves(value_and_gradients('correlation_congruence', x, x, variant='adjacent')):
            np.testing.assert_array_equal(result, np.zeros(result.shape))


@pytest.mark.parametrize(
    'name, options, message',
    [
        ('pkt', {'epsilon': 0.0}, 'epsilon must be positive'),
        ('correlation_congruence', {'gamma': -1.0}, 'gamma must be positive'),
        ('correlation_congruence', {'order': 0}, 'order must be positive'),
        ('correlation_congruence', {'variant': 'other'}, "variant must be 'kernel' or 'adjacent', got 'other'"),
        ('correlation_congruence', {'variant': 'adjacent'}, r'student \(4, 3\) and teacher \(4, 2\) must have the same width'),
    ],
)
def test_hyperparameters_out_of_range_are_refused(name, options, message):
    with pytest.raises(ValueError, match=f'^{name}: {message}[^\n]*$'):
        getattr(losses, name)(np.ones((4, 3), np.float32), np.ones((4, 2), np.float32), **options)
