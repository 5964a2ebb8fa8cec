"""Contrastive losses against float64 oracles; the draws of negatives and the memory, against what they promise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import gradient_checks
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kdjax import losses

BATCH, NEGATIVES, WIDTH, BANK = 4, 6, 3, 20
NORMALIZERS = 'student_normalizer', 'teacher_normalizer'


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def info_nce(student, teacher, temperature=0.07):
    """The mean over examples and directions of -log of the softmax at the example's own."""
    total = 0.0
    for anchors, others in ((student, teacher), (teacher, student)):
        for i, anchor in enumerate(unit(anchors)):
            exponentials = np.exp(unit(others) @ anchor / temperature)
            total -= np.log(exponentials[i] / exponentials.sum())
    return total / (2 * len(student))


def crd(student, teacher, student_memory, teacher_memory, normalizers=None, temperature=0.07, epsilon=1e-7):
    """-log h of the positive - Σ log(1 - h) of the negatives, h = p / (p + K / n + ε), p = exp(⟨v, w⟩ / T) / Z, both ways."""
    total = np.zeros(len(student))
    for direction, (embedding, memory) in enumerate(((student, teacher_memory), (teacher, student_memory))):
        exponentials = np.array([np.exp(rows @ v / temperature) for rows, v in zip(memory, unit(embedding), strict=True)])
        z = BANK * exponentials.mean() if normalizers is None else normalizers[direction]
        h = exponentials / z / (exponentials / z + (memory.shape[1] - 1) / BANK + epsilon)
        total -= np.log(h[:, 0]) + np.log(1 - h[:, 1:]).sum(1)
    return total


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def batch(seed=0):
    """Student and teacher, and rows of norm 1 from both banks."""
    memories = unit(draw(2, BATCH, 1 + NEGATIVES, WIDTH, seed=seed + 1))
    return *draw(2, BATCH, WIDTH, seed=seed), *memories


def value_and_gradients(name, *arrays, **options):
    options = {'examples': BANK, **options} if name == 'crd' else options
    value, *gradients = gradient_checks.value_and_gradients(name, *arrays, **options)
    return value, gradients


def assert_equals_oracle(oracle, arrays, values, gradients):
    """To 1e-5, with gradients by finite differences of the oracle."""
    doubles = [x.astype(np.float64) for x in arrays]
    np.testing.assert_allclose(values, oracle(*doubles), rtol=1e-5, atol=1e-6)
    for i, gradient in enumerate(gradients):
        expected = gradient_checks.central_difference(
            lambda x, i=i: np.sum(oracle(*doubles[:i], x, *doubles[i + 1 :])), doubles[i]
        )
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5 * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize('temperature', [0.07, 1.0])
@pytest.mark.parametrize('where', [None, np.array([True, False, True, True])])
def test_info_nce_equals_the_oracle(temperature, where):
    arrays = batch()[:2]
    kept = slice(None) if where is None else where

    def oracle(s, t):
        return info_nce(s[kept], t[kept], temperature)

    assert_equals_oracle(oracle, arrays, *value_and_gradients('info_nce', *arrays, temperature=temperature, where=where))


def test_info_nce_is_symmetric_and_does_not_know_the_order_or_the_scale():
    student, teacher, *_ = batch()
    value, _ = value_and_gradients('info_nce', student, teacher)
    order = np.array([2, 0, 3, 1])
    for other in ((teacher, student), (student[order], teacher[order]), (1e15 * student, 1e-25 * teacher)):
        np.testing.assert_allclose(value_and_gradients('info_nce', *np.float32(other))[0], value, rtol=1e-5)


def test_info_nce_of_one_example_is_zero():
    student, teacher, *_ = batch()
    for result in jax.tree.leaves(value_and_gradients('info_nce', student[:1], teacher[:1])):
        np.testing.assert_allclose(result, np.zeros(result.shape), atol=1e-6)


