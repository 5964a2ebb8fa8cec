"""BERT and DistilBERT of others' files compute what their formulas say, and tap what recipes look for."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.pretrained_files import BERT, DISTILBERT, bert_arrays, bert_hidden, write_folder

from kdjax import models, networks, objectives, pretrained, training

TOKENS = np.array([[3, 7, 0, 10, 7], [1, 2, 0, 0, 0]])
SEEN = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
TYPES = np.array([[0, 0, 1, 1, 1], [0, 1, 0, 0, 0]])
TAPS = ('block1', 'block1/attention/scores', 'block1/attention/values', 'pooled')


def run(loaded, **inputs):
    network = networks.from_linen(loaded.module, features=TAPS)
    inputs = {'tokens': TOKENS, 'mask': SEEN} | inputs
    return jax.jit(network.apply)(loaded.variables, {name: jnp.asarray(array) for name, array in inputs.items()})[0]


@pytest.mark.parametrize('kind', ['bert', 'distilbert'])
def test_hidden_states_scores_and_values_are_those_of_the_formulas(tmp_path, kind):
    arrays = bert_arrays(kind, classes=None if kind == 'bert' else 2)
    config, types, epsilon = (BERT, {'types': TYPES}, 1e-3) if kind == 'bert' else (DISTILBERT, {}, 1e-12)
    loaded = pretrained.load(write_folder(tmp_path / 'in', config, arrays))
    outputs = run(loaded, **types)
    for i, (tokens, seen) in enumerate(zip(TOKENS, SEEN, strict=True)):
        hidden, scores, values = bert_hidden(arrays, kind, tokens, seen, TYPES[i], epsilon)
        close = {'rtol': 1e-4, 'atol': 1e-4}
        np.testing.assert_allclose(outputs.features['block1'][i], hidden, **close)
        np.testing.assert_allclose(outputs.features['block1/attention/scores'][i], scores, **close)
        np.testing.assert_allclose(outputs.features['block1/attention/values'][i], values, **close)
        names = ('pooler.dense', np.tanh) if kind == 'bert' else ('pre_classifier', lambda x: np.maximum(x, 0))
        pooled = names[1](hidden[0] @ arrays[f'{names[0]}.weight'].T + arrays[f'{names[0]}.bias'])
        np.testing.assert_allclose(outputs.features['pooled'][i], pooled, **close)
        if kind == 'bert':
            np.testing.assert_array_equal(outputs.logits[i], outputs.features['block1'][i])
        else:
            logits = pooled @ arrays['classifier.weight'].T + arrays['classifier.bias']
            np.testing.assert_allclose(outputs.logits[i], logits, **close)
    # What is not seen changes nothing of what is.
    other = run(loaded, tokens=np.where(SEEN, TOKENS, 5), **types)
    np.testing.assert_array_equal(other.features['pooled'], outputs.features['pooled'])


def test_bert_with_and_without_heads(tmp_path):
    arrays = bert_arrays(classes=3)
    loaded = pretrained.load(write_folder(tmp_path / 'classifier', BERT, arrays))
    assert (loaded.module.classes, loaded.module.pooler) == (3, 'tanh')
    # A head of the training before is left out, and so is a pooler that is not there; old names of the norms are known.
    before = {
        name.replace('LayerNorm.weight', 'LayerNorm.gamma').replace('LayerNorm.bias', 'LayerNorm.beta'): array
        for name, array in arrays.items()
        if 'pooler' not in name and 'classifier' not in name
    }
    before['cls.predictions.bias'] = np.ones(11, np.float32)
    other = pretrained.load(write_folder(tmp_path / 'before', BERT, before))
    assert (other.module.classes, other.module.pooler) == (None, None)
    for name in ('tokens', 'block1'):
        jax.tree.map(np.testing.assert_array_equal, other.variables['params'][name], loaded.variables['params'][name])


@pytest.mark.parametrize(
    'changed, arrays, said',
    [
        ({'hidden_act': 'relu'}, {}, "hidden_act is 'relu', and models.Encoder does 'gelu' alone"),
        ({'position_embedding_type': 'relative_key'}, {}, "position_embedding_type is 'relative_key', and"),
        ({'is_decoder': True}, {}, 'is_decoder is True, and'),
        ({'embedding_size': 4}, {}, 'says what is not known here: embedding_size (4)'),
        (
            {'type_vocab_size': 3},
            {},
            'embeddings.token_type_embeddings.weight is (2, 12), and params/types/embedding is (3, 12)',
        ),
        ({}, {'qa_outputs.weight': np.ones((2, 12), np.float32)}, 'not used: qa_outputs.weight'),
        ({'num_attention_heads': 5}, {}, '5 heads must divide the width 12'),
    ],
    ids=str,
)
def test_what_an_encoder_cannot_do_is_one_line(tmp_path, changed, arrays, said):
    folder = write_folder(tmp_path / 'in', BERT | changed, bert_arrays() | arrays)
    with pytest.raises(ValueError) as caught:  # noqa: PT011  a part of it is compared as it stands
        pretrained.load(folder)
    assert said in str(caught.value)
    assert '\n' not in str(caught.value)


def test_a_classifier_of_tokens_is_not_taken_for_one_of_texts(tmp_path):
    arrays = {name: array for name, array in bert_arrays(classes=3).items() if 'pooler' not in name}
    with pytest.raises(ValueError, match=r'a classifier of single tokens is not read; models.Encoder classifies whole texts$'):
        pretrained.load(write_folder(tmp_path / 'in', BERT, arrays))


def test_minilm_and_tinybert_find_their_taps_and_see_no_padding():
    teacher = models.Encoder(vocabulary=11, depth=2, width=16, heads=2, hidden=6, length=5, classes=2)
    taps = tuple(f'/attention/{name}' for name in ('scores', 'values'))
    student_network = networks.from_linen(ENCODER, features=tuple(f'block0{tap}' for tap in taps))
    teacher_network = networks.from_linen(teacher, features=tuple(f'block1{tap}' for tap in taps))
    layers = [(f'block0{tap}', f'block1{tap}') for tap in taps]
    objective = objectives.attention_maps(*layers[0], variant='kl') + objectives.value_relations(*layers[1])
    problem = training.distillation(student_network, teacher_network, objective, optax.adam(1e-2))

    @jax.jit
    def start(inputs):
        variables = teacher_network.init(jax.random.key(0), inputs)
        return variables, student_network.init(jax.random.key(1), inputs)

    padded = {'tokens': np.where(SEEN, TOKENS, 5), 'mask': SEEN}
    batches = [{'inputs': inputs, 'mask': SEEN > 0} for inputs in ({'tokens': TOKENS, 'mask': SEEN}, padded)]
    variables, student = start(batches[0]['inputs'])
    ends = [
        training.fit(
            problem, batch, variables, key=jax.random.key(2), batch_size=2, steps=3, student_variables=student
        ).variables
        for batch in batches
    ]
    jax.tree.map(np.testing.assert_array_equal, *ends)
    began, ended = (tree['params']['block0']['attention']['query']['kernel'] for tree in (student, ends[0]))
    assert np.abs(ended - began).max() > 1e-3


ENCODER = models.Encoder(vocabulary=11, depth=1, width=8, heads=2, hidden=6, length=5, classes=2)


def test_no_plausible_numbers_from_tokens_that_are_none():
    variables = ENCODER.init(jax.random.key(0), jnp.asarray(TOKENS))
    logits = jax.jit(ENCODER.apply)(variables, jnp.asarray(np.where(TOKENS == 10, 11, TOKENS)))
    assert np.isnan(logits[0]).all()
    assert np.isfinite(logits[1]).all()
    # A row of padding alone is finite, so that it can be masked out of a loss with its gradient.
    nothing = jax.jit(ENCODER.apply)(variables, jnp.asarray(TOKENS), jnp.zeros_like(TOKENS))
    assert np.isfinite(nothing).all()


def test_half_precision_is_near_and_narrowed_layers_fit():
    variables = ENCODER.init(jax.random.key(0), jnp.asarray(TOKENS))
    whole = ENCODER.apply(variables, jnp.asarray(TOKENS))
    half = ENCODER.clone(dtype=jnp.bfloat16).apply(variables, jnp.asarray(TOKENS))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), whole, atol=0.05)
    block = variables['params']['block0']
    block |= {'expand': {name: leaf[..., :4] for name, leaf in block['expand'].items()}}
    block['reduce'] = {**block['reduce'], 'kernel': block['reduce']['kernel'][:4]}
    narrow = models.narrow(ENCODER, variables, jnp.asarray(TOKENS))
    assert dict(narrow.narrowed) == {'block0/expand': 4}
    assert narrow.apply(variables, jnp.asarray(TOKENS)).shape == (2, 2)


@pytest.mark.parametrize(
    'options, inputs, said',
    [
        ({'heads': 3}, {}, '3 heads must divide the width 8'),
        ({'pooler': 'gelu'}, {}, "pooler must be 'tanh', 'relu' or None, got 'gelu'"),
        ({}, {'tokens': np.ones((1, 2), np.float32)}, r'tokens must be integers \[batch, length\], got float32 \(1, 2\)'),
        ({}, {'tokens': np.ones((1, 6), np.int32)}, 'texts must have 1 to 5 tokens, got 6'),
        ({'types': 0}, {'types': TYPES}, 'this one does not tell types apart, and got types'),
        ({}, {'mask': SEEN[:1]}, r'mask must be integers of the shape of the tokens, \(2, 5\), got int\d+ \(1, 5\)'),
        ({}, {'types': SEEN > 0}, r'types must be integers of the shape of the tokens, \(2, 5\), got bool'),
    ],
)
def test_inputs_that_do_not_fit(options, inputs, said):
    with pytest.raises(ValueError, match=f'^Encoder: {said}'):
        jax.eval_shape(lambda: ENCODER.clone(**options).init(jax.random.key(0), **({'tokens': TOKENS} | inputs)))
