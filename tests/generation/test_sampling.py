"""Sampling by oracle and by frequency, alone and with a student that drafts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import generation, models, networks

VOCABULARY, CACHE = 5, 16
PROMPTS = np.array([[1, 4, 2], [3, 0, 0], [2, 2, 0]])
LENGTHS = np.array([3, 1, 2])


@functools.cache
def made(seed, cache=CACHE, depth=1, vocabulary=VOCABULARY):
    """A decoder with random variables, whose distributions are far from uniform."""
    module = models.Decoder(vocabulary=vocabulary, depth=depth, width=8, heads=2, hidden=8, cache=cache)
    decoder = networks.from_linen(module, mutable=('cache',))
    rng = np.random.default_rng(seed)  # numpy's, which do not know whether the first call is traced
    shapes = jax.eval_shape(decoder.init, jax.random.key(0), {'tokens': PROMPTS})['params']
    return decoder, {'params': jax.tree.map(lambda x: (rng.normal(size=x.shape) * 0.6).astype(x.dtype), shapes)}


def whole(seed, tokens):
    """Log-probabilities after every token, without a cache."""
    module = models.Decoder(vocabulary=VOCABULARY, depth=1, width=8, heads=2, hidden=8)
    return jax.nn.log_softmax(networks.from_linen(module).apply(made(seed)[1], tokens)[0].logits)


@functools.partial(jax.jit, static_argnames=('new_tokens', 'temperature', 'top_k', 'top_p', 'eos'))
def written(key, prompts, lengths, **options):
    return generation.sample(*made(0), prompts, key, lengths=lengths, **options)


def texts(prompts, lengths, tokens):
    """Each prompt without its padding, and what was written after it."""
    return [[*map(int, prompt[:length]), *map(int, row)] for prompt, length, row in zip(prompts, lengths, tokens, strict=True)]


def test_greedy_tokens_are_the_likeliest_of_the_whole_forward_pass_with_their_log_probabilities():
    found = written(jax.random.key(0), PROMPTS, LENGTHS, new_tokens=6, temperature=0)
    for i, text in enumerate(texts(PROMPTS, LENGTHS, found.tokens)):
        log_p = whole(0, np.array([text]))[0, LENGTHS[i] - 1 : -1]
        np.testing.assert_array_equal(found.tokens[i], np.argmax(log_p, axis=-1))
        np.testing.assert_allclose(found.log_probabilities[i], np.max(log_p, axis=-1), atol=1e-5)
    assert found.lengths.tolist() == [6, 6, 6]


def test_a_row_depends_on_its_key_alone():
    """Not on the others, nor on padding, nor on how many tokens follow."""
    keys = jax.random.split(jax.random.key(3), 3)
    found = written(keys, PROMPTS, LENGTHS, new_tokens=6)
    order = np.array([2, 0])
    some = written(keys[order], PROMPTS[order], LENGTHS[order], new_tokens=6)
    np.testing.assert_array_equal(some.tokens, found.tokens[order])
    empty = np.where(np.arange(3)[None] < LENGTHS[:, None], PROMPTS, -1)  # padding may be no token at all
    padded = written(keys, np.pad(empty, ((0, 0), (0, 2)), constant_values=99), LENGTHS, new_tokens=6)
    np.testing.assert_array_equal(padded.tokens, found.tokens)
    fewer = written(keys, PROMPTS, LENGTHS, new_tokens=2)
    np.testing.assert_array_equal(fewer.tokens, found.tokens[:, :2])
    by_number = written(jax.random.key(5), PROMPTS, LENGTHS, new_tokens=6)
    alone = written(jax.random.key(5), PROMPTS[:1], LENGTHS[:1], new_tokens=6)
    np.testing.assert_array_equal(alone.tokens, by_number.tokens[:1])
    raw = written(jax.random.key_data(jax.random.key(5)), PROMPTS, LENGTHS, new_tokens=6)
    np.testing.assert_array_equal(raw.tokens, by_number.tokens)


def cut(p, temperature=1.0, top_k=None, top_p=None):
    """The distribution that a token is drawn from, in plain words."""
    p = p ** (1 / temperature)
    p = p / p.sum()
    order = np.argsort(-p)
    if top_k:
        p[order[top_k:]] = 0
        p = p / p.sum()
    if top_p:
        kept = np.cumsum(p[order]) - p[order] < top_p
        p[order[~kept]] = 0
        p = p / p.sum()
    return p


def chi_square(counts, p):
    """Pearson's statistic over what has a probability, less its mean, in standard deviations."""
    kept = p > 0
    assert not np.any(counts[~kept])
    expected = counts.sum() * p[kept]
    freedom = max(kept.sum() - 1, 1)
    return (np.sum((counts[kept] - expected) ** 2 / expected) - freedom) / np.sqrt(2 * freedom)


