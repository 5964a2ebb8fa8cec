"""Files as others write them, of tiny random weights."""

import json
import math
import struct

import numpy as np

RNG = np.random.default_rng(0)


def write_safetensors(path, arrays, names=None):
    """By the description of the format: a length, a header in JSON, and the bytes of all arrays."""
    kinds = {'float64': 'F64', 'float32': 'F32', 'float16': 'F16', 'bfloat16': 'BF16', 'int64': 'I64'} | (names or {})
    header, data = {'__metadata__': {'format': 'pt'}}, b''
    for name, array in arrays.items():
        content = np.ascontiguousarray(array).tobytes()
        offsets = [len(data), len(data) + len(content)]
        header[name] = {'dtype': kinds[array.dtype.name], 'shape': list(array.shape), 'data_offsets': offsets}
        data += content
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack('<Q', len(text)) + text + data)


def random(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


LLAMA = {
    'model_type': 'llama',
    'architectures': ['LlamaForCausalLM'],
    'hidden_act': 'silu',
    'vocab_size': 11,
    'hidden_size': 12,
    'intermediate_size': 10,
    'num_hidden_layers': 2,
    'num_attention_heads': 3,
    'num_key_value_heads': 1,
    'rms_norm_eps': 1e-5,
    'rope_theta': 500.0,
    'tie_word_embeddings': False,
    'torch_dtype': 'float32',
}


def llama_arrays(head_width=4, bias=False, tied=False):
    """[outputs, inputs], as PyTorch has them."""
    arrays = {'model.embed_tokens.weight': random(11, 12), 'model.norm.weight': random(12)}
    for i in range(2):
        block = f'model.layers.{i}'
        for name, rows in (('q', 3), ('k', 1), ('v', 1)):
            arrays[f'{block}.self_attn.{name}_proj.weight'] = random(rows * head_width, 12)
            if bias:
                arrays[f'{block}.self_attn.{name}_proj.bias'] = random(rows * head_width)
        arrays[f'{block}.self_attn.o_proj.weight'] = random(12, 3 * head_width)
        arrays[f'{block}.mlp.gate_proj.weight'] = random(10, 12)
        arrays[f'{block}.mlp.up_proj.weight'] = random(10, 12)
        arrays[f'{block}.mlp.down_proj.weight'] = random(12, 10)
        arrays[f'{block}.input_layernorm.weight'] = random(12)
        arrays[f'{block}.post_attention_layernorm.weight'] = random(12)
    return arrays if tied else {**arrays, 'lm_head.weight': random(11, 12)}


def write_folder(folder, config, arrays):
    """As Hugging Face lays it out."""
    folder.mkdir(exist_ok=True)
    (folder / 'config.json').write_text(json.dumps(config))
    write_safetensors(folder / 'model.safetensors', arrays)
    return folder


def llama_logits(arrays, tokens, *, head_width=4, theta=500.0, epsilon=1e-5):
    """The oracle, in float64: one row of tokens, three heads of queries that share one of keys and values."""
    arrays = {name: np.asarray(array, np.float64) for name, array in arrays.items()}

    def norm(x, name):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + epsilon) * arrays[name]

    def turned(x):
        half = head_width // 2
        places = np.arange(len(x))[:, None, None] * theta ** (-np.arange(half) / half)
        number = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * places)
        return np.concatenate([number.real, number.imag], -1)

    x = arrays['model.embed_tokens.weight'][tokens]
    length = len(tokens)
    for i in range(2):
        block = f'model.layers.{i}'
        y = norm(x, f'{block}.input_layernorm.weight')
        projected = {}
        for name in 'qkv':
            flat = y @ arrays[f'{block}.self_attn.{name}_proj.weight'].T
            flat = flat + arrays.get(f'{block}.self_attn.{name}_proj.bias', 0)
            projected[name] = flat.reshape(length, -1, head_width)
        q, k, v = turned(projected['q']), turned(projected['k'])[:, 0], projected['v'][:, 0]
        scores = np.einsum('qhd,kd->hqk', q, k) / np.sqrt(head_width)
        scores[:, np.triu(np.ones((length, length), bool), 1)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum('hqk,kd->qhd', weights / weights.sum(-1, keepdims=True), v).reshape(length, -1)
        x = x + mixed @ arrays[f'{block}.self_attn.o_proj.weight'].T
        y = norm(x, f'{block}.post_attention_layernorm.weight')
        gate, up = (y @ arrays[f'{block}.mlp.{name}_proj.weight'].T for name in ('gate', 'up'))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ arrays[f'{block}.mlp.down_proj.weight'].T
    return norm(x, 'model.norm.weight') @ arrays.get('lm_head.weight', arrays['model.embed_tokens.weight']).T


BERT = {
    'model_type': 'bert',
    'hidden_act': 'gelu',
    'vocab_size': 11,
    'hidden_size': 12,
    'intermediate_size': 10,
    'num_hidden_layers': 2,
    'num_attention_heads': 3,
    'max_position_embeddings': 6,
    'type_vocab_size': 2,
    'layer_norm_eps': 1e-3,
    'position_embedding_type': 'absolute',
    'id2label': {'0': 'no', '1': 'yes'},
}
DISTILBERT = {
    'model_type': 'distilbert',
    'activation': 'gelu',
    'vocab_size': 11,
    'dim': 12,
    'hidden_dim': 10,
    'n_layers': 2,
    'n_heads': 3,
    'max_position_embeddings': 6,
    'sinusoidal_pos_embds': False,
}
# In the order of what they are: queries, keys, values, their output, its norm, the two layers of the MLP, its norm.
PARTS = {
    'bert': (
        *(f'attention.self.{name}' for name in ('query', 'key', 'value')),
        *('attention.output.dense', 'attention.output.LayerNorm', 'intermediate.dense', 'output.dense', 'output.LayerNorm'),
    ),
    'distilbert': (
        *(f'attention.{name}_lin' for name in ('q', 'k', 'v', 'out')),
        *('sa_layer_norm', 'ffn.lin1', 'ffn.lin2', 'output_layer_norm'),
    ),
}
LAYER = {'bert': 'encoder.layer.{}.', 'distilbert': 'transformer.layer.{}.'}


def bert_arrays(kind='bert', classes=None):
    """[outputs, inputs], as PyTorch has them; with a head, names begin with the model type."""
    arrays = {f'embeddings.{name}_embeddings.weight': random(n, 12) for name, n in (('word', 11), ('position', 6))}
    arrays |= {'embeddings.LayerNorm.weight': random(12), 'embeddings.LayerNorm.bias': random(12)}
    if kind == 'bert':
        arrays |= {'embeddings.token_type_embeddings.weight': random(2, 12), 'embeddings.position_ids': np.arange(6)[None]}
        arrays |= {'pooler.dense.weight': random(12, 12), 'pooler.dense.bias': random(12)}
    for i in range(2):
        for name, shape in zip(PARTS[kind], [(12, 12)] * 4 + [(12,), (10, 12), (12, 10), (12,)], strict=True):
            arrays[f'{LAYER[kind].format(i)}{name}.weight'] = random(*shape)
            arrays[f'{LAYER[kind].format(i)}{name}.bias'] = random(shape[0])
    if classes is None:
        return arrays
    arrays = {f'{kind}.{name}': array for name, array in arrays.items()}
    if kind == 'distilbert':
        arrays |= {'pre_classifier.weight': random(12, 12), 'pre_classifier.bias': random(12)}
    return arrays | {'classifier.weight': random(classes, 12), 'classifier.bias': random(classes)}


def bert_hidden(arrays, kind, tokens, seen, types=None, epsilon=1e-3):
    """The oracle, in float64, of one text: hidden states, and the last block's scores [3, length, length] and values."""
    arrays = {name.removeprefix(f'{kind}.'): np.asarray(array, np.float64) for name, array in arrays.items()}

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt(np.mean(centred**2, -1, keepdims=True) + epsilon)
        return scaled * arrays[f'{name}.weight'] + arrays[f'{name}.bias']

    def dense(x, name):
        return x @ arrays[f'{name}.weight'].T + arrays[f'{name}.bias']

    x = arrays['embeddings.word_embeddings.weight'][tokens]
    x = x + arrays['embeddings.position_embeddings.weight'][: len(tokens)]
    if kind == 'bert':
        x = x + arrays['embeddings.token_type_embeddings.weight'][types]
    x = norm(x, 'embeddings.LayerNorm')
    for i in range(2):
        names = [LAYER[kind].format(i) + name for name in PARTS[kind]]
        q, k, v = (dense(x, name).reshape(len(tokens), 3, 4).swapaxes(0, 1) for name in names[:3])
        scores = q @ k.swapaxes(1, 2) / 2
        weights = np.exp(scores - scores.max(-1, keepdims=True)) * seen
        mixed = weights / weights.sum(-1, keepdims=True) @ v
        x = norm(x + dense(mixed.swapaxes(0, 1).reshape(len(tokens), 12), names[3]), names[4])
        y = dense(x, names[5])
        y = y * (1 + np.vectorize(math.erf)(y / np.sqrt(2))) / 2
        x = norm(x + dense(y, names[6]), names[7])
    return x, scores, v