def test_info_nce_prefers_the_teacher_s_own_embeddings():
    """Gradient steps bring the student's embeddings to the teacher's."""
    student, teacher, *_ = batch()
    for _ in range(200):
        value, (gradient, _) = value_and_gradients('info_nce', student, teacher, temperature=0.1)
        student = student - 0.1 * gradient
    assert value < 1.1 * info_nce(teacher, teacher, 0.1)
    assert np.all(np.argmax(unit(student) @ unit(teacher).T, axis=1) == np.arange(BATCH))


@pytest.mark.parametrize('temperature, epsilon', [(0.07, 1e-7), (0.5, 1e-2)])
def test_crd_equals_the_oracle_with_given_normalizers(temperature, epsilon):
    """Values and all four gradients."""
    arrays, normalizers = batch(), (BANK * 2.5, BANK * 1e3)
    options = {'temperature': temperature, 'epsilon': epsilon}
    results = value_and_gradients('crd', *arrays, **dict(zip(NORMALIZERS, normalizers, strict=True)), **options)
    assert_equals_oracle(functools.partial(crd, normalizers=normalizers, **options), arrays, *results)


def test_without_normalizers_crd_takes_those_of_the_batch_as_constants():
    arrays = batch()
    values, gradients = value_and_gradients('crd', *arrays)
    np.testing.assert_allclose(values, crd(*(x.astype(np.float64) for x in arrays)), rtol=1e-5)
    student, teacher, student_memory, teacher_memory = arrays
    pairs = (student, teacher_memory), (teacher, student_memory)
    first = [losses.crd_normalizer(*pair, examples=BANK) for pair in pairs]
    fixed, fixed_gradients = value_and_gradients('crd', *arrays, **dict(zip(NORMALIZERS, first, strict=True)))
    np.testing.assert_allclose(fixed, values, rtol=1e-5)
    for x, y in zip(fixed_gradients, gradients, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-4)


def test_crd_normalizer_is_the_size_of_the_bank_times_the_mean_exponential_of_the_kept():
    student, _, _, memory = batch()
    where = np.array([True, True, False, True])
    z = losses.crd_normalizer(student, memory, examples=BANK, temperature=0.1, where=where)
    scores = np.einsum('bd,bkd->bk', unit(student.astype(np.float64)), memory)[where]
    np.testing.assert_allclose(z, BANK * np.exp(scores / 0.1).mean(), rtol=1e-5)
    gradient = jax.grad(lambda x: losses.crd_normalizer(x, memory, examples=BANK))(student)
    np.testing.assert_array_equal(gradient, np.zeros_like(student))


def test_crd_under_a_mask_is_that_of_the_kept_and_zero_for_others():
    arrays, where = batch(), np.array([True, False, True, True])
    masked, gradients = value_and_gradients('crd', *arrays, where=where)
    sliced, sliced_gradients = value_and_gradients('crd', *(x[where] for x in arrays))
    np.testing.assert_allclose(masked[where], sliced, rtol=1e-5)
    assert masked[1] == 0
    for x, y in zip(gradients, sliced_gradients, strict=True):
        np.testing.assert_allclose(x[where], y, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(x[1], np.zeros(x[1].shape))


@pytest.mark.parametrize('temperature', [0.07, 0.005])
def test_contrastive_losses_are_finite_at_the_extremes(temperature):
    """Zero, equal and opposite embeddings, and exponentials that float32 does not hold."""
    student = np.array([[0, 0, 0], [1e15, 0, 0], [-1e-25, 0, 0], [1, 1, 1]], np.float32)
    memory = np.broadcast_to(unit(np.array([[1, 0, 0], [-1, 0, 0], [1, 1, 1]], np.float32)), (BATCH, 3, 3))
    for teacher in (student, student[::-1].copy(), -student):
        for results in (
            value_and_gradients('info_nce', student, teacher, temperature=temperature),
            value_and_gradients('crd', student, teacher, memory, -memory, temperature=temperature),
        ):
            assert np.all(results[0] >= 0)
            assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(results))


def sharded(tree):
    sharding = NamedSharding(jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,)), PartitionSpec('data'))
    return jax.device_put(tree, sharding)


