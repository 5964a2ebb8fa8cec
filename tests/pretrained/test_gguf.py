"""GGUF: llama.cpp's order of rows is undone, quantized arrays are within their steps, and its tokenizer is the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.pretrained_files import llama_arrays, llama_logits

from kdjax import pretrained

gguf = pytest.importorskip('gguf', reason='the extra `pretrained` is not installed')
TOKENS = np.array([3, 7, 0, 10, 7])
NAMES = {
    'model.embed_tokens': 'token_embd',
    'model.norm': 'output_norm',
    'lm_head': 'output',
    'self_attn.q_proj': 'attn_q',
    'self_attn.k_proj': 'attn_k',
    'self_attn.v_proj': 'attn_v',
    'self_attn.o_proj': 'attn_output',
    'mlp.gate_proj': 'ffn_gate',
    'mlp.up_proj': 'ffn_up',
    'mlp.down_proj': 'ffn_down',
    'input_layernorm': 'attn_norm',
    'post_attention_layernorm': 'ffn_norm',
    'model.layers': 'blk',
}
BYTES = ['<|end|>', 'Ġ', 'a', 'b', '1', '2', 'ab', 'Ġab', '12', 'Ċ', 'c']


def beside(rows, heads):
    """As llama.cpp's converter orders the rows of queries and keys: each second beside its first."""
    return rows.reshape(heads, 2, -1, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def write(path, arrays, *, kind='llama', quantization=None, said=(), **tokenizer):
    """As llama.cpp's converter writes it."""
    writer = gguf.GGUFWriter(path, kind)
    writer.add_block_count(2)
    writer.add_context_length(16)
    writer.add_embedding_length(12)
    writer.add_feed_forward_length(10)
    writer.add_head_count(3)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(500.0)
    writer.add_layer_norm_rms_eps(1e-5)
    for name, value in dict(said).items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(f'{kind}.{name}', value)
    for name, value in tokenizer.items():
        adders = {'tokens': writer.add_token_list, 'merges': writer.add_token_merges, 'types': writer.add_token_types}
        adders |= {'model': writer.add_tokenizer_model, 'pre': writer.add_tokenizer_pre, 'bos': writer.add_bos_token_id}
        adders['add_bos'] = writer.add_add_bos_token
        adders[name](value)
    for name, array in arrays.items():
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        if kind == 'llama' and 'attn_q' in name:
            array = beside(array, 3)
        if kind == 'llama' and 'attn_k' in name:
            array = beside(array, 1)
        if quantization is not None and array.ndim == 2:
            array = gguf.quants.quantize(np.ascontiguousarray(array), quantization)
            writer.add_tensor(name, array, raw_dtype=quantization)
        else:
            writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize('kind', ['llama', 'qwen2'])
@pytest.mark.parametrize('half', [False, True])
def test_a_file_of_llama_cpp(tmp_path, kind, half):
    arrays = llama_arrays(bias=kind == 'qwen2', tied=half)
    if half:
        arrays = {name: array.astype(np.float16) if array.ndim == 2 else array for name, array in arrays.items()}
    loaded = pretrained.load(write(tmp_path / 'w.gguf', arrays, kind=kind))
    logits = jax.jit(loaded.module.apply)(loaded.variables, jnp.asarray(TOKENS)[None])[0]
    np.testing.assert_allclose(logits, llama_logits(arrays, TOKENS), rtol=1e-4, atol=1e-4)
    assert loaded.config['general.architecture'] == kind
    assert loaded.module.tied == half
    assert loaded.variables['params']['block0']['gate']['kernel'].dtype == (np.float16 if half else np.float32)


@pytest.mark.parametrize('name, step', [('Q8_0', 1 / 127), ('Q4_1', 1 / 15), ('BF16', 2**-8)])
def test_quantized_arrays_are_within_half_a_step(tmp_path, name, step):
    array = np.random.default_rng(0).uniform(-1, 1, (1500, 64)).astype(np.float32)
    found = pretrained.read_state_dict(write(tmp_path / 'w.gguf', {'x': array}, quantization=gguf.GGMLQuantizationType[name]))[
        'x'
    ]
    assert found.shape == array.shape
    assert found.dtype == np.float32
    assert np.abs(np.asarray(found) - array).max() <= step * 1.02 + 1e-3
    again = gguf.quants.dequantize(
        gguf.quants.quantize(array, gguf.GGMLQuantizationType[name]), gguf.GGMLQuantizationType[name]
    )
    np.testing.assert_array_equal(np.asarray(found), again)


@pytest.mark.parametrize(
    'said, message',
    [
        ({'rope.scaling.type': 'yarn'}, "rope.scaling.type is 'yarn', and models.Decoder does 'none' alone"),
        ({'rope.dimension_count': 2}, 'rope.dimension_count is 2, and'),
        ({'expert_count': 4}, r'says what is not known here: expert_count \(4\)'),
        ({'vocab_size': 12}, r'token_embd.weight is \(11, 12\), and params/tokens/embedding is \(12, 12\)'),
    ],
    ids=str,
)
def test_what_a_decoder_cannot_do_is_one_line(tmp_path, said, message):
    with pytest.raises(ValueError, match=rf'^\S+w\.gguf: [^\n]*{message}|^\S+w\.gguf {message}'):
        pretrained.load(write(tmp_path / 'w.gguf', llama_arrays(), said=said))


def test_damaged_files_and_other_networks(tmp_path):
    path = write(tmp_path / 'w.gguf', llama_arrays())
    whole = path.read_bytes()
    for kept in (3, 100, -40):
        path.write_bytes(whole[:kept])
        with pytest.raises(ValueError, match=r'^\S+w.gguf is damaged or no GGUF file: [^\n]+$'):
            pretrained.load(path)
    with pytest.raises(ValueError, match=r"general.architecture is 'bloom'; known are llama, qwen2$"):
        pretrained.load(write(tmp_path / 'b.gguf', {}, kind='bloom'))
    path = write(tmp_path / 'r.gguf', llama_arrays() | {'rope_freqs.weight': np.ones(2, np.float32)})
    with pytest.raises(ValueError, match=r'not used: rope_freqs.weight$'):
        pretrained.load(path)


TOKENIZER = {
    'model': 'gpt2',
    'pre': 'smollm',
    'tokens': BYTES,
    'merges': ['a b', 'Ġ ab', '1 2'],
    'types': [3] + [1] * 10,
}


def test_its_tokenizer(tmp_path):
    pytest.importorskip('tokenizers', reason='the extra `pretrained` is not installed')
    tokenizer = pretrained.gguf_tokenizer(write(tmp_path / 'w.gguf', {}, **TOKENIZER))
    encoded = tokenizer.encode('ab ab12<|end|>\nc')
    # Digits stay alone, though there is a merge of these two.
    assert encoded.tokens == ['ab', 'Ġab', '1', '2', '<|end|>', 'Ċ', 'c']
    assert [BYTES[i] for i in encoded.ids] == encoded.tokens
    assert tokenizer.decode(encoded.ids) == 'ab ab12\nc'
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == 'ab ab12<|end|>\nc'
    plain = write(tmp_path / 'plain.gguf', {}, **TOKENIZER | {'pre': 'gpt-2', 'add_bos': True, 'bos': 0})
    assert pretrained.gguf_tokenizer(plain).encode('a12').tokens == ['<|end|>', 'a', '12']


@pytest.mark.parametrize(
    'changed, said',
    [
        ({'model': 'llama'}, "its tokenizer is 'llama', and only byte-level pairs, gpt2, are read"),
        ({'pre': 'dbrx'}, "its tokenizer cuts text as 'dbrx'; known are smollm, "),
        ({'types': [1]}, 'is damaged: its tokenizer lacks tokens, merges, or the kind of each token'),
        ({'merges': ['a c']}, 'is damaged: a merge of its tokenizer makes no token'),
    ],
    ids=str,
)
def test_tokenizers_that_are_not_read(tmp_path, changed, said):
    pytest.importorskip('tokenizers', reason='the extra `pretrained` is not installed')
    with pytest.raises(ValueError, match=rf'^\S+w.gguf:? {said}'):
        pretrained.gguf_tokenizer(write(tmp_path / 'w.gguf', {}, **TOKENIZER | changed))


def test_a_file_without_a_tokenizer(tmp_path):
    pytest.importorskip('tokenizers', reason='the extra `pretrained` is not installed')
    with pytest.raises(ValueError, match=r'w.gguf has no tokenizer$'):
        pretrained.gguf_tokenizer(write(tmp_path / 'w.gguf', {}))