def pairs(tokens):
    """How often each two tokens follow each other."""
    return np.bincount(np.asarray(tokens[:, 0]) * VOCABULARY + np.asarray(tokens[:, 1]), minlength=VOCABULARY**2)


def distribution(seed, prompt, **options):
    """Of the two tokens after a prompt."""
    after = np.exp(np.asarray(whole(seed, np.array([[*prompt, y] for y in range(VOCABULARY)])), np.float64))
    first = cut(after[0, len(prompt) - 1].copy(), **options)
    return np.concatenate([first[y] * cut(after[y, -1].copy(), **options) for y in range(VOCABULARY)])


@pytest.mark.parametrize(
    'options', [{}, {'temperature': 0.5}, {'top_k': 3}, {'top_p': 0.7}, {'temperature': 2.0, 'top_k': 4, 'top_p': 0.9}]
)
def test_two_tokens_are_as_frequent_as_they_are_likely(options):
    rows = 4000
    found = written(jax.random.key(1), np.tile(PROMPTS[:1], (rows, 1)), np.full(rows, 3), new_tokens=2, **options)
    assert abs(chi_square(pairs(found.tokens), distribution(0, PROMPTS[0], **options))) < 4


def test_a_text_ends_with_its_last_token():
    found = written(jax.random.key(2), np.tile(PROMPTS, (20, 1)), np.tile(LENGTHS, 20), new_tokens=6, eos=2)
    free = written(jax.random.key(2), np.tile(PROMPTS, (20, 1)), np.tile(LENGTHS, 20), new_tokens=6)
    ended = 0
    for i in range(60):
        at = np.flatnonzero(np.asarray(free.tokens[i]) == 2)
        length = at[0] + 1 if at.size else 6
        ended += at.size > 0
        assert found.lengths[i] == length
        np.testing.assert_array_equal(found.tokens[i], [*free.tokens[i, :length], *[2] * (6 - length)])
        np.testing.assert_array_equal(found.log_probabilities[i, :length], free.log_probabilities[i, :length])
        np.testing.assert_array_equal(found.log_probabilities[i, length:], 0.0)
    assert 0 < ended < 60


@functools.partial(jax.jit, static_argnames=('student', 'new_tokens', 'drafted', 'temperature', 'top_k', 'eos'))
def speculated(key, prompts, lengths, student=1, **options):
    return generation.speculative_sample(*made(student), *made(0), prompts, key, lengths=lengths, **options)


@pytest.mark.parametrize('drafted, options', [(1, {}), (3, {}), (2, {'temperature': 0.6, 'top_k': 3})])
def test_what_a_student_drafts_has_the_distribution_of_its_teacher(drafted, options):
    """Of the second and third token, which are the draft's; the student alone is far off."""
    rows = 4000
    prompts = np.tile(np.array([[1, 4]]), (rows, 1))
    found = speculated(jax.random.key(1), prompts, np.full(rows, 2), new_tokens=3, drafted=drafted, **options)
    first = cut(np.exp(np.asarray(whole(0, PROMPTS[:1, :2])[0, -1], np.float64)), **options)
    for token in range(VOCABULARY):
        chosen = np.asarray(found.tokens)[np.asarray(found.tokens[:, 0]) == token]
        assert abs(len(chosen) - rows * first[token]) < 4 * np.sqrt(rows * first[token] * (1 - first[token])) + 1e-9
        if len(chosen) > 400:
            expected = distribution(0, [1, 4, token], **options)
            assert abs(chi_square(pairs(chosen[:, 1:]), expected)) < 4
            assert abs(chi_square(pairs(chosen[:, 1:]), np.maximum(distribution(1, [1, 4, token], **options), 1e-3))) > 10
    assert 0.1 < found.acceptance.compute() < 0.95


