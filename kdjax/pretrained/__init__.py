"""Weights that others trained, read into Flax Linen modules: safetensors, GGUF, npz, PyTorch; Llama's family and BERT's.

`load` reads a whole network from a folder of Hugging Face's or a GGUF file, and `write_hugging_face` writes a decoder as one.
For modules of one's own, `read_state_dict` reads a file, and `from_state_dict` fills the module's variables by rules that
must account for every array on both sides.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, numpy as np
    >>> theirs = {'fc.weight': np.ones((2, 3), np.float32), 'fc.bias': np.zeros(2, np.float32)}
    >>> rules = [transposed('fc.weight', 'params/kernel'), Rule('fc.bias', 'params/bias')]
    >>> module = nn.Dense(2)
    >>> shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.ones((1, 3)))
    >>> module.apply(from_state_dict(theirs, rules, shapes), jnp.ones((1, 3))).tolist()
    [[3.0, 3.0]]
"""

from kdjax.pretrained._files import read_state_dict
from kdjax.pretrained._load import Pretrained, load
from kdjax.pretrained._mapping import Rule, StateDict, from_state_dict, to_state_dict, transposed
from kdjax.pretrained._tokenizers import gguf_tokenizer
from kdjax.pretrained._write import write_hugging_face

__all__ = [
    'Pretrained',
    'Rule',
    'StateDict',
    'from_state_dict',
    'gguf_tokenizer',
    'load',
    'read_state_dict',
    'to_state_dict',
    'transposed',
    'write_hugging_face',
]