@pytest.mark.parametrize('name', ['info_nce', 'crd'])
def test_eight_devices_compute_what_one_does(name):
    arrays = (*draw(2, 16, WIDTH), *unit(draw(2, 16, 5, WIDTH, seed=1)))[: 4 if name == 'crd' else 2]
    where = np.arange(16) % 5 > 0
    expected, expected_gradients = value_and_gradients(name, *arrays, where=where)
    values, gradients = value_and_gradients(name, *sharded(arrays), where=sharded(where))
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    for x, y in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * np.abs(y).max())


LABELS = np.array([3, 0, -1, 3, 7, 0, 3, -1, 3, 7, 0, 3])


def test_negatives_are_of_other_classes_and_all_of_them_are_equally_likely(key):
    """Unlabelled examples have all negatives but themselves, and are negatives of all others."""
    indices, size = np.arange(len(LABELS)), 20_000
    drawn = np.asarray(jax.jit(losses.crd_negatives, static_argnums=3)(key, indices, losses.class_index(LABELS), size))
    assert drawn.shape == (len(LABELS), size)
    for i, row in enumerate(drawn):
        others = np.flatnonzero((LABELS[i] != LABELS) | ((LABELS < 0) & (indices != i)))
        counts = np.bincount(row, minlength=len(LABELS))
        assert set(np.flatnonzero(counts)) == set(others)
        # Five standard deviations of the binomial.
        np.testing.assert_allclose(counts[others], size / len(others), atol=5 * np.sqrt(size / len(others)))


def test_negatives_follow_the_indices_and_the_key(key):
    index = losses.class_index(LABELS)
    drawn = losses.crd_negatives(key, jnp.array([4, 4, 1]), index, 50)
    assert not np.isin(LABELS[np.asarray(drawn[:2])], 7).any()
    assert not np.isin(LABELS[np.asarray(drawn[2])], 0).any()
    assert np.any(drawn[0] != drawn[1])
    np.testing.assert_array_equal(losses.crd_negatives(key, jnp.array([4, 4, 1]), index, 50), drawn)
    assert drawn.dtype == jnp.int32


def test_two_classes_of_one_example_each_have_each_other(key):
    drawn = losses.crd_negatives(key, np.array([0, 1]), losses.class_index(np.array([5, 5000], np.uint16)), 3)
    np.testing.assert_array_equal(drawn, [[1, 1, 1], [0, 0, 0]])


