"""Losses on statistics of activations against float64 oracles from the papers' formulas, and what these losses promise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.feature_checks import activations, check_against_oracle, pool_to_smaller
from helpers.gradient_checks import value_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kdjax import losses
from kdjax.losses import _singular_vectors

BATCH = 2
EXAMPLES = settings(max_examples=8, deadline=None, derandomize=True, database=None)
ON_PAIRS = pytest.mark.parametrize('name', ['nst', 'singular_vectors'])


def fsp_oracle(s_in, s_out, t_in, t_out, where=None):
    """The mean square of the difference of two matrices, each the mean over positions of in ⊗ out."""
    matrices = []
    for before, after in ((s_in, s_out), (t_in, t_out)):
        before, after = pool_to_smaller(before, after)
        keep = np.ones(before.shape[:2], bool) if where is None else where
        if not keep.any():
            return 0.0
        matrices.append(np.mean([np.outer(x, y) for x, y in zip(before[keep], after[keep], strict=True)], axis=0))
    return np.mean((matrices[0] - matrices[1]) ** 2)


def nst_oracle(s, t, where):
    """The means of (a · b)² over all pairs of normalised channels, pair by pair."""
    s, t = (x[where].T for x in pool_to_smaller(s, t))
    if not where.any():
        return 0.0
    s, t = ([a / np.linalg.norm(a) for a in x] for x in (s, t))
    within_t, within_s, between = (np.mean([[np.dot(a, b) ** 2 for a in x] for b in y]) for x, y in ((t, t), (s, s), (s, t)))
    return within_t + within_s - 2 * between


def singular_vectors_oracle(s, t, where, *, rank=1):
    """Σ_k σ_k² / Σσ² min over signs and the student's vectors of ||u_t,k ∓ u_s,j||², by numpy's decomposition."""
    (u_s, _, _), (u_t, sigma, _) = (np.linalg.svd(x[where], full_matrices=False) for x in pool_to_smaller(s, t))
    u_s, u_t, weights = u_s[:, : rank + 3], u_t[:, :rank], sigma[:rank] ** 2
    closest = [min(np.sum((u - sign * v) ** 2) for v in u_s.T for sign in (1, -1)) for u in u_t.T]
    return np.dot(weights, closest) / np.sum(weights)


def with_spectrum(rng, height, width, channels):
    """Activations whose singular values are far apart, so that singular vectors are easy to tell and to differentiate."""
    positions, count = height * width, min(height * width, channels)
    bases = [np.linalg.qr(rng.normal(size=(BATCH, size, count)))[0] for size in (positions, channels)]
    matrices = bases[0] * 2.0 * 0.7 ** np.arange(count) @ np.swapaxes(bases[1], 1, 2)
    return matrices.reshape(BATCH, height, width, channels).astype(np.float32)


@pytest.mark.parametrize(
    'student_in, student_out, teacher_in, teacher_out',
    [
        ((2, 3), (2, 3), (2, 3), (2, 3)),
        ((4, 4), (2, 3), (3, 2), (3, 2)),  # other sizes of both networks; whole and other ratios
        ((2, 1), (3, 2), (2, 4), (3, 2)),  # the one after is the larger, and each is along one axis
    ],
)
@settings(EXAMPLES, max_examples=5)
@given(data=st.data())
def test_fsp_values_and_gradients_equal_the_oracle(data, student_in, student_out, teacher_in, teacher_out):
    sizes_and_channels = ((student_in, 2), (student_out, 3), (teacher_in, 2), (teacher_out, 3))
    maps = [data.draw(activations(BATCH, *size, channels)) for size, channels in sizes_and_channels]
    check_against_oracle(fsp_oracle, maps, value_and_gradients('fsp', *maps))


@settings(EXAMPLES, max_examples=5)
@given(data=st.data())
def test_fsp_values_and_gradients_equal_the_oracle_under_any_mask(data):
    maps = [data.draw(activations(BATCH, *shape)) for shape in ((2, 3, 2), (2, 3, 3), (2, 6, 2), (4, 3, 3))]
    where = data.draw(arrays(np.bool_, (BATCH, 2, 3)))
    check_against_oracle(fsp_oracle, [*maps, where], value_and_gradients('fsp', *maps, where=where[..., None]))


@EXAMPLES
@given(activations(BATCH, 2, 2, 3), activations(BATCH, 2, 2, 2), activations(BATCH, 2, 2, 3), st.permutations(range(4)))
def test_fsp_does_not_see_where_things_are_and_is_of_fourth_order(before, after, other, order):
    values, *_ = value_and_gradients('fsp', before, after, other, after)
    moved = [x.reshape(BATCH, 4, -1)[:, np.array(order)].reshape(x.shape) for x in (before, after)]
    np.testing.assert_allclose(value_and_gradients('fsp', *moved, other, after)[0], values, rtol=1e-5, atol=1e-5)
    twice = value_and_gradients('fsp', *(2 * x for x in (before, after, other, after)))[0]
    np.testing.assert_allclose(twice, 16 * values, rtol=1e-5)
    for result in value_and_gradients('fsp', before, after, before, after):
        np.testing.assert_array_equal(result, np.zeros(result.shape))


def test_fsp_says_what_to_do_about_other_channels_and_batches():
    before, after = np.ones((2, 4, 4, 3), np.float32), np.ones((2, 4, 4, 5), np.float32)
    for maps in ((before, after, before, before), (before, after, after, after)):
        with pytest.raises(ValueError, match=r'^fsp: [^\n]*same channels [^\n]*connectors[^\n]*$'):
            losses.fsp(*maps)
    with pytest.raises(
        ValueError, match=r'^fsp: \(2, 4, 4, 3\) before and \(1, 4, 4, 5\) after must have the same batch [^\n]+$'
    ):
        losses.fsp(before, after[:1], before, after[:1])


@pytest.mark.parametrize(
    'student_shape, teacher_shape',
    [
        ((2, 2, 3), (2, 2, 2)),  # fewer positions than channels
        ((3, 2, 2), (3, 2, 3)),  # more positions than channels
        ((2, 4, 1), (5, 2, 3)),  # each is the larger along one axis
    ],
)
@EXAMPLES
@given(data=st.data())
def test_nst_values_and_gradients_equal_the_oracle_under_any_mask(data, student_shape, teacher_shape):
    student, teacher = (data.draw(activations(BATCH, *shape)) for shape in (student_shape, teacher_shape))
    where = data.draw(arrays(np.bool_, (BATCH, *map(min, student_shape[:2], teacher_shape[:2]))))
    if student_shape[1] != teacher_shape[1]:
        # Odd multiples of 1/16 may average to zero in all that is kept, and the norm has no derivative there.
        student, teacher = np.abs(student), np.abs(teacher)
    check_against_oracle(
        nst_oracle, (student, teacher, where), value_and_gradients('nst', student, teacher, where=where[..., None])
    )


@pytest.mark.parametrize('size', [(2, 2), (3, 4)])
@EXAMPLES
@given(data=st.data())
def test_nst_compares_sets_of_channels(data, size):
    """Their order, sign, scale and multiplicity, and the order of positions, do not matter."""
    student, teacher = data.draw(activations(BATCH, *size, 3)), data.draw(activations(BATCH, *size, 4))
    values, *_ = value_and_gradients('nst', student, teacher)
    assert np.all(values >= -1e-6)
    assert np.all(values <= 2 + 1e-6)
    order, other = (np.array(data.draw(st.permutations(range(count)))) for count in (3, 4))
    scales = data.draw(arrays(np.float32, (BATCH, 1, 1, 3), elements=st.sampled_from([-100.0, -1.0, 0.5, 30.0])))
    moved, *_ = value_and_gradients('nst', (scales * student)[:, ::-1, :, order], teacher[:, ::-1, :, other])
    np.testing.assert_allclose(moved, values, rtol=1e-5, atol=2e-6)
    repeated, *_ = value_and_gradients('nst', np.concatenate([student, -student], axis=-1), teacher)
    np.testing.assert_allclose(repeated, values, rtol=1e-5, atol=2e-6)
    for result in value_and_gradients('nst', student, student[..., order]):
        np.testing.assert_allclose(result, np.zeros(result.shape), atol=1e-5)


# Fewer positions than channels; more; other sizes. The first two under a mask.
@pytest.mark.parametrize(
    'student_shape, teacher_shape', [((2, 2, 6), (2, 2, 5)), ((3, 4, 5), (3, 4, 3)), ((2, 4, 6), (2, 2, 6))]
)
@pytest.mark.parametrize('rank', [1, 2])
def test_singular_vectors_values_and_gradients_equal_the_oracle(student_shape, teacher_shape, rank):
    rng = np.random.default_rng(0)
    student, teacher = with_spectrum(rng, *student_shape), with_spectrum(rng, *teacher_shape)
    where = np.ones((BATCH, *np.minimum(student_shape, teacher_shape)[:2]), bool)
    where[1, 0, 0] = student_shape == teacher_shape
    oracle = functools.partial(singular_vectors_oracle, rank=rank)
    computed = value_and_gradients('singular_vectors', student, teacher, where=where[..., None], rank=rank)
    check_against_oracle(oracle, (student, teacher, where), computed, rtol=5e-5)


@EXAMPLES
@given(st.integers(0, 2**32 - 1), st.permutations(range(6)))
def test_singular_vectors_do_not_see_scale_and_coordinates_of_channels(seed, order):
    """Nor a common order of positions."""
    rng = np.random.default_rng(seed)
    student, teacher = with_spectrum(rng, 2, 3, 4), with_spectrum(rng, 2, 3, 7)
    values, *_ = value_and_gradients('singular_vectors', student, teacher, rank=2)
    assert np.all(values >= 0)
    assert np.all(values <= 2)
    moved = []
    for x, scale in ((student, -1e3), (teacher, 1e-3)):
        rotation = np.linalg.qr(rng.normal(size=(x.shape[-1], x.shape[-1])))[0]
        moved.append((scale * x.reshape(BATCH, 6, -1)[:, np.array(order)] @ rotation).reshape(x.shape).astype(np.float32))
    np.testing.assert_allclose(value_and_gradients('singular_vectors', *moved, rank=2)[0], values, rtol=1e-4, atol=1e-5)
    equal, *gradients = value_and_gradients('singular_vectors', teacher, teacher, rank=2)
    assert np.all(equal >= 0)
    for result in (equal, *gradients):
        np.testing.assert_allclose(result, np.zeros(result.shape), atol=1e-5)


def test_a_pattern_of_the_teacher_is_found_among_the_first_four_of_the_student():
    """Whatever its rank there; the fifth is not looked at, and what is orthogonal to all costs 2."""
    patterns = np.eye(6, dtype=np.float32)
    student = np.tile(patterns * np.array([5, 4, 3, 2, 1, 0], np.float32), (6, 1, 1)).reshape(6, 2, 3, 6)
    teacher = (patterns[:, :, None] * np.array([1, 2], np.float32)).reshape(6, 2, 3, 2)
    np.testing.assert_allclose(jax.jit(losses.singular_vectors)(student, teacher), [0, 0, 0, 0, 2, 2], atol=1e-6)


@pytest.mark.parametrize('rank', [2, 9])
def test_the_teachers_patterns_count_by_their_squared_singular_values(rank):
    """There are but two: a rank above that takes what there is."""
    teacher = np.tile(np.diag([2.0, 1.0, 0.0, 0.0]).astype(np.float32).reshape(1, 2, 2, 4), (3, 1, 1, 1))
    student = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [-1, 0, 0, 0]], np.float32).reshape(3, 2, 2, 1)
    values = jax.jit(functools.partial(losses.singular_vectors, rank=rank))(student, teacher)
    np.testing.assert_allclose(values, [2 * 0.2, 2 * 0.8, 2 * 0.2], rtol=1e-5)


@pytest.mark.parametrize('strength, expected', [(1e-2, 0), (1e-4, 2), (0, 2)])
def test_a_pattern_too_weak_to_tell_from_rounding_counts_as_missing(strength, expected):
    """Its squared share is 1e-4, 1e-8 and 0; the last student is zero altogether."""
    student, teacher = np.zeros((1, 2, 2, 4), np.float32), np.zeros((1, 2, 2, 4), np.float32)
    student[0, 0, 0, 0], student[0, 0, 1, 1], teacher[0, 0, 1] = strength > 0, strength, 1
    values, *gradients = value_and_gradients('singular_vectors', student, teacher)
    np.testing.assert_allclose(values, [expected], atol=1e-6)
    assert np.all(np.isfinite(gradients))


@pytest.mark.parametrize('gap', [0.0, 1e-5, 1e-4, 1e-2, 0.5])
def test_eigenvectors_turn_as_fast_as_the_gap_allows_but_not_faster(gap):
    """The damped rule gap / (gap² + 1e-8): 0 for equal eigenvalues, at most 5000, and 1 / gap for large gaps."""
    symmetric = jnp.diag(jnp.array([0.25, 0.25 + gap], jnp.float32))[None]
    crossed = jnp.array([[[0.0, 1.0], [1.0, 0.0]]])
    (values, vectors), (rates, turns) = jax.jvp(_singular_vectors._eigenvectors, (symmetric,), (crossed,))
    gap = float(values[0, 1] - values[0, 0])
    np.testing.assert_allclose(np.abs(turns[0]), gap / (gap**2 + 1e-8) * np.abs(vectors[0, ::-1]), rtol=1e-4)
    assert np.all(np.abs(turns) <= 5001)
    np.testing.assert_allclose(rates, np.zeros((1, 2)), atol=1e-6)


def extreme_maps():
    """Examples [n, 2, 2, 3] at the ends of float32, with zeros, equal singular values and dependent channels among them."""
    rng = np.random.default_rng(1)
    features = rng.normal(size=(2, 2, 3))
    spike = np.zeros((2, 2, 3))
    spike[0, 1, 2] = 1.0
    ranging = features * 10.0 ** np.array([[-20, -10], [0, 10]])[..., None]
    dependent = np.repeat(features[..., :1], 3, axis=-1)
    plain = [np.ones((2, 2, 3)), features, np.maximum(features, 0), spike, dependent, np.eye(4, 3).reshape(2, 2, 3)]
    return np.stack(
        [np.zeros((2, 2, 3)), ranging, *plain, *(scale * x for scale in (1e15, 1e-25) for x in plain)], dtype=np.float32
    )


@ON_PAIRS
@pytest.mark.parametrize('channels', [3, 1])
def test_values_and_gradients_are_finite_for_every_pair_of_extreme_maps(name, channels):
    """With four positions and three channels; with one channel."""
    rows = extreme_maps()[..., -channels:]
    student, teacher = (np.stack(x) for x in zip(*[(s, t) for s in rows for t in rows], strict=True))
    options = {'rank': 2} if name == 'singular_vectors' else {}
    values, *gradients = value_and_gradients(name, student, teacher, **options)
    assert np.all(np.isfinite(values))
    assert np.all(values >= -1e-6)
    assert np.all(values <= 2 + 1e-6)
    assert values[0] == 0
    for gradient in gradients:
        assert np.all(np.isfinite(gradient))
        np.testing.assert_array_equal(gradient[0], np.zeros_like(rows[0]))


@ON_PAIRS
def test_huge_and_tiny_maps_are_worth_ordinary_ones_and_what_is_masked_does_not_set_the_scale(name):
    student, teacher = with_spectrum(np.random.default_rng(2), 2, 2, 3), with_spectrum(np.random.default_rng(3), 2, 2, 4)
    where = np.array([False, True])[:, None, None]
    values, gradient, _ = value_and_gradients(name, student, teacher, where=where | True)
    kept, *_ = value_and_gradients(name, student, teacher, where=where)
    for scale in (np.float32(1e15), np.float32(1e-25)):
        scaled, scaled_gradient, _ = value_and_gradients(name, student * scale, teacher, where=where | True)
        np.testing.assert_allclose(scaled, values, rtol=1e-4)
        np.testing.assert_allclose(scaled_gradient * scale, gradient, rtol=1e-3, atol=1e-5)
        masked = np.where(where, student, student * scale)
        np.testing.assert_allclose(value_and_gradients(name, masked, teacher, where=where)[0], kept, rtol=1e-4)


def test_fsp_of_zeros_has_no_gradient():
    for result in value_and_gradients('fsp', *[np.zeros((1, 2, 2, 3), np.float32)] * 4):
        np.testing.assert_array_equal(result, np.zeros(result.shape))


@pytest.mark.parametrize('rank', [0, -1])
def test_ranks_must_be_positive(rank):
    maps = np.ones((1, 2, 2, 3), np.float32)
    with pytest.raises(ValueError, match=rf'^singular_vectors: rank must be positive, got {rank}$'):
        losses.singular_vectors(maps, maps, rank=rank)
