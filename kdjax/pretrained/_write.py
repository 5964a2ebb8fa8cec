"""Decoders as folders of Hugging Face's, which transformers and what builds on it read."""

import json
import os
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.files import write_whole
from kdjax.models import Decoder
from kdjax.paths import leaves_with_paths
from kdjax.pretrained import _llama
from kdjax.pretrained._mapping import to_state_dict

_NAMES = {'float64': 'F64', 'float32': 'F32', 'float16': 'F16', 'bfloat16': 'BF16'}


def write_hugging_face(
    folder: str | os.PathLike, module: Decoder, variables: Any, *, tokenizer_file: str | os.PathLike | None = None
) -> None:
    """Writes a decoder as `config.json` and `model.safetensors`, as Llama, Mistral (with a window) or Qwen2 (with biases).

    Arrays keep their dtype, and are written one at a time: nothing but one of them is copied.

    Args:
      folder: where to; it is made. Nothing that is there is replaced.
      module: the decoder. Its cache is not part of the file.
      variables: its variables; all but `params` is left out.
      tokenizer_file: a `tokenizer.json` to copy beside them.

    Raises:
      ValueError: Hugging Face has no network that computes the same, variables are not the module's, or a file is there.

    See `load` for an example.
    """
    if not isinstance(module, Decoder):
        raise ValueError(f'write_hugging_face: writes models.Decoder alone, got {type(module).__name__}')
    config = _llama.config_of_decoder(module)
    rules = _llama.rules_of_llama(module)
    params = {'params': variables['params']} if 'params' in variables else {}
    expected = leaves_with_paths(jax.eval_shape(module.clone(cache=None).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
    found = leaves_with_paths(params)
    differ = sorted(
        {*expected} ^ {*found} | {path for path in {*expected} & {*found} if expected[path].shape != found[path].shape}
    )
    if differ:
        raise ValueError(f'write_hugging_face: variables are not of this module: {", ".join(differ[:10])}')
    dtypes = {np.dtype(leaf.dtype).name for leaf in found.values()}
    if dtypes - set(_NAMES):
        raise ValueError(f'write_hugging_face: parameters must be of {", ".join(_NAMES)}, got {", ".join(sorted(dtypes))}')
    if tokenizer_file is not None and not pathlib.Path(tokenizer_file).is_file():
        raise ValueError(f'write_hugging_face: there is no {tokenizer_file}')
    folder = pathlib.Path(folder)
    names = ['config.json', 'model.safetensors', *(['tokenizer.json'] if tokenizer_file is not None else [])]
    there = [name for name in names if (folder / name).exists()]
    if there:
        raise ValueError(f'write_hugging_face: {folder} has {", ".join(there)} already; name another folder')
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer_file is not None:
        shutil.copyfile(tokenizer_file, folder / 'tokenizer.json')
    _write_safetensors(folder / 'model.safetensors', to_state_dict(params, rules))
    config['torch_dtype'] = dtypes.pop() if len(dtypes) == 1 else 'float32'
    # Last, so that a folder with a configuration is whole.
    write_whole(folder / 'config.json', json.dumps(config, indent=2) + '\n')


def _write_safetensors(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """As safetensors' own function, which wants all arrays contiguous at a time: here one is."""
    header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
    end = 0
    for name, array in arrays.items():
        begin, end = end, end + array.nbytes
        header[name] = {'dtype': _NAMES[array.dtype.name], 'shape': list(array.shape), 'data_offsets': [begin, end]}
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)
    partial = path.with_name(f'{path.name}.partial')
    try:
        with partial.open('wb') as file:
            file.write(len(text).to_bytes(8, 'little') + text)
            for array in arrays.values():
                file.write(np.ascontiguousarray(array).tobytes())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