def test_update_memory_moves_the_rows_of_the_batch_alone():
    bank, new = unit(draw(BANK, WIDTH)), 10 * draw(3, WIDTH, seed=1)
    indices = np.array([19, 0, 7])
    expected = bank.copy()
    expected[indices] = unit(0.3 * bank[indices] + 0.7 * unit(new))
    updated = jax.jit(losses.crd_update_memory)(bank, indices, new, momentum=0.3)
    np.testing.assert_allclose(updated, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(np.delete(updated, indices, 0), np.delete(bank, indices, 0))


def test_indices_that_no_example_has_are_refused_and_nan_where_traced(key):
    bank, new, index = unit(draw(BANK, WIDTH)), draw(3, WIDTH, seed=1), losses.class_index(LABELS)
    for wrong, size, call in [
        (len(LABELS), len(LABELS), lambda indices: losses.crd_negatives(key, indices, index, 3)),
        (-1, BANK, lambda indices: losses.crd_update_memory(bank, indices, new)),
    ]:
        for indices in (np.array([0, wrong, 2]), jnp.array([0, wrong, 2])):
            with pytest.raises(ValueError, match=rf'^crd_\w+: indices must be in \[0, {size}\), got {wrong}$'):
                call(indices)
    for wrong in (-1, BANK):
        indices = np.array([0, wrong, 2])
        drawn = jax.jit(losses.crd_negatives, static_argnums=3)(key, indices, index, 3)
        np.testing.assert_array_equal(drawn == len(LABELS), np.broadcast_to([[False], [True], [False]], drawn.shape))
        updated = jax.jit(losses.crd_update_memory)(bank, indices, new)
        np.testing.assert_array_equal(np.isnan(updated), np.arange(BANK)[:, None] == np.full(WIDTH, BANK - 1))
        kept = jax.jit(losses.crd_update_memory)(bank, indices, new, where=np.array([True, False, True]))
        np.testing.assert_allclose(kept, losses.crd_update_memory(bank, indices[::2], new[::2]), rtol=1e-6)


def test_crd_does_not_see_rows_of_masked_examples():
    student, teacher, *memories = batch()
    where = np.array([True, False] * BATCH)[:BATCH]
    expected = value_and_gradients('crd', student, teacher, *memories, where=where)
    memories = [np.where(where[:, None, None], memory, np.nan).astype(np.float32) for memory in memories]
    results = value_and_gradients('crd', student, teacher, *memories, where=where)
    for result, reference in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(result, reference)


def test_update_memory_leaves_the_rows_of_masked_examples():
    """Even of those that repeat a kept one, as padding of the last batch does."""
    bank, new = unit(draw(BANK, WIDTH)), draw(4, WIDTH, seed=1)
    where = np.array([True, True, False, False])
    updated = losses.crd_update_memory(bank, np.array([5, 2, 2, 0]), new, where=where)
    np.testing.assert_array_equal(updated, losses.crd_update_memory(bank, np.array([5, 2]), new[:2]))


def test_a_bank_may_be_sharded_over_its_rows_and_stays_so():
    bank, new, indices = unit(draw(24, WIDTH)), draw(8, WIDTH, seed=1), np.array([0, 3, 23, 11, 8, 7, 16, 15])
    expected = losses.crd_update_memory(bank, indices, new)
    updated = jax.jit(losses.crd_update_memory)(sharded(bank), *sharded((indices, new)))
    assert updated.sharding.spec[0] == 'data'
    np.testing.assert_allclose(updated, expected, rtol=1e-6, atol=1e-7)


ONES = np.ones((BATCH, WIDTH), np.float32)
MEMORY = np.ones((BATCH, 2, WIDTH), np.float32)


@pytest.mark.parametrize(
    'call, message',
    [
        (lambda: losses.info_nce(ONES, ONES, temperature=0.0), 'info_nce: temperature must be positive'),
        (
            lambda: losses.info_nce(ONES, ONES[:, :2]),
            r'info_nce: student \(4, 3\) and teacher \(4, 2\) must have the same width',
        ),
        (lambda: losses.crd(ONES, ONES, MEMORY, MEMORY, examples=0), 'crd: examples must be positive'),
        (
            lambda: losses.crd(ONES, ONES, MEMORY, MEMORY[:2], examples=9),
            r'crd: teacher_memory \(2, 2, 3\) must be \[4, 1 \+ K, 3\]',
        ),
        (lambda: losses.crd(ONES, ONES, MEMORY[:, :1], MEMORY, examples=9), r'crd: student_memory \(4, 1, 3\) must be'),
        (lambda: losses.crd_normalizer(ONES, MEMORY[0], examples=9), r'crd_normalizer: memory \(2, 3\) must be'),
        (lambda: losses.class_index(np.zeros(5, int)), 'class_index: all examples are of one class'),
        (lambda: losses.class_index(np.zeros(5)), r'class_index: labels must be integers \[examples\], got float64 \(5,\)'),
        (lambda: losses.class_index(np.zeros((5, 2), int)), r'class_index: labels must be integers'),
        (
            lambda: losses.crd_negatives(None, ONES[0], None, 1),
            r'crd_negatives: indices must be integers \[batch\], got float32 \(3,\)',
        ),
        (
            lambda: losses.crd_update_memory(ONES, np.arange(2), ONES),
            r'crd_update_memory: embedding \(4, 3\) must be \[batch, channels\]',
        ),
    ],
)
def test_mistakes_are_told_in_one_line(call, message):
    with pytest.raises(ValueError, match=f'^{message}[^\n]*$'):
        call()
