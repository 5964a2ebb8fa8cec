"""The tokenizer inside a GGUF file."""

# An extra, that may not be installed.
# pyright: reportMissingImports=false

import os
import pathlib
from typing import Any

from kdjax.pretrained._gguf import read_gguf

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
# How text is cut before pairs are merged, by the name that the file gives it.
_DIGITS_ALONE = ('smollm', 'starcoder', 'refact')
_PLAIN = ('gpt-2',)
_QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _QWEN2.replace(r'|\p{N}|', r'|\p{N}{1,3}|')
_PATTERNS = {'qwen2': _QWEN2, 'llama-bpe': _LLAMA3, 'llama3': _LLAMA3}
_OF_LLAMA3 = ('llama-bpe', 'llama3')


def gguf_tokenizer(path: str | os.PathLike) -> Any:
    """The tokenizer that a GGUF file carries, as a `tokenizers.Tokenizer`: pairs of bytes merged as in GPT-2.

    Text is cut before merging as the file says under `tokenizer.ggml.pre`: for SmolLM each digit alone, then as GPT-2 does; for
    Qwen2 and Llama 3 by their patterns. Control tokens are special: `decode` leaves them out. Nothing is put before or behind
    a text unless the file asks for it.

    Args:
      path: the file.

    Raises:
      ValueError: the file is damaged, has no tokenizer, or one of another kind.
      ImportError: gguf or tokenizers is not installed.

    References:
      Sennrich, Haddow, Birch. Neural Machine Translation of Rare Words with Subword Units. 2016.
      https://arxiv.org/abs/1508.07909
      Radford, Wu, Child, Luan, Amodei, Sutskever. Language Models are Unsupervised Multitask Learners. 2019.
    """
    try:
        import tokenizers
        from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
    except ImportError as error:
        message = "gguf_tokenizer needs tokenizers, which is not installed: pip install 'kdjax[pretrained]'"
        raise ImportError(message) from error
    path = pathlib.Path(path)
    said, _ = read_gguf(path)
    kind, cut = said.get('tokenizer.ggml.model'), said.get('tokenizer.ggml.pre')
    if kind is None:
        raise ValueError(f'{path} has no tokenizer')
    if kind != 'gpt2':
        raise ValueError(f'{path}: its tokenizer is {kind!r}, and only byte-level pairs, gpt2, are read')
    if cut not in _DIGITS_ALONE + _PLAIN + tuple(_PATTERNS):
        known = ', '.join((*_DIGITS_ALONE, *_PLAIN, *_PATTERNS))
        raise ValueError(f'{path}: its tokenizer cuts text as {cut!r}; known are {known}')
    tokens, merges = said.get('tokenizer.ggml.tokens'), said.get('tokenizer.ggml.merges')
    kinds = said.get('tokenizer.ggml.token_type', [_NORMAL] * len(tokens or ()))
    if not tokens or merges is None or len(kinds) != len(tokens) or len(set(tokens)) != len(tokens):
        raise ValueError(f'{path} is damaged: its tokenizer lacks tokens, merges, or the kind of each token')
    pairs = [tuple(merge.split(' ')) for merge in merges]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if any(len(pair) != 2 or not {*pair, ''.join(pair)} <= vocabulary.keys() for pair in pairs):
        raise ValueError(f'{path} is damaged: a merge of its tokenizer makes no token')
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=cut in _OF_LLAMA3))
    if cut == 'qwen2':
        tokenizer.normalizer = normalizers.NFC()
    if cut in _PATTERNS:
        pattern = pre_tokenizers.Split(tokenizers.Regex(_PATTERNS[cut]), 'isolated')
        before = [pattern, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    else:
        digits = [pre_tokenizers.Digits(individual_digits=True)] if cut in _DIGITS_ALONE else []
        before = [*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(before)
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, each in zip(tokens, kinds, strict=True) if each == _CONTROL]
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in special])
    added = [token for token, each in zip(tokens, kinds, strict=True) if each == _USER_DEFINED]
    tokenizer.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in added])
    ends = [said.get(f'tokenizer.ggml.{name}_token_id') for name in ('bos', 'eos')]
    # llama.cpp begins texts of Llama 3 unless the file says otherwise.
    asked = [said.get('tokenizer.ggml.add_bos_token', cut in _OF_LLAMA3), said.get('tokenizer.ggml.add_eos_token', False)]
    first, last = ([tokens[i]] if wanted and i is not None else [] for i, wanted in zip(ends, asked, strict=True))
    if first or last:
        special_tokens = [(token, vocabulary[token]) for token in {*first, *last}]
        single = [*first, '$A', *last]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special_tokens)
    return tokenizer
