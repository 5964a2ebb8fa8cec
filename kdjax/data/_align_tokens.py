"""Where two tokenizations of one text agree, from the characters that each token covers."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike


def align_tokens(
    student: Sequence[ArrayLike],
    teacher: Sequence[ArrayLike],
    *,
    lengths: tuple[int, int] | None = None,
    prompts: Sequence[int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Alignment of two tokenizations of the same texts: the span of characters that each token belongs to.

    A span is as short as it can be: it ends at the first character where a token ends on both sides, and no token of either
    covers characters before and after. Only ends are compared, since many tokenizers leave out the space before a word.
    Several tokens of one character, as of its bytes, stay together. Tokens of no character are in no span, such as those of the
    beginning, of the end and of padding: to compare the ends too, give them the offsets (n, n + 1) on both sides.

    A decoder predicts tokens from those before them. So a span with the first token of a side is none: begin texts with a
    token of no character to keep it. Tokens and spans lose their first entry together, `spans[:, 1:]` beside
    `labels = tokens[:, 1:]`.

    Args:
      student: for each text the offsets [tokens, 2] of the student's tokens: the first character, and the one after the last.
        `[encoding.offsets for encoding in tokenizer.encode_batch(texts)]` has them for any tokenizer of `tokenizers`.
      teacher: the same of the teacher's tokens.
      lengths: to how many tokens either side is padded or cut off; the most that a text has if not given. A span that is cut
        is none.
      prompts: for each text the characters before its completion; spans that begin before it ends are none.

    Returns:
      int32 [texts, student's length] and [texts, teacher's length]: the number of each token's span, from 0 in each text, and
      -1 where there is none. A number is in both or in neither.

    Raises:
      ValueError: the sides have different numbers of texts, or offsets are no pairs that go forward.

    >>> student, teacher = [(0, 0), (0, 3), (3, 5), (5, 11)], [(0, 0), (0, 5), (5, 8), (8, 11)]
    >>> for spans in align_tokens([student], [teacher], lengths=(5, 4)):
    ...     print(spans)
    [[-1  0  0  1 -1]]
    [[-1  0  1  1]]

    Reference:
      Patiño, Rasul, Gallouédec et al. Unlocking On-Policy Distillation for Any Model Family. 2025.
      https://huggingface.co/spaces/HuggingFaceH4/general-on-policy-logit-distillation
    """
    counted = {'student': len(student), 'teacher': len(teacher)}
    counted |= {} if prompts is None else {'prompts': len(prompts)}
    if len(set(counted.values())) > 1:
        raise ValueError(f'align_tokens: there must be one entry for each text on all sides, got {counted}')
    sides = [
        [_offsets(side, i, x) for i, x in enumerate(texts)] for side, texts in (('student', student), ('teacher', teacher))
    ]
    longest = [max((len(x) for x in texts), default=0) for texts in sides]
    sizes = longest if lengths is None else lengths
    spans = [np.full((len(texts), size), -1, np.int32) for texts, size in zip(sides, sizes, strict=True)]
    for i, pair in enumerate(zip(*sides, strict=True)):
        for row, found in zip(spans, _of_text(pair, sizes, 0 if prompts is None else prompts[i]), strict=True):
            row[i, : len(found)] = found[: row.shape[1]]
    return spans[0], spans[1]


def _offsets(side: str, text: int, offsets: ArrayLike) -> np.ndarray:
    """As an array [tokens, 2]."""
    array = np.asarray(offsets)
    array = array.reshape(0, 2).astype(np.int64) if array.size == 0 else array
    if array.ndim != 2 or array.shape[1] != 2 or array.dtype.kind not in 'iu':
        raise ValueError(
            f'align_tokens: the offsets of a text are integers [tokens, 2], got {array.dtype} {array.shape} for text {text} of '
            f'the {side}; give a list of texts, each a list of pairs'
        )
    ends = array[array[:, 1] != array[:, 0], 1]
    if np.any(array < 0) or np.any(array[:, 1] < array[:, 0]) or np.any(np.diff(ends) < 0):
        raise ValueError(
            f'align_tokens: offsets must be (start, end) that go forward; those of text {text} of the {side} do not'
        )
    return array


def _of_text(pair: tuple[np.ndarray, ...], sizes: Sequence[int], prompt: int) -> list[np.ndarray]:
    """Spans of both sides of a text, of any length."""
    student, teacher = (_boundaries(x) for x in pair)
    common = np.intersect1d(student, teacher)
    # A token of the span k ends after the boundary k - 1, and no later than the boundary k.
    found = [np.where(x[:, 1] > x[:, 0], np.searchsorted(common, x[:, 1]), len(common)) for x in pair]
    lost = np.zeros(len(common) + 1, bool)
    lost[-1] = True
    for x, spans, size in zip(pair, found, sizes, strict=True):
        lost[spans[:1]] = lost[spans[size:]] = lost[spans[x[:, 0] < prompt]] = True
    numbers = np.where(lost, -1, np.cumsum(~lost) - 1)
    return [numbers[spans] for spans in found]


def _boundaries(offsets: np.ndarray) -> np.ndarray:
    """The characters at which a token ends and none goes on."""
    starts, ends = offsets[offsets[:, 1] > offsets[:, 0]].T
    last = np.append(starts[1:] >= ends[:-1], True)[: len(ends)]
    return ends[last]
