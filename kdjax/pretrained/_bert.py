"""Encoders of BERT's family, by Hugging Face's names."""

import functools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from kdjax.models import Encoder
from kdjax.pretrained._configs import Configuration
from kdjax.pretrained._mapping import Rule, transposed

MODEL_TYPES = ('bert', 'distilbert')
_LAYERS = {
    'bert': {
        'attention.self.query': 'attention/query',
        'attention.self.key': 'attention/key',
        'attention.self.value': 'attention/value',
        'attention.output.dense': 'attention/out',
        'attention.output.LayerNorm': 'attention_norm',
        'intermediate.dense': 'expand',
        'output.dense': 'reduce',
        'output.LayerNorm': 'mlp_norm',
    },
    'distilbert': {
        'attention.q_lin': 'attention/query',
        'attention.k_lin': 'attention/key',
        'attention.v_lin': 'attention/value',
        'attention.out_lin': 'attention/out',
        'sa_layer_norm': 'attention_norm',
        'ffn.lin1': 'expand',
        'ffn.lin2': 'reduce',
        'output_layer_norm': 'mlp_norm',
    },
}


def encoder_of_config(said: Mapping[str, Any], arrays: Mapping[str, Any], where: str) -> Encoder:
    """The encoder that a `config.json` describes; which heads there are, the arrays say.

    Raises:
      ValueError: `models.Encoder` cannot do what it says, or does not know it.
    """
    bert = said['model_type'] == 'bert'
    config = Configuration(said, where)
    config.must_be('hidden_act' if bert else 'activation', 'gelu', 'gelu', 'Encoder')
    config.must_be('position_embedding_type', 'absolute', 'absolute', 'Encoder')
    config.must_be('is_decoder', False, False, 'Encoder')
    config.must_be('add_cross_attention', False, False, 'Encoder')
    # What their classes do with the outputs, how positions were made before they were written, and what older ones had of a
    # pooler and never used.
    older = ('directionality', *(f'pooler_{name}' for name in ('fc_size', 'num_attention_heads', 'num_fc_layers', 'type')))
    for name in ('tie_word_embeddings', 'tie_weights_', 'sinusoidal_pos_embds', 'pooler_size_per_head', *older):
        config.get(name, None)
    head = arrays.get('classifier.weight')
    names = ('hidden_size', 'num_hidden_layers', 'num_attention_heads', 'intermediate_size')
    width, depth, heads, hidden = (
        config.number(name) for name in (names if bert else ('dim', 'n_layers', 'n_heads', 'hidden_dim'))
    )
    if bert:
        pooler = 'tanh' if any(name.endswith('pooler.dense.weight') for name in arrays) else None
    else:
        pooler = 'relu' if 'pre_classifier.weight' in arrays else None
    if head is not None and pooler is None:
        raise ValueError(f'{where}: a classifier of single tokens is not read; models.Encoder classifies whole texts')
    encoder = Encoder(
        vocabulary=config.number('vocab_size'),
        depth=depth,
        width=width,
        heads=heads,
        hidden=hidden,
        length=config.number('max_position_embeddings'),
        types=config.number('type_vocab_size') if bert else 0,
        epsilon=config.number('layer_norm_eps', 1e-12, float) if bert else 1e-12,
        pooler=pooler,
        classes=None if head is None else int(head.shape[0]),
    )
    config.finish('Encoder')
    return encoder


def rules_of_bert(encoder: Encoder, kind: str, arrays: Mapping[str, Any]) -> list[Rule]:
    """From the names of Hugging Face, which begin with the model type where a head is on top."""
    start = f'{kind}.' if any(name.startswith(f'{kind}.') for name in arrays) else ''
    # The first converters to PyTorch wrote TensorFlow's names of the norms' arrays.
    gamma = any(name.endswith('LayerNorm.gamma') for name in arrays)
    scale, bias = ('gamma', 'beta') if gamma else ('weight', 'bias')
    rules = [
        Rule(f'{start}embeddings.word_embeddings.weight', 'params/tokens/embedding'),
        Rule(f'{start}embeddings.position_embeddings.weight', 'params/positions/embedding'),
        Rule(f'{start}embeddings.token_type_embeddings.weight', 'params/types/embedding'),
        Rule(f'{start}embeddings.LayerNorm.{scale}', 'params/norm/scale'),
        Rule(f'{start}embeddings.LayerNorm.{bias}', 'params/norm/bias'),
        Rule(f'{start}embeddings.position_ids', None),  # 0, 1, 2, ...
        # Heads of the training before; they are not part of an encoder.
        *(Rule(name, None) for name in arrays if re.match(r'(cls|vocab_(transform|layer_norm|projector))\.', name)),
    ]
    pooler = f'{start}pooler.dense' if kind == 'bert' else 'pre_classifier'
    for theirs, ours in ((pooler, 'pooler'), ('classifier', 'head')):
        rules += [transposed(f'{theirs}.weight', f'params/{ours}/kernel'), Rule(f'{theirs}.bias', f'params/{ours}/bias')]
    layer = f'{start}encoder.layer.{{}}.' if kind == 'bert' else f'{start}transformer.layer.{{}}.'
    by_head = (encoder.width, encoder.heads, encoder.width // encoder.heads)
    for theirs, ours in _LAYERS[kind].items():
        theirs, ours = f'{layer}{theirs}', f'params/block{{}}/{ours}'
        if ours.endswith('norm'):
            norm = kind == 'bert'
            rules += [Rule(f'{theirs}.{scale if norm else "weight"}', f'{ours}/scale')]
            rules += [Rule(f'{theirs}.{bias if norm else "bias"}', f'{ours}/bias')]
        elif ours.endswith('out'):
            rules.append(Rule(f'{theirs}.weight', f'{ours}/kernel', functools.partial(_reshaped, shape=(*by_head[1:], -1))))
            rules.append(Rule(f'{theirs}.bias', f'{ours}/bias'))
        elif 'attention/' in ours:
            rules.append(Rule(f'{theirs}.weight', f'{ours}/kernel', functools.partial(_reshaped, shape=by_head)))
            rules.append(Rule(f'{theirs}.bias', f'{ours}/bias', functools.partial(_split, shape=by_head[1:])))
        else:
            rules += [transposed(f'{theirs}.weight', f'{ours}/kernel'), Rule(f'{theirs}.bias', f'{ours}/bias')]
    return rules


def _reshaped(kernel: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Transposed, with an axis for the heads; a view still."""
    return kernel.T.reshape(shape)


def _split(bias: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """With an axis for the heads."""
    return bias.reshape(shape)
