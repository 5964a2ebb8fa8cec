"""A folder of Hugging Face's or a GGUF file, as a module with its variables; and a folder written from them."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from kdjax.pretrained import _bert, _llama
from kdjax.pretrained._files import read_state_dict
from kdjax.pretrained._gguf import read_gguf
from kdjax.pretrained._mapping import Rule, from_state_dict


class Pretrained(NamedTuple):
    """A network that others trained.

    Attributes:
      module: of `kdjax.models`.
      variables: its own, numpy arrays that may still be in the file: `jax.device_put` or `kdjax.parallel.shard` places them.
      tokenizer_file: `tokenizer.json` beside the weights, for `tokenizers.Tokenizer.from_file`; None if there is none. For a
        GGUF file see `gguf_tokenizer`.
      config: what the file says, as it says it.
    """

    module: nn.Module
    variables: Any
    tokenizer_file: pathlib.Path | None
    config: Mapping[str, Any]


def load(path: str | os.PathLike, *, dtype: DTypeLike | None = None) -> Pretrained:
    """Reads a language model or an encoder of text, from a folder of Hugging Face's or a GGUF file.

    | `model_type`, or architecture in GGUF        | module           |
    |----------------------------------------------|------------------|
    | llama, mistral, qwen2; in GGUF llama, qwen2  | `models.Decoder` |
    | bert, distilbert                             | `models.Encoder` |

    Whatever a file says that the module does not do is an error: scaled rotary positions, other activations, biases elsewhere.
    Of BERT and DistilBERT the classifier of texts is read where there is one; heads that predict tokens are left out.

    Args:
      path: a folder with `config.json` and `model.safetensors`, or the index of several; or a file `*.gguf`.
      dtype: of the parameters; None for those of the file, where quantized ones are float32. What is trained further is best in
        float32. Arithmetic is in the dtype of the module: `module.clone(dtype=jnp.bfloat16)`.

    Raises:
      ValueError: files are missing, damaged, or say what the module cannot do; or weights do not fit what is said of them.
      ImportError: gguf is needed and not installed.

    >>> import tempfile
    >>> from kdjax.models import Decoder
    >>> from kdjax.pretrained import write_hugging_face
    >>> decoder = Decoder(vocabulary=32, depth=1, width=16, heads=2, hidden=24)
    >>> variables = decoder.init(jax.random.key(0), jnp.ones((1, 1), jnp.int32))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_hugging_face(folder, decoder, variables)
    ...     loaded = load(folder)
    ...     loaded.module == decoder.clone(key_value_heads=2, head_width=8), loaded.variables['params']['hidden']['scale'].shape
    (True, (16,))
    """
    path = pathlib.Path(path)
    if path.suffix == '.gguf' and path.is_file():
        return _load_gguf(path, dtype)
    if not path.is_dir():
        raise ValueError(f'{path} must be a folder with config.json and model.safetensors, or a file *.gguf')
    file = path / 'config.json'
    try:
        config = json.loads(file.read_text())
        kind = config['model_type']
    except FileNotFoundError as error:
        raise ValueError(f'{path} has no config.json, which says what its weights are of') from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{file} is damaged or says no model_type') from error
    if config.get('quantization_config'):
        raise ValueError(f'{file}: weights are quantized, which is read of GGUF alone')
    if kind in _llama.MODEL_TYPES:
        module = _llama.decoder_of_config(config, str(file))
        arrays = read_state_dict(path)
        _llama.check_tied(module, arrays, str(path))
        rules = _llama.rules_of_llama(module)
    elif kind in _bert.MODEL_TYPES:
        arrays = read_state_dict(path)
        module = _bert.encoder_of_config(config, arrays, str(file))
        rules = _bert.rules_of_bert(module, kind, arrays)
    else:
        known = ', '.join((*_llama.MODEL_TYPES, *_bert.MODEL_TYPES))
        raise ValueError(f'{file}: model_type is {kind!r}; known are {known}')
    tokenizer = path / 'tokenizer.json'
    variables = _filled(path, module, arrays, rules, dtype)
    return Pretrained(module, variables, tokenizer if tokenizer.exists() else None, config)


def _load_gguf(path: pathlib.Path, dtype: DTypeLike | None) -> Pretrained:
    said, arrays = read_gguf(path)
    kind = said.get('general.architecture')
    if kind not in _llama.ARCHITECTURES:
        raise ValueError(f'{path}: general.architecture is {kind!r}; known are {", ".join(_llama.ARCHITECTURES)}')
    module = _llama.decoder_of_gguf(said, arrays, str(path))
    config = {name: value for name, value in said.items() if not name.startswith(('GGUF.', 'tokenizer.'))}
    return Pretrained(module, _filled(path, module, arrays, _llama.rules_of_gguf(module, kind), dtype), None, config)


def _filled(path: pathlib.Path, module: nn.Module, arrays: Any, rules: list[Rule], dtype: DTypeLike | None) -> Any:
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    try:
        shapes = jax.eval_shape(module.init, jax.random.key(0), tokens)
        return from_state_dict(arrays, rules, shapes, dtype=dtype)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error