def test_a_student_that_is_its_teacher_is_always_right_and_saves_calls():
    found = speculated(jax.random.key(0), PROMPTS, LENGTHS, student=0, new_tokens=9, drafted=3)
    assert found.acceptance.compute() == 1
    assert found.rounds == 2


def test_a_drafted_row_depends_on_its_key_alone_and_ends_with_its_last_token():
    keys = jax.random.split(jax.random.key(7), 9)
    prompts, lengths = np.tile(PROMPTS, (3, 1)), np.tile(LENGTHS, 3)
    free = speculated(keys, prompts, lengths, new_tokens=7, drafted=2)
    some = speculated(keys[3:5], prompts[3:5], lengths[3:5], new_tokens=7, drafted=2)
    np.testing.assert_array_equal(some.tokens, free.tokens[3:5])
    assert free.lengths.tolist() == [7] * 9
    found = speculated(keys, prompts, lengths, new_tokens=7, drafted=2, eos=2)
    for row, text, length in zip(found.tokens, np.asarray(free.tokens), found.lengths, strict=True):
        at = np.flatnonzero(text == 2)
        assert length == (at[0] + 1 if at.size else 7)
        np.testing.assert_array_equal(row, [*text[:length], *[2] * (7 - int(length))])
    assert 0 < np.sum(found.lengths < 7) < 9
    assert found.acceptance.count < free.acceptance.count


def test_greedy_drafts_change_no_token():
    found = speculated(jax.random.key(0), PROMPTS, LENGTHS, new_tokens=7, drafted=3, temperature=0)
    expected = written(jax.random.key(0), PROMPTS, LENGTHS, new_tokens=7, temperature=0)
    np.testing.assert_array_equal(found.tokens, expected.tokens)


def test_a_head_that_is_left_to_do_writes_the_same():
    """`linear_head` inside of both: for a prompt only its last logits are computed."""
    decoder, variables = made(0)
    tapped = networks.from_linen(models.Decoder(VOCABULARY, 1, 8, 2, 8, cache=CACHE), features='hidden', mutable='cache')
    linear = networks.linear_head(tapped, 'hidden', 'head/kernel')
    keys = jax.random.split(jax.random.key(3), 3)

    @jax.jit
    def both(prompts):
        alone = generation.sample(linear, variables, prompts, keys, lengths=LENGTHS, new_tokens=6)
        drafted = generation.speculative_sample(linear, variables, decoder, variables, prompts, keys, new_tokens=4, drafted=2)
        return alone, drafted.acceptance

    found, acceptance = both(PROMPTS)
    expected = written(keys, PROMPTS, LENGTHS, new_tokens=6)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.log_probabilities, expected.log_probabilities, atol=1e-5)
    assert acceptance.compute() == 1


def test_numbers_may_be_traced_and_wrong_ones_write_no_token():
    keys = jax.random.split(jax.random.key(3), 3)

    @jax.jit
    def traced(temperature, top_p, prompts):
        options = {'lengths': LENGTHS, 'new_tokens': 4, 'temperature': temperature, 'top_p': top_p}
        return generation.sample(*made(0), prompts, keys, **options)

    expected = written(keys, PROMPTS, LENGTHS, new_tokens=4, temperature=0.5, top_p=0.7)
    np.testing.assert_array_equal(traced(0.5, 0.7, PROMPTS).tokens, expected.tokens)
    greedy = written(keys, PROMPTS, LENGTHS, new_tokens=4, temperature=0)
    np.testing.assert_array_equal(traced(1e-30, 1.0, PROMPTS).tokens, greedy.tokens)
    np.testing.assert_array_equal(traced(0.0, 1.0, PROMPTS).tokens, greedy.tokens)
    for wrong in ((-1.0, 1.0), (1.0, 0.0), (1.0, 1.5)):
        np.testing.assert_array_equal(traced(*wrong, PROMPTS).tokens, -1)
    unknown = traced(1.0, 1.0, np.where(PROMPTS == 4, 9, PROMPTS))
    np.testing.assert_array_equal(unknown.tokens[0], -1)
    assert np.all(unknown.tokens[1:] >= 0)


