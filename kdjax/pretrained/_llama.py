"""Decoders of the Llama family, by Hugging Face's names and by llama.cpp's."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from kdjax.models import Decoder
from kdjax.pretrained._configs import Configuration
from kdjax.pretrained._mapping import Rule, transposed

MODEL_TYPES = ('llama', 'mistral', 'qwen2')
ARCHITECTURES = ('llama', 'qwen2')


def decoder_of_config(said: Mapping[str, Any], where: str) -> Decoder:
    """The decoder that a `config.json` describes.

    Raises:
      ValueError: `models.Decoder` cannot do what it says, or does not know it.
    """
    kind = said['model_type']
    config = Configuration(said, where)
    config.must_be('hidden_act', 'silu', 'silu', 'Decoder')
    config.must_be('mlp_bias', False, False, 'Decoder')
    if kind != 'qwen2':
        # Llama's switch is for the projection of the output too.
        config.must_be('attention_bias', False, False, 'Decoder')
    config.must_be('partial_rotary_factor', 1.0, 1.0, 'Decoder')
    theta = _theta(config)
    heads = config.number('num_attention_heads')
    window = config.get('sliding_window', None)
    if kind == 'qwen2' and not config.switch('use_sliding_window', False):
        window = None
    kinds = set(map(str, config.get('layer_types', [])))
    if len(kinds) > 1 or (window and kind == 'qwen2') or kinds - {'full_attention', 'sliding_attention'}:
        raise ValueError(f'{where}: some layers have a window and some have none, and models.Decoder has one for all')
    if kinds and (kinds == {'sliding_attention'}) != bool(window):
        raise ValueError(f'{where}: layer_types says {kinds.pop()}, and sliding_window {window!r}')
    decoder = Decoder(
        vocabulary=config.number('vocab_size'),
        depth=config.number('num_hidden_layers'),
        width=config.number('hidden_size'),
        heads=heads,
        hidden=config.number('intermediate_size'),
        key_value_heads=config.number('num_key_value_heads', heads if kind == 'llama' else None),
        head_width=config.number('head_dim', said.get('hidden_size', 0) // heads),
        theta=theta,
        epsilon=config.number('rms_norm_eps', 1e-6, float),
        attention_bias=kind == 'qwen2',
        tied=config.switch('tie_word_embeddings', False),
        window=window or None,
    )
    config.finish('Decoder')
    return decoder


def _theta(config: Configuration) -> float:
    """The base of the rotary frequencies, which newer files keep beside the rule that scales them."""
    theta = config.get('rope_theta', None)
    for name in ('rope_scaling', 'rope_parameters'):
        scaling = config.get(name, {})
        if not isinstance(scaling, dict):
            raise ValueError(f'{config.where}: {name} must be an object or null, got {scaling!r}')
        scaling = dict(scaling)
        kind = scaling.pop('rope_type', scaling.pop('type', 'default'))
        scaling.pop('type', None)
        inside = scaling.pop('rope_theta', None)
        if kind != 'default' or scaling.pop('partial_rotary_factor', 1.0) != 1.0 or scaling:
            raise ValueError(f'{config.where}: {name} is {config.said[name]!r}, and models.Decoder does not scale positions')
        if inside is not None:
            if theta is not None and theta != inside:
                raise ValueError(f'{config.where}: rope_theta is {theta!r}, and {inside!r} in {name}')
            theta = inside
    config.must_be('rope_interleaved', False, False, 'Decoder')
    theta = 10_000.0 if theta is None else theta
    if isinstance(theta, bool) or not isinstance(theta, (int, float)) or not theta > 0:
        raise ValueError(f'{config.where}: rope_theta must be a number above 0, got {theta!r}')
    return float(theta)


def rules_of_llama(decoder: Decoder) -> list[Rule]:
    """From the names of Hugging Face."""
    theirs, ours = 'model.layers.{}.', 'params/block{}/'
    rules = [
        Rule('model.embed_tokens.weight', 'params/tokens/embedding'),
        Rule('model.norm.weight', 'params/hidden/scale'),
        Rule(f'{theirs}input_layernorm.weight', f'{ours}attention_norm/scale'),
        Rule(f'{theirs}post_attention_layernorm.weight', f'{ours}mlp_norm/scale'),
        Rule(f'{theirs}self_attn.rotary_emb.inv_freq', None),  # old files keep what follows from theta
        *(transposed(f'{theirs}mlp.{name}_proj.weight', f'{ours}{name}/kernel') for name in ('gate', 'up', 'down')),
    ]
    for name in ('query', 'key', 'value', 'output'):
        rules.append(transposed(f'{theirs}self_attn.{name[0]}_proj.weight', f'{ours}attention/{name}/kernel'))
        rules.append(Rule(f'{theirs}self_attn.{name[0]}_proj.bias', f'{ours}attention/{name}/bias'))
    return [*rules, Rule('lm_head.weight', None) if decoder.tied else transposed('lm_head.weight', 'params/head/kernel')]


def check_tied(decoder: Decoder, arrays: Mapping[str, Any], where: str) -> None:
    """A tied head that a file has all the same must be the embedding.

    Raises:
      ValueError: it is not.
    """
    embedding, head = arrays.get('model.embed_tokens.weight'), arrays.get('lm_head.weight')
    if decoder.tied and embedding is not None and head is not None and not np.array_equal(embedding, head):
        raise ValueError(f'{where}: tie_word_embeddings is true, and lm_head.weight is not model.embed_tokens.weight')


def config_of_decoder(decoder: Decoder) -> dict[str, Any]:
    """The `config.json` of a decoder.

    Raises:
      ValueError: no model type of Hugging Face's that is known here computes what it computes.
    """
    cannot = {
        'softcap': decoder.softcap is not None,
        'scan': decoder.scan,
        'narrowed': bool(decoder.narrowed),
        'window beside attention_bias': decoder.window is not None and decoder.attention_bias,
    }
    if any(cannot.values()):
        what = ', '.join(name for name, there in cannot.items() if there)
        raise ValueError(f'write_hugging_face: Llama, Mistral and Qwen2 have no {what} as this Decoder has')
    kind = 'qwen2' if decoder.attention_bias else 'mistral' if decoder.window is not None else 'llama'
    classes = {'qwen2': 'Qwen2ForCausalLM', 'mistral': 'MistralForCausalLM', 'llama': 'LlamaForCausalLM'}
    return {
        'architectures': [classes[kind]],
        'model_type': kind,
        'hidden_act': 'silu',
        'vocab_size': decoder.vocabulary,
        'num_hidden_layers': decoder.depth,
        'hidden_size': decoder.width,
        'num_attention_heads': decoder.heads,
        'num_key_value_heads': decoder.key_value_heads or decoder.heads,
        'head_dim': decoder.head_width or decoder.width // decoder.heads,
        'intermediate_size': decoder.hidden,
        'rope_theta': float(decoder.theta),
        'rms_norm_eps': float(decoder.epsilon),
        'tie_word_embeddings': decoder.tied,
        **({} if kind == 'qwen2' else {'attention_bias': False}),
        **({'sliding_window': decoder.window} if kind == 'mistral' else {}),
        **({'mlp_bias': False} if kind == 'llama' else {}),
    }


def decoder_of_gguf(said: Mapping[str, Any], arrays: Mapping[str, Any], where: str) -> Decoder:
    """The decoder that the keys of a GGUF file describe.

    Raises:
      ValueError: `models.Decoder` cannot do what they say, or does not know it.
    """
    kind = said['general.architecture']
    mine = {name.removeprefix(f'{kind}.'): value for name, value in said.items() if name.startswith(f'{kind}.')}
    config = Configuration(mine, where)
    heads, width = config.number('attention.head_count'), config.number('embedding_length')
    head_width = config.number('attention.key_length', width // heads)
    config.must_be('attention.value_length', head_width, head_width, 'Decoder')
    config.must_be('rope.dimension_count', head_width, head_width, 'Decoder')
    config.must_be('rope.scaling.type', 'none', 'none', 'Decoder')
    config.get('context_length', None)
    embedding = arrays.get('token_embd.weight')
    decoder = Decoder(
        vocabulary=config.number('vocab_size', None if embedding is None else embedding.shape[0]),
        depth=config.number('block_count'),
        width=width,
        heads=heads,
        hidden=config.number('feed_forward_length'),
        key_value_heads=config.number('attention.head_count_kv', heads),
        head_width=head_width,
        theta=config.number('rope.freq_base', 10_000.0, float),
        epsilon=config.number('attention.layer_norm_rms_epsilon', None, float),
        attention_bias=kind == 'qwen2',
        tied='output.weight' not in arrays,
    )
    config.finish('Decoder')
    return decoder


def rules_of_gguf(decoder: Decoder, kind: str) -> list[Rule]:
    """From the names of llama.cpp, which turns the pairs (x_2i, x_2i+1) in Llama and keeps rows of queries and keys so."""
    theirs, ours = 'blk.{}.', 'params/block{}/'
    rules = [
        Rule('token_embd.weight', 'params/tokens/embedding'),
        Rule('output_norm.weight', 'params/hidden/scale'),
        transposed('output.weight', 'params/head/kernel'),
        Rule(f'{theirs}attn_norm.weight', f'{ours}attention_norm/scale'),
        Rule(f'{theirs}ffn_norm.weight', f'{ours}mlp_norm/scale'),
        *(transposed(f'{theirs}ffn_{name}.weight', f'{ours}{name}/kernel') for name in ('gate', 'up', 'down')),
        transposed(f'{theirs}attn_output.weight', f'{ours}attention/output/kernel'),
    ]
    for name, heads in (('query', decoder.heads), ('key', decoder.key_value_heads or decoder.heads), ('value', 0)):
        kernel = transposed(f'{theirs}attn_{name[0]}.weight', f'{ours}attention/{name}/kernel')
        if kind == 'llama' and heads:
            kernel = kernel._replace(change=lambda x, heads=heads: half_split(x, heads).T, inverse=None)
        rules += [kernel, Rule(f'{theirs}attn_{name[0]}.bias', f'{ours}attention/{name}/bias')]
    return rules


def half_split(kernel: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads · width, inputs] whose pairs lie beside each other, to rows with all firsts of a head before all seconds.

    >>> half_split(np.arange(6)[:, None], 1)[:, 0].tolist()
    [0, 2, 4, 1, 3, 5]
    """
    split = kernel.reshape(heads, kernel.shape[0] // heads // 2, 2, *kernel.shape[1:])
    return split.swapaxes(1, 2).reshape(kernel.shape)
