"""Spans of two tokenizations of one text: they cover the same characters, are as short as can be, and are cut off whole."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdjax.data import align_tokens

# The text is 'naïve 🙂 cat': 11 characters, of which the smile is 4 bytes and the ï 2.
WORDS = [(0, 0), (0, 5), (6, 7), (8, 11), (0, 0)]  # BERT's: no spaces, [CLS] and [SEP] of no character
PIECES = [(0, 2), (2, 5), (5, 7), (7, 11)]  # SentencePiece's: spaces begin words
BYTES = [(0, 1), (1, 2), (2, 3), (2, 3), (3, 5), (5, 6), (6, 7), (6, 7), (6, 7), (6, 7), (7, 11)]  # of single bytes in part


def spans(student, teacher, **options):
    return [x[0].tolist() for x in align_tokens([student], [teacher], **options)]


def begun(offsets):
    """With a token of no character before."""
    return [(0, 0), *offsets]


def test_words_without_spaces_fit_pieces_that_begin_with_them():
    assert spans(WORDS, begun(PIECES)) == [[-1, 0, 1, 2, -1], [-1, 0, 0, 1, 2]]


def test_the_bytes_of_a_character_stay_together():
    assert spans(begun(BYTES), begun(PIECES)) == [[-1, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 3], [-1, 0, 1, 2, 3]]
    # Single bytes on both sides.
    assert spans(begun(BYTES), begun(BYTES)) == [[-1, 0, 1, 2, 2, 3, 4, 5, 5, 5, 5, 6]] * 2


def test_the_first_token_is_never_predicted_and_loses_its_span():
    assert spans(PIECES, WORDS) == [[-1, -1, 0, 1], [-1, -1, 0, 1, -1]]
    assert spans(PIECES, PIECES) == [[-1, 0, 1, 2]] * 2


def test_prompts_are_left_out_with_tokens_that_reach_into_the_completion():
    assert spans(WORDS, begun(PIECES), prompts=[5]) == [[-1, -1, 0, 1, -1], [-1, -1, -1, 0, 1]]
    assert spans(WORDS, begun(PIECES), prompts=[6]) == [[-1, -1, -1, 0, -1], [-1, -1, -1, -1, 0]]
    assert spans(WORDS, begun(PIECES), prompts=[11]) == [[-1] * 5, [-1] * 5]


def test_ends_count_where_they_are_given_a_character():
    assert spans([(0, 0), (0, 3), (3, 4)], [(0, 0), (0, 1), (1, 3), (3, 4)]) == [[-1, 0, 1], [-1, 0, 0, 1]]
    assert spans([(0, 0), (0, 3), (3, 3)], [(0, 0), (0, 1), (1, 3), (3, 3)]) == [[-1, 0, -1], [-1, 0, 0, -1]]


def test_texts_are_padded_and_a_span_that_is_cut_is_none():
    student, teacher = align_tokens([WORDS, begun(PIECES[:1])], [begun(BYTES), begun(BYTES[:2])], lengths=(6, 7))
    assert student.dtype == teacher.dtype == np.int32
    assert student.tolist() == [[-1, 0, -1, -1, -1, -1], [-1, 0, -1, -1, -1, -1]]
    assert teacher.tolist() == [[-1, 0, 0, 0, 0, 0, -1], [-1, 0, 0, -1, -1, -1, -1]]
    assert [x.shape for x in align_tokens([WORDS, []], [begun(BYTES), []])] == [(2, 5), (2, 12)]
    assert [x.shape for x in align_tokens([], [])] == [(0, 0), (0, 0)]


def test_what_follows_the_last_common_end_is_of_no_span():
    assert spans([(0, 0), (0, 2), (2, 5)], [(0, 0), (0, 2), (2, 4)]) == [[-1, 0, -1], [-1, 0, -1]]
    assert spans([(0, 0), (0, 2), (2, 5)], [(0, 0), (0, 5)]) == [[-1, 0, 0], [-1, 0]]


cuts = st.integers(1, 24).flatmap(
    lambda n: st.tuples(st.just(n), *(st.sets(st.integers(1, n - 1) if n > 1 else st.nothing()) for _ in range(2)))
)


def offsets_of(size, cut):
    edges = [0, *sorted(cut), size]
    return list(itertools.pairwise(edges))


@given(cuts)
def test_spans_of_any_cuts_are_those_between_common_cuts(drawn):
    size, *both = drawn
    pair = [begun(offsets_of(size, cut)) for cut in both]
    found, common = spans(*pair), sorted(both[0] & both[1])
    for offsets, numbers in zip(pair, found, strict=True):
        # A new span begins where both sides have a cut.
        expected = [np.searchsorted(common, start, side='right') for start, _ in offsets[1:]]
        assert numbers == [-1, *expected]


def test_what_does_not_fit_is_named():
    with pytest.raises(
        ValueError, match=r"^align_tokens: there must be one entry for each text on all sides, got {'student': 1"
    ):
        align_tokens([WORDS], [])
    with pytest.raises(ValueError, match=r'^align_tokens: there must be one entry for each text .*prompts'):
        align_tokens([WORDS], [WORDS], prompts=[])
    with pytest.raises(ValueError, match=r'^align_tokens: the offsets of a text are integers \[tokens, 2\], got int64 \(2,\)'):
        align_tokens(WORDS, WORDS)
    for wrong in ([(0, 3), (1, 2)], [(3, 2)], [(-1, 2)]):
        with pytest.raises(ValueError, match=r'^align_tokens: offsets must be .* text 0 of the teacher'):
            align_tokens([WORDS], [wrong])
