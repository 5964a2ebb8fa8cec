"""Texts as tokens, several to a row: what `models.Decoder` is trained on."""

from collections.abc import Iterable

import numpy as np

from kdjax.batches import Batch


def pack(documents: Iterable[tuple[np.ndarray, np.ndarray]], length: int, *, vocabulary: int | None = None) -> Batch:
    """Packs token sequences into rows by best fit, for a network that predicts the next token.

    Each goes into the row that it fills most. A document longer than a row goes on in further rows, where it sees nothing of
    what came before, and its last label in a row is the first token of the next one; no token is dropped. All documents are in
    memory.

    Args:
      documents: tokens [n] and booleans [n] that say which of them are to be learned, of each document.
      length: of a row.
      vocabulary: of the network; None to check for negative tokens alone.

    Returns:
      Arrays [rows, length]: `'inputs'`, a dictionary of `'tokens'`, `'positions'` and `'segments'` (0 is padding);
      `'labels'`, the next token of the same document, -1 where there is none; `'mask'`, where there is one;
      `'completion'`, where it is learned.

    Raises:
      ValueError: there are no tokens, tokens are beyond the vocabulary, or shapes do not fit.

    >>> import numpy as np
    >>> batch = pack([(np.array([5, 6, 7]), np.array([False, True, True])), (np.array([8]), np.array([True]))], 5)
    >>> batch['labels'].tolist(), batch['inputs']['segments'].tolist()
    ([[6, 7, -1, -1, -1]], [[1, 1, 1, 2, 0]])
    """
    if length < 1:
        raise ValueError(f'pack: length must be at least 1, got {length}')
    rows: list[list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = []
    # By the room that is left in them, so that finding one takes no longer with more rows.
    with_room: list[list[int]] = [[] for _ in range(length + 1)]
    for number, (tokens, learned) in enumerate(documents):
        tokens, learned = np.asarray(tokens), np.asarray(learned)
        if tokens.ndim != 1 or learned.shape != tokens.shape or learned.dtype != np.bool_:
            raise ValueError(
                f'pack: document {number} must have tokens [n] and booleans [n], got {tokens.shape} and '
                f'{learned.dtype} {learned.shape}'
            )
        if tokens.size and (not np.issubdtype(tokens.dtype, np.integer) or tokens.min() < 0):
            raise ValueError(f'pack: document {number} must have tokens that are integers from 0')
        if tokens.size and vocabulary is not None and tokens.max() >= vocabulary:
            raise ValueError(f'pack: document {number} has the token {tokens.max()}, beyond a vocabulary of {vocabulary}')
        labels, completion = np.append(tokens[1:], -1), np.append(learned[1:], False)
        for begin in range(0, len(tokens), length):
            piece = tuple(array[begin : begin + length] for array in (tokens, labels, completion))
            room = next((room for room in range(len(piece[0]), length) if with_room[room]), length)
            if room == length:
                rows.append([])
                with_room[length].append(len(rows) - 1)
            row = with_room[room].pop()
            rows[row].append((piece[0], piece[1], piece[2]))
            with_room[room - len(piece[0])].append(row)
    if not rows:
        raise ValueError('pack: the documents have no tokens')
    tokens, positions, segments = (np.zeros((len(rows), length), np.int32) for _ in range(3))
    labels, completion = np.full((len(rows), length), -1, np.int32), np.zeros((len(rows), length), np.bool_)
    for i, pieces in enumerate(rows):
        begin = 0
        for number, (some, following, learned) in enumerate(pieces):
            place = slice(begin, begin + len(some))
            tokens[i, place], labels[i, place], completion[i, place] = some, following, learned
            positions[i, place], segments[i, place] = np.arange(len(some)), number + 1
            begin += len(some)
    inputs = {'tokens': tokens, 'positions': positions, 'segments': segments}
    return {'inputs': inputs, 'labels': labels, 'mask': labels >= 0, 'completion': completion}
