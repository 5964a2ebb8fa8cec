"""Rows of several documents train a decoder as the documents would alone."""

import jax
import numpy as np
import pytest

from kdjax import data, models, networks

RNG = np.random.default_rng(0)
DOCUMENTS = [(RNG.integers(0, 11, n), RNG.random(n) < 0.5) for n in (5, 3, 0, 4, 8, 2)]


def test_a_packed_row_has_the_logits_of_its_documents_alone():
    decoder = networks.from_linen(models.Decoder(vocabulary=11, depth=1, width=8, heads=2, hidden=8))
    together = data.pack(DOCUMENTS, 8, vocabulary=11)['inputs']
    variables = decoder.init(jax.random.key(0), together)
    packed = np.asarray(decoder.apply(variables, together)[0].logits)
    for tokens, _ in DOCUMENTS:
        if len(tokens):
            alone = data.pack([(tokens, np.ones(len(tokens), bool))], 8)['inputs']
            logits = np.asarray(decoder.apply(variables, alone)[0].logits)[0, : len(tokens)]
            found = [
                packed[i, together['segments'][i] == segment]
                for i in range(len(packed))
                for segment in range(1, together['segments'].max() + 1)
                if np.array_equal(together['tokens'][i, together['segments'][i] == segment], tokens)
            ]
            np.testing.assert_allclose(found[0], logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('length', [1, 3, 8, 20])
def test_no_token_is_dropped_and_labels_stay_in_their_document(length):
    batch = data.pack(DOCUMENTS, length)
    assert (batch['inputs']['segments'] > 0).sum() == sum(len(tokens) for tokens, _ in DOCUMENTS)
    assert batch['mask'].sum() == sum(max(len(tokens) - 1, 0) for tokens, _ in DOCUMENTS)
    assert batch['completion'].sum() == sum(learned[1:].sum() for _, learned in DOCUMENTS)
    assert not (batch['completion'] & ~batch['mask']).any()


@pytest.mark.parametrize(
    'documents,message',
    [([], 'have no tokens'), ([(np.array([11]), np.array([True]))], 'document 0 has the token 11, beyond a vocabulary of 11')],
)
def test_wrong_documents_get_a_line(documents, message):
    with pytest.raises(ValueError, match=message):
        data.pack(documents, 4, vocabulary=11)
