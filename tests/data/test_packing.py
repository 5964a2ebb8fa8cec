"""Rows of several documents train a decoder as the documents would alone."""

import jax
import numpy as np
import pytest

from kdjax import data, models, networks, objectives

RNG = np.random.default_rng(0)
DOCUMENTS = [(RNG.integers(0, 11, n), RNG.random(n) < 0.5) for n in (5, 3, 0, 4, 8, 2)]


NETWORK = networks.from_linen(models.Decoder(vocabulary=11, depth=1, width=8, heads=2, hidden=8))
TOGETHER = data.pack(DOCUMENTS, 8, vocabulary=11)
ALONE = jax.tree.map(
    lambda *rows: np.concatenate(rows), *(data.pack([document], 8) for document in DOCUMENTS if len(document[0]))
)


def test_a_packed_row_has_the_logits_of_its_documents_alone():
    variables = jax.jit(NETWORK.init)(jax.random.key(0), TOGETHER['inputs'])
    forward = jax.jit(lambda inputs: NETWORK.apply(variables, inputs)[0].logits)
    packed, alone = (np.asarray(forward(batch['inputs'])) for batch in (TOGETHER, ALONE))
    inputs = TOGETHER['inputs']
    found = {
        tuple(inputs['tokens'][row][inputs['segments'][row] == segment]): packed[row][inputs['segments'][row] == segment]
        for row in range(len(packed))
        for segment in range(1, inputs['segments'][row].max() + 1)
    }
    for row, logits in enumerate(alone):
        there = ALONE['inputs']['segments'][row] == 1
        np.testing.assert_allclose(found[tuple(ALONE['inputs']['tokens'][row][there])], logits[there], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('length', [1, 3, 8, 20])
def test_no_token_is_dropped_and_labels_stay_in_their_document(length):
    batch = data.pack(DOCUMENTS, length)
    assert (batch['inputs']['segments'] > 0).sum() == sum(len(tokens) for tokens, _ in DOCUMENTS)
    assert batch['mask'].sum() == sum(max(len(tokens) - 1, 0) for tokens, _ in DOCUMENTS)
    assert batch['completion'].sum() == sum(learned[1:].sum() for _, learned in DOCUMENTS)
    assert not (batch['completion'] & ~batch['mask']).any()


@pytest.mark.parametrize('length', [1, 3, 8])
def test_labels_are_the_next_tokens_also_where_a_document_is_cut(length):
    documents = [(np.arange(10 * i, 10 * i + n), np.arange(n) % 2 == 0) for i, n in enumerate((5, 9, 1, 4))]
    batch = data.pack(documents, length)
    wanted = {int(t): (int(t) + 1, bool(learned[i + 1])) for tokens, learned in documents for i, t in enumerate(tokens[:-1])}
    tokens, positions, segments = (batch['inputs'][name] for name in ('tokens', 'positions', 'segments'))
    for place in zip(*np.nonzero(segments), strict=True):
        label, learned = wanted.get(int(tokens[place]), (-1, False))
        assert (batch['labels'][place], batch['completion'][place]) == (label, learned)
        assert positions[place] == tokens[place] % 10 % length


def test_the_loss_of_packed_rows_is_that_of_documents_alone():
    objective = objectives.over_positions(objectives.hard_labels(), 'completion')
    empty = {name: {} for name in objective.names}
    variables = jax.jit(NETWORK.init)(jax.random.key(0), TOGETHER['inputs'])

    @jax.jit
    def loss(batch):
        outputs, _ = NETWORK.apply(variables, batch['inputs'])
        return objective.apply(empty, empty, outputs, networks.Outputs(None), batch, step=0)[0]

    np.testing.assert_allclose(loss(TOGETHER), loss(ALONE), rtol=1e-5)


def test_short_documents_share_rows():
    documents = [(np.array([1] * n), np.ones(n, bool)) for n in (5, 3, 4, 4, 8)]
    assert len(data.pack(documents, 8)['labels']) == 3


ONE = np.array([True])


@pytest.mark.parametrize(
    'documents,message',
    [
        ([], 'have no tokens'),
        ([(np.zeros(0, int), np.zeros(0, bool))], 'have no tokens'),
        ([(np.array([11]), ONE)], 'document 0 has the token 11, beyond a vocabulary of 11'),
        ([(np.array([1]), ONE), (np.array([-1]), ONE)], 'document 1 must have tokens that are integers from 0'),
        ([(np.array([0.5]), ONE)], 'integers from 0'),
        ([(np.array([1, 2]), ONE)], r'tokens \[n\] and booleans \[n\], got \(2,\) and bool \(1,\)'),
        ([(np.array([1]), np.array([1]))], r'booleans \[n\]'),
    ],
)
def test_wrong_documents_get_a_line(documents, message):
    with pytest.raises(ValueError, match=message):
        data.pack(documents, 4, vocabulary=11)


def test_a_row_has_a_length():
    with pytest.raises(ValueError, match='length must be at least 1, got 0'):
        data.pack(DOCUMENTS, 0)