def test_broken_logits_write_no_token():
    decoder, variables = made(0)
    broken = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), variables)
    for temperature in (0, 1.0):
        found = generation.sample(decoder, broken, PROMPTS, jax.random.key(0), new_tokens=2, temperature=temperature)
        np.testing.assert_array_equal(found.tokens, -1)
        assert np.all(np.isnan(found.log_probabilities))


REFUSED = [
    ({'prompts': PROMPTS[0]}, 'prompts must be integers'),
    ({'prompts': PROMPTS[:, :0]}, 'one token or more'),
    ({'prompts': PROMPTS.astype(np.float32)}, 'prompts must be integers'),
    ({'prompts': PROMPTS + 4}, 'tokens of prompts must be from 0 to 4, got [5-8]'),
    ({'lengths': LENGTHS - 1}, 'lengths of prompts must be from 1 to 3, got 0'),
    ({'lengths': LENGTHS[:2]}, 'one of each prompt'),
    ({'new_tokens': 0}, 'new_tokens must be an integer of at least 1, got 0'),
    ({'new_tokens': 14}, 'need a longer cache than 16'),
    ({'temperature': -1.0}, 'temperature must be positive'),
    ({'top_k': 0}, 'top_k must be an integer of at least 1, got 0'),
    ({'top_p': 0.0}, 'top_p must be above 0'),
    ({'top_p': 1.5}, 'top_p must be above 0'),
    ({'top_k': 2.0}, 'top_k must be an integer of at least 1, got 2.0'),
    ({'temperature': np.ones(3)}, 'temperature must be a number'),
    ({'temperature': float('nan')}, 'temperature must be positive'),
    ({'eos': VOCABULARY}, 'eos must be a token from 0 to 4, or None, got 5'),
    ({'eos': -1}, 'eos must be a token from 0 to 4, or None, got -1'),
    ({'key': jax.random.split(jax.random.key(0), 2)}, 'a random key, or one for each of 3 rows'),
]


@pytest.mark.parametrize('options, message', REFUSED)
def test_what_cannot_be_written_is_named(options, message):
    given = {'prompts': PROMPTS, 'new_tokens': 4, 'key': jax.random.key(0), **options}
    prompts, key = given.pop('prompts'), given.pop('key')
    with pytest.raises(ValueError, match=rf'^sample: [^\n]*{message}[^\n]*$'):
        generation.sample(*made(0), prompts, key, **given)
    with pytest.raises(ValueError, match=r'^speculative_sample: [^\n]+$'):
        generation.speculative_sample(*made(1), *made(0), prompts, key, **given)


def test_a_decoder_without_a_cache_and_a_student_of_other_tokens_are_named():
    module = models.Decoder(vocabulary=VOCABULARY, depth=1, width=8, heads=2, hidden=8)
    with pytest.raises(ValueError, match=r'^sample: the decoder keeps no cache: [^\n]+$'):
        generation.sample(networks.from_linen(module), made(0)[1], PROMPTS, jax.random.key(0), new_tokens=2)
    with pytest.raises(ValueError, match=r'^speculative_sample: student and teacher must have the same tokens, got 7 and 5$'):
        generation.speculative_sample(*made(1, vocabulary=7), *made(0), PROMPTS, jax.random.key(0), new_tokens=2)
    with pytest.raises(ValueError, match=r'^speculative_sample: drafted must be an integer of at least 1, got 0$'):
        generation.speculative_sample(*made(1), *made(0), PROMPTS, jax.random.key(0), new_tokens=2, drafted=0)
