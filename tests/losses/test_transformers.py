"""Losses on transformers against float64 oracles written from the papers' formulas, and the properties that these promise."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import gradient_checks
from helpers.oracles import kl, log_softmax
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kdjax import losses

BATCH, HEADS, TOKENS, WIDTH = 2, 2, 4, 3
EXAMPLES = settings(max_examples=8, deadline=None, derandomize=True, database=None)


def cosine_oracle(s, t):
    """The mean over the tokens [L, D] of 1 - cos."""
    return np.mean(1 - np.sum(s * t, axis=-1) / np.linalg.norm(s, axis=-1) / np.linalg.norm(t, axis=-1))


def scores_oracle(s, t):
    """The mean of (A_s - A_t)² over [H, L, L]."""
    return np.mean((s - t) ** 2)


def attention_oracle(s, t):
    """The mean over heads and queries of KL(A_t || A_s)."""
    return np.mean(kl(log_softmax(t), log_softmax(s)))


def relations_oracle(s, t):
    """The same of softmax(V Vᵀ / √d) for values [H, L, D]."""
    return attention_oracle(*(np.stack([v @ v.T / np.sqrt(v.shape[-1]) for v in values]) for values in (s, t)))


# name: loss, options, oracle on one example without padding, shapes, axes of the tokens in one example
CASES = {
    'hidden_cosine': ('hidden_cosine', {}, cosine_oracle, (TOKENS, WIDTH), (TOKENS, WIDTH), (0,)),
    'mean_square': ('attention_maps', {}, scores_oracle, (HEADS, TOKENS, TOKENS), (HEADS, TOKENS, TOKENS), (1, 2)),
    'kl': (
        'attention_maps',
        {'variant': 'kl'},
        attention_oracle,
        (HEADS, TOKENS, TOKENS),
        (HEADS, TOKENS, TOKENS),
        (1, 2),
    ),
    'value_relations': ('value_relations', {}, relations_oracle, (HEADS, TOKENS, WIDTH), (HEADS, TOKENS, WIDTH + 2), (1,)),
}
every_case = pytest.mark.parametrize('case', list(CASES))


def value_and_gradients(case, student, teacher, where=None):
    """The values [batch], and the gradients of their sum with respect to student and teacher, as numpy arrays."""
    name, options, *_ = CASES[case]
    return gradient_checks.value_and_gradients(name, student, teacher, where=where, **options)


def inputs(case, seed=0):
    """Random student and teacher."""
    rng = np.random.default_rng(seed)
    return [(1.5 * rng.normal(size=(BATCH, *shape))).astype(np.float32) for shape in CASES[case][3:5]]


def along_tokens(case, select, x):
    """Applies `select(x, axis)` to every axis of tokens of a batch."""
    return functools.reduce(lambda x, axis: select(x, axis + 1), CASES[case][5], x)


def by_examples(case, student, teacher, where):
    """The oracle on each example with its padding cut off."""
    values = []
    for s, t, keep in zip(student, teacher, where, strict=True):
        cut = [along_tokens(case, lambda x, axis, keep=keep: np.compress(keep, x, axis), x[None])[0] for x in (s, t)]
        values.append(CASES[case][2](*cut) if keep.any() else 0.0)
    return np.array(values)


def example_gradient(function, x, step=1e-6):
    """Central differences of a function whose value for an example depends on that example of `x` alone."""
    gradient = np.zeros(x.shape)
    for index in np.ndindex(x.shape[1:]):
        moved = np.zeros(x.shape[1:])
        moved[index] = step
        gradient[(slice(None), *index)] = (function(x + moved) - function(x - moved)) / (2 * step)
    return gradient


@every_case
@EXAMPLES
@given(st.integers(0, 2**32 - 1), arrays(np.bool_, (BATCH, TOKENS)))
def test_values_and_gradients_equal_the_oracle_without_padding(case, seed, where):
    student, teacher = inputs(case, seed)
    values, *gradients = value_and_gradients(case, student, teacher, where)
    s, t = student.astype(np.float64), teacher.astype(np.float64)
    np.testing.assert_allclose(values, by_examples(case, s, t, where), rtol=1e-5, atol=1e-6)
    expected = (
        example_gradient(lambda x: by_examples(case, x, t, where), s),
        example_gradient(lambda x: by_examples(case, s, x, where), t),
    )
    for gradient, reference in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(gradient, reference, rtol=1e-5, atol=1e-5 * max(1.0, np.abs(reference).max()))


@every_case
def test_without_a_mask_all_tokens_count(case):
    student, teacher = inputs(case)
    expected = by_examples(case, student.astype(np.float64), teacher.astype(np.float64), np.ones((BATCH, TOKENS), bool))
    np.testing.assert_allclose(value_and_gradients(case, student, teacher)[0], expected, rtol=1e-5)


@every_case
def test_padding_of_any_content_is_as_if_it_were_not_there(case):
    """NaN too: a softmax over nothing but masked keys makes some."""
    student, teacher = inputs(case)
    where = np.array([[True, True, True, False], [True, False, True, True]])
    values, *_ = value_and_gradients(case, student, teacher, where)
    for fill in (0.0, 1e4, -np.inf, np.nan):
        filled = []
        for x in (student, teacher):
            keep = np.ones([1] * x.ndim, bool)
            for axis in CASES[case][5]:
                shape = [BATCH] + [1] * (x.ndim - 1)
                shape[axis + 1] = TOKENS
                keep = keep & where.reshape(shape)
            filled.append(np.where(keep, x, np.float32(fill)))
        changed, *gradients = value_and_gradients(case, *filled, where)
        np.testing.assert_array_equal(changed, values)
        assert all(np.isfinite(gradient).all() for gradient in gradients)


@every_case
def test_equal_networks_cost_nothing_and_have_no_gradient(case):
    student, _ = inputs(case)
    for result in value_and_gradients(case, student, student):
        np.testing.assert_allclose(result, np.zeros(result.shape), atol=1e-6)


@every_case
@EXAMPLES
@given(st.integers(0, 2**32 - 1), st.permutations(range(TOKENS)), st.permutations(range(BATCH)))
def test_the_order_of_the_tokens_does_not_matter_and_that_of_the_batch_is_kept(case, seed, tokens, batch):
    """Tokens of student, teacher and mask change places together."""
    tokens, batch = np.array(tokens), np.array(batch)
    student, teacher = inputs(case, seed)
    where = np.array([[True, True, True, False], [True, True, False, True]])
    before = value_and_gradients(case, student, teacher, where)

    def moved(x):
        return along_tokens(case, lambda x, axis: np.take(x, tokens, axis), x[batch])

    after = value_and_gradients(case, moved(student), moved(teacher), where[batch][:, tokens])
    for x, y in zip([before[0][batch], *map(moved, before[1:])], after, strict=True):
        np.testing.assert_allclose(y, x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('case', ['mean_square', 'kl', 'value_relations'])
def test_heads_correspond_and_their_order_does_not_matter(case):
    student, teacher = inputs(case)
    values, *_ = value_and_gradients(case, student, teacher)
    np.testing.assert_allclose(value_and_gradients(case, student[:, ::-1], teacher[:, ::-1])[0], values, rtol=1e-5)
    assert np.all(np.abs(value_and_gradients(case, student[:, ::-1], teacher)[0] - values) > 1e-3)


@EXAMPLES
@given(st.integers(0, 2**32 - 1))
def test_hidden_cosine_does_not_see_lengths_nor_a_rotation_of_both(seed):
    student, teacher = inputs('hidden_cosine', seed)
    values, *_ = value_and_gradients('hidden_cosine', student, teacher)
    assert np.all(values >= 0)
    assert np.all(values <= 2)
    rng = np.random.default_rng(seed)
    scales = (10.0 ** rng.uniform(-3, 3, size=(2, BATCH, TOKENS, 1))).astype(np.float32)
    scaled, *_ = value_and_gradients('hidden_cosine', scales[0] * student, scales[1] * teacher)
    np.testing.assert_allclose(scaled, values, rtol=1e-5)
    rotation = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0].astype(np.float32)
    np.testing.assert_allclose(
        value_and_gradients('hidden_cosine', student @ rotation, teacher @ rotation)[0], values, rtol=1e-4
    )


def test_hidden_cosine_of_opposite_and_orthogonal_and_zero_states():
    """A zero state is at ½ from others and at 0 from another; it has no direction to learn."""
    axes = np.eye(WIDTH, dtype=np.float32)
    zero = np.zeros(WIDTH, np.float32)
    pairs = [(axes[0], -axes[0], 2), (axes[0], axes[1], 1), (zero, axes[1], 0.5), (zero, zero, 0), (axes[0], axes[0], 0)]
    student, teacher = (np.stack([pair[side] for pair in pairs])[:, None] for side in (0, 1))
    values, *gradients = value_and_gradients('hidden_cosine', student, teacher)
    np.testing.assert_allclose(values, [pair[2] for pair in pairs], atol=1e-6)
    np.testing.assert_array_equal(gradients[0][2:4], np.zeros((2, 1, WIDTH)))
    assert np.all(np.isfinite(gradients))


def test_hidden_cosine_keeps_its_digits_where_both_agree():
    """1 - cos of an angle of 1e-3 is 5e-7, and 1 minus a rounded cosine would be off by a tenth of that."""
    angle = 1e-3
    student = np.array([[[1, 0]]], np.float32)
    teacher = np.array([[[np.cos(angle), np.sin(angle)]]], np.float32)
    np.testing.assert_allclose(value_and_gradients('hidden_cosine', student, teacher)[0], 1 - np.cos(angle), rtol=1e-3)


@pytest.mark.parametrize('scale', [1e15, 1e-25])
def test_hidden_cosine_of_huge_and_tiny_states_is_that_of_ordinary_ones(scale):
    student, teacher = inputs('hidden_cosine')
    values, gradient, _ = value_and_gradients('hidden_cosine', student, teacher)
    scaled, scaled_gradient, _ = value_and_gradients('hidden_cosine', student * np.float32(scale), teacher)
    np.testing.assert_allclose(scaled, values, rtol=1e-5)
    np.testing.assert_allclose(scaled_gradient * np.float32(scale), gradient, rtol=1e-5, atol=1e-6)


@EXAMPLES
@given(st.integers(0, 2**32 - 1))
def test_value_relations_do_not_see_rotations_and_signs(seed):
    """Each network and each head may have its own coordinates."""
    student, teacher = inputs('value_relations', seed)
    values, *_ = value_and_gradients('value_relations', student, teacher)
    rng = np.random.default_rng(seed)
    rotated = [
        np.matmul(x, np.linalg.qr(rng.normal(size=(HEADS, x.shape[-1], x.shape[-1])))[0]).astype(np.float32)
        for x in (student, teacher)
    ]
    np.testing.assert_allclose(value_and_gradients('value_relations', *rotated)[0], values, rtol=1e-4, atol=1e-6)


def test_value_relations_divide_by_the_root_of_each_width():
    """Values of another width, whose products are as many times larger as √width is, agree."""
    student, _ = inputs('value_relations')
    padded = np.concatenate([student, np.zeros((*student.shape[:3], 2), np.float32)], axis=-1)
    padded *= np.float32(((WIDTH + 2) / WIDTH) ** 0.25)
    np.testing.assert_allclose(value_and_gradients('value_relations', student, padded)[0], np.zeros(BATCH), atol=1e-6)


def test_divergence_of_attention_does_not_see_a_shift_of_the_scores_and_their_mean_square_does():
    student, teacher = inputs('kl')
    shift = np.random.default_rng(1).normal(size=(BATCH, HEADS, TOKENS, 1)).astype(np.float32)
    values, *_ = value_and_gradients('kl', student, teacher)
    np.testing.assert_allclose(value_and_gradients('kl', student + shift, teacher)[0], values, rtol=1e-4)
    constant, *_ = value_and_gradients('mean_square', student + np.float32(3), student)
    np.testing.assert_allclose(constant, np.full(BATCH, 9), rtol=1e-5)


def test_scores_of_minus_infinity_under_a_causal_mask_are_no_scores():
    """The mean square is over the others, and the divergence that of distributions over the others."""
    student, teacher = inputs('kl')
    causal = np.tril(np.ones((TOKENS, TOKENS), bool))
    masked = [np.where(causal, x, np.float32(-np.inf)) for x in (student, teacher)]
    s, t = (x.astype(np.float64) for x in masked)
    squares = np.mean((student - teacher).astype(np.float64)[..., causal] ** 2, axis=(1, 2))
    for case, expected in (('mean_square', squares), ('kl', np.mean(kl(log_softmax(t), log_softmax(s)), axis=(1, 2)))):
        values, *gradients = value_and_gradients(case, *masked)
        np.testing.assert_allclose(values, expected, rtol=1e-5)
        for gradient in gradients:
            assert np.all(np.isfinite(gradient))
            np.testing.assert_array_equal(gradient[..., ~causal], 0)


@every_case
def test_extremes_are_finite_for_every_pair(case):
    """Zero, constant, ±1e4, huge and tiny arrays, with one token too, and scores of -inf."""
    rng = np.random.default_rng(2)
    scores = case in ('mean_square', 'kl')
    rows = []
    for shape in CASES[case][3:5]:
        choice = rng.choice([1e4, -1e4, 0.0, -np.inf if scores else 1.0], size=shape)
        plain = rng.normal(size=shape)
        rows.append(np.stack([np.zeros(shape), np.ones(shape), plain, 1e15 * plain, 1e-25 * plain, choice]).astype(np.float32))
    student, teacher = (np.stack(x) for x in zip(*[(s, t) for s in rows[0] for t in rows[1]], strict=True))
    for tokens in (TOKENS, 1):
        cut = [along_tokens(case, lambda x, axis, n=tokens: np.take(x, range(n), axis), x) for x in (student, teacher)]
        values, *gradients = value_and_gradients(case, *cut)
        assert np.all(np.isfinite(values))
        assert np.all(values >= 0)
        assert all(np.all(np.isfinite(gradient)) for gradient in gradients)


def test_unknown_variants_and_other_ranks_are_refused():
    with pytest.raises(ValueError, match=r"^attention_maps: variant must be 'mean_square' or 'kl', got 'cosine'$"):
        losses.attention_maps(*inputs('kl'), variant='cosine')
    with pytest.raises(ValueError, match=r'^attention_maps: scores must be \[batch, heads, .*\], got \(1, 2, 3, 4\)$'):
        losses.attention_maps(jnp.ones((1, 2, 3, 4)), jnp.ones((1, 2, 3, 4)))
    with pytest.raises(ValueError, match=r'^hidden_cosine: hidden states must be \[batch, tokens, width\], got \(3, 4\)$'):
        losses.hidden_cosine(jnp.ones((3, 4)), jnp.ones((3, 4)))
