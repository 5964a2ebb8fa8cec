"""Decoders of others' files compute what their formulas say, and what a decoder cannot do is an error."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers.pretrained_files import LLAMA, llama_arrays, llama_logits, write_folder

from kdjax import models, pretrained

TOKENS = np.array([3, 7, 0, 10, 7])


def logits_of(loaded):
    return np.asarray(jax.jit(loaded.module.apply)(loaded.variables, jnp.asarray(TOKENS)[None]))[0]


@pytest.mark.parametrize(
    'changed, arrays, theta, head_width',
    [
        ({}, llama_arrays(), 500.0, 4),
        ({'head_dim': 6, 'tie_word_embeddings': True}, llama_arrays(6, tied=True), 500.0, 6),
        ({'model_type': 'qwen2'}, llama_arrays(bias=True), 500.0, 4),
        ({'rope_theta': None, 'rope_parameters': {'rope_type': 'default', 'rope_theta': 70.0}}, llama_arrays(), 70.0, 4),
    ],
    ids=['llama', 'tied, wide heads', 'qwen2', 'newer configuration'],
)
def test_a_folder_of_hugging_face_and_back(tmp_path, changed, arrays, theta, head_width):
    loaded = pretrained.load(write_folder(tmp_path / 'in', LLAMA | changed, arrays))
    expected = llama_logits(arrays, TOKENS, head_width=head_width, theta=theta)
    np.testing.assert_allclose(logits_of(loaded), expected, rtol=1e-4, atol=1e-4)
    assert loaded.tokenizer_file is None
    (tmp_path / 'tokens').write_text('{}')
    pretrained.write_hugging_face(tmp_path / 'out', loaded.module, loaded.variables, tokenizer_file=tmp_path / 'tokens')
    again = pretrained.load(tmp_path / 'out')
    assert again.module == loaded.module
    assert again.tokenizer_file.read_text() == '{}'
    assert again.config['model_type'] == (LLAMA | changed)['model_type']
    assert jax.tree.structure(again.variables) == jax.tree.structure(loaded.variables)
    jax.tree.map(np.testing.assert_array_equal, again.variables, loaded.variables)


def test_windows_are_mistrals(tmp_path):
    config = LLAMA | {'model_type': 'mistral', 'sliding_window': 2}
    loaded = pretrained.load(write_folder(tmp_path / 'in', config, llama_arrays()))
    assert loaded.module.window == 2
    pretrained.write_hugging_face(tmp_path / 'out', loaded.module, loaded.variables)
    assert pretrained.load(tmp_path / 'out').module == loaded.module


def test_dtypes_are_those_of_the_file_or_as_asked(tmp_path):
    arrays = {name: array.astype(ml_dtypes.bfloat16) for name, array in llama_arrays().items()}
    folder = write_folder(tmp_path / 'in', LLAMA, arrays)
    as_they_are, cast = pretrained.load(folder), pretrained.load(folder, dtype=jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(as_they_are.variables)} == {np.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(cast.variables)} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(logits_of(as_they_are), logits_of(cast))
    pretrained.write_hugging_face(tmp_path / 'out', as_they_are.module, as_they_are.variables)
    jax.tree.map(np.testing.assert_array_equal, pretrained.load(tmp_path / 'out').variables, as_they_are.variables)


@pytest.mark.parametrize(
    'changed, said',
    [
        ({'hidden_act': 'gelu'}, "hidden_act is 'gelu', and models.Decoder does 'silu' alone"),
        ({'mlp_bias': True}, 'mlp_bias is True, and'),
        ({'attention_bias': True}, 'attention_bias is True, and'),
        ({'rope_scaling': {'type': 'linear', 'factor': 2.0}}, "rope_scaling is {'type': 'linear', 'factor': 2.0}, and"),
        ({'rope_parameters': {'rope_type': 'default', 'rope_theta': 1.0}}, 'rope_theta is 500.0, and 1.0 in rope_parameters'),
        ({'rope_scaling': 'yarn'}, "rope_scaling must be an object or null, got 'yarn'"),
        ({'partial_rotary_factor': 0.5}, 'partial_rotary_factor is 0.5, and'),
        ({'logit_scale': 2}, 'says what is not known here: logit_scale (2)'),
        ({'hidden_size': None}, 'lacks hidden_size'),
        ({'num_hidden_layers': 2.0}, 'num_hidden_layers must be an integer above 0, got 2.0'),
        ({'num_attention_heads': 0}, 'num_attention_heads must be an integer above 0, got 0'),
        ({'rope_theta': -1}, 'rope_theta must be a number above 0, got -1'),
        ({'tie_word_embeddings': 'yes'}, "tie_word_embeddings must be true or false, got 'yes'"),
        ({'quantization_config': {'bits': 4}}, 'weights are quantized, which is read of GGUF alone'),
        ({'model_type': 'gemma'}, "model_type is 'gemma'; known are llama, mistral, qwen2, bert, distilbert"),
        ({'model_type': 'mistral', 'num_key_value_heads': None}, 'lacks num_key_value_heads'),
        ({'model_type': 'qwen2', 'use_sliding_window': True, 'sliding_window': 4}, 'some layers have a window and some'),
        ({'layer_types': ['sliding_attention'] * 2}, 'layer_types says sliding_attention, and sliding_window None'),
        (
            {'intermediate_size': 9},
            'model.layers.0.mlp.down_proj.weight is (12, 10), which makes (10, 12), and params/block0/down/kernel is (9, 12)',
        ),
        ({'num_hidden_layers': 1}, 'not used: model.layers.1.self_attn.q_proj.weight, '),
        ({'num_hidden_layers': 3}, 'missing: model.layers.2.self_attn.k_proj.weight, '),
        ({'tie_word_embeddings': True}, 'tie_word_embeddings is true, and lm_head.weight is not model.embed_tokens.weight'),
        ({'num_key_value_heads': 2, 'head_dim': 3}, 'heads of keys and values must divide 3 heads'),
    ],
    ids=str,
)
def test_what_a_decoder_cannot_do_is_one_line(tmp_path, changed, said):
    folder = write_folder(tmp_path / 'in', LLAMA | changed, llama_arrays())
    with pytest.raises(ValueError) as caught:  # noqa: PT011  a part of it is compared as it stands
        pretrained.load(folder)
    assert said in str(caught.value)
    assert '\n' not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_what_is_no_folder_of_weights(tmp_path):
    with pytest.raises(ValueError, match=r'none must be a folder with config.json and model.safetensors, or a file \*.gguf$'):
        pretrained.load(tmp_path / 'none')
    with pytest.raises(ValueError, match=r'has no config.json, which says what its weights are of$'):
        pretrained.load(tmp_path)
    for text in ('{', '[]', '{"architectures": []}'):
        (tmp_path / 'config.json').write_text(text)
        with pytest.raises(ValueError, match=r'config.json is damaged or says no model_type$'):
            pretrained.load(tmp_path)
    (tmp_path / 'config.json').write_text(json.dumps(LLAMA))
    with pytest.raises(ValueError, match=r'has neither model.safetensors nor'):
        pretrained.load(tmp_path)


def test_what_hugging_face_has_not_is_not_written(tmp_path):
    module = models.Decoder(vocabulary=11, depth=1, width=8, heads=2, hidden=6)
    variables = jax.tree.map(
        lambda leaf: np.ones(leaf.shape, leaf.dtype),
        jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)),
    )
    folder = tmp_path / 'out'
    for options, said in (
        ({'softcap': 2.0}, 'softcap'),
        ({'scan': True}, 'scan'),
        ({'narrowed': {'block0/gate': 3, 'block0/up': 3}}, 'narrowed'),
        ({'window': 3, 'attention_bias': True}, 'window beside attention_bias'),
    ):
        with pytest.raises(ValueError, match=f'^write_hugging_face: Llama, Mistral and Qwen2 have no {said} as this Decoder'):
            pretrained.write_hugging_face(folder, module.clone(**options), variables)
    with pytest.raises(ValueError, match=r'^write_hugging_face: writes models.Decoder alone, got MLP$'):
        pretrained.write_hugging_face(folder, models.MLP((3,)), variables)
    with pytest.raises(ValueError, match=r'variables are not of this module: params/head/kernel$'):
        pretrained.write_hugging_face(folder, module.clone(tied=True), variables)
    integers = jax.tree.map(lambda leaf: leaf.astype(np.int8), variables)
    with pytest.raises(ValueError, match=r'parameters must be of float64, float32, float16, bfloat16, got int8$'):
        pretrained.write_hugging_face(folder, module, integers)
    with pytest.raises(ValueError, match=r'^write_hugging_face: there is no \S+tokens$'):
        pretrained.write_hugging_face(folder, module, variables, tokenizer_file=tmp_path / 'tokens')
    assert not folder.exists()
    pretrained.write_hugging_face(folder, module.clone(cache=4), variables)
    before = (folder / 'model.safetensors').read_bytes()
    with pytest.raises(ValueError, match=r'out has config.json, model.safetensors already; name another folder$'):
        pretrained.write_hugging_face(folder, module, variables)
    assert (folder / 'model.safetensors').read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ['config.json', 'model.safetensors']
