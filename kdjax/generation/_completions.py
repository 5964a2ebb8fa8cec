"""Batches whose completions a network has written itself, for training on its own text."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from kdjax.batches import Batch
from kdjax.generation._sample import sample
from kdjax.generation._sampling import State
from kdjax.networks import Network


def completions(
    decoder: Network,
    *,
    new_tokens: int,
    by: Literal['student', 'teacher'] = 'student',
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos: int | None = None,
) -> Callable[[jax.Array, Batch, State, State], Batch]:
    """A function that replaces the completions of a batch by what a network writes after the same prompts.

    For `regimes.on_policy`: the student writes what it will be corrected on, as in GKD, or the teacher what its student shall
    write, as in sequence-level distillation. A batch has `'inputs'` and `'labels'`, integers [batch, length] of which the
    second are the first one place further, and `'completion'`, booleans [batch, length] that are true where the label is not of
    the prompt. All three are made anew, and `'mask'` if it is of positions: true up to the end of the text. The rest stays, and
    so do rows without a completion. What does not fit the length is cut off.

    Args:
      decoder: the network that writes, with a cache as long as the inputs and the new tokens together; see
        `kdjax.generation`. It may be the student or the teacher of the problem, with a cache, or another form of them.
      new_tokens: how many to write at most.
      by: whose variables the decoder gets.
      temperature: as in `sample`, which GKD and DistiLLM leave at 1.
      top_k: as in `sample`.
      top_p: as in `sample`.
      eos: as in `sample`; it is part of the completion, and what follows it is not.

    Returns:
      `generate(key, batch, student_variables, teacher_variables) -> batch`.

    Raises:
      ValueError: from the function: an entry is missing or has another shape, or as in `sample`.

    >>> import jax, jax.numpy as jnp
    >>> from kdjax import models, networks
    >>> module = models.Decoder(vocabulary=32, depth=1, width=16, heads=2, hidden=24, cache=6)
    >>> decoder, text = networks.from_linen(module, mutable=('cache',)), jnp.array([[5, 7, 2, 9, 4]])
    >>> variables = decoder.init(jax.random.key(0), {'tokens': text})
    >>> batch = {'inputs': text[:, :-1], 'labels': text[:, 1:], 'completion': jnp.array([[False, False, True, True]])}
    >>> written = completions(decoder, new_tokens=2)(jax.random.key(1), batch, variables, variables)
    >>> written['inputs'][0, :3].tolist(), written['completion'].tolist()
    ([5, 7, 2], [[False, False, True, True]])

    References:
      Agarwal, Vieillard, Zhou, Stanczyk, Ramos, Geist, Bachem. On-Policy Distillation of Language Models: Learning from
      Self-Generated Mistakes. 2024. https://arxiv.org/abs/2306.13649
      Kim, Rush. Sequence-Level Knowledge Distillation. 2016. https://arxiv.org/abs/1606.07947
    """
    if by not in ('student', 'teacher'):
        raise ValueError(f"completions: by must be 'student' or 'teacher', got {by!r}")

    def generate(key: jax.Array, batch: Batch, student_variables: State, teacher_variables: State) -> Batch:
        tokens, labels, completion = _entries(batch)
        length = tokens.shape[1]
        has_any = jnp.any(completion, axis=1)
        prompt = jnp.where(has_any, jnp.argmax(completion, axis=1) + 1, length).astype(jnp.int32)
        written = sample(
            decoder,
            student_variables if by == 'student' else teacher_variables,
            tokens,
            key,
            new_tokens=new_tokens,
            lengths=prompt,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            eos=eos,
        )
        # Of the whole text, one token longer than the inputs.
        text = jnp.concatenate([tokens, labels[:, -1:]], axis=1)
        since = jnp.arange(length + 1, dtype=jnp.int32)[None] - prompt[:, None]
        new = jnp.take_along_axis(written.tokens, jnp.clip(since, 0, new_tokens - 1), axis=1)
        ended = has_any[:, None] & (since >= jnp.minimum(written.lengths, new_tokens)[:, None])
        # What follows the end is padding: a token that there is, and that nothing counts.
        text = jnp.where(has_any[:, None] & (since >= 0), jnp.where(ended, 0, new), text)
        made = {'inputs': text[:, :-1], 'labels': text[:, 1:], 'completion': ((since >= 0) & ~ended & has_any[:, None])[:, 1:]}
        if 'mask' in batch and jnp.ndim(batch['mask']) == 2:
            made['mask'] = jnp.where(has_any[:, None], ~ended[:, 1:], batch['mask'])
        return {**batch, **{name: value.astype(jnp.result_type(batch[name])) for name, value in made.items()}}

    return generate


def _entries(batch: Batch) -> tuple[Any, Any, Any]:
    for name in ('inputs', 'labels', 'completion'):
        if name not in batch:
            raise ValueError(f"completions need batch['{name}']; the batch has {', '.join(sorted(batch))}")
    tokens, labels, completion = (batch[name] for name in ('inputs', 'labels', 'completion'))
    if isinstance(tokens, (dict, tuple)) or jnp.ndim(tokens) != 2 or not (tokens.shape == labels.shape == completion.shape):
        shapes = ', '.join(str(jax.tree.map(jnp.shape, x)) for x in (tokens, labels, completion))
        raise ValueError(
            f'completions: inputs, labels and completion must be arrays [batch, length] of one shape, got {shapes}'
        )
    if completion.dtype != jnp.bool_:
        raise ValueError(f"completions: batch['completion'] must be boolean, got {completion.dtype}")
    return tokens, labels, completion
