"""Speculative sampling: a student drafts, its teacher checks, and the text is the teacher's."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax.generation._sampling import (
    State,
    check_count,
    check_prompts,
    check_sampling,
    draw,
    filtered,
    keys_of_rows,
    read,
)
from kdjax.metrics import Average
from kdjax.networks import Network, dense_logits


class Speculated(NamedTuple):
    """What was written after each prompt, and how often the draft was right.

    Attributes:
      tokens: int32 [batch, new_tokens]; after the end of a text, the token that ends it.
      lengths: int32 [batch], how many of the tokens there are, with the one that ends the text.
      acceptance: how many of the drafted tokens that were looked at were accepted: of one that is, Σ min(p, q) on average. A
        student that is distilled well has much of it.
      rounds: int32, how often the teacher was called after it had read the prompts.
    """

    tokens: jax.Array
    lengths: jax.Array
    acceptance: Average
    rounds: jax.Array


def speculative_sample(
    student: Network,
    student_variables: State,
    teacher: Network,
    teacher_variables: State,
    prompts: ArrayLike,
    key: jax.Array,
    *,
    new_tokens: int,
    drafted: int = 4,
    lengths: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    top_k: int | None = None,
    top_p: ArrayLike | None = None,
    eos: ArrayLike | None = None,
) -> Speculated:
    """Writes as the teacher would, in fewer calls of it: the student drafts tokens, and one call of the teacher checks them.

    A drafted token y is accepted with probability min(1, p_t(y) / p_s(y)). The first that is not is drawn anew from
    max(0, p_t - p_s), normalised; if all are accepted, one more is drawn from p_t. The text has the teacher's distribution
    exactly, at the same temperature and cuts, whatever the student.

    Args:
      student: the decoder that drafts; see `kdjax.generation`.
      student_variables: its variables.
      teacher: the decoder that decides, over the same tokens.
      teacher_variables: its variables.
      prompts: integers [batch, length], padded at their right with any number.
      key: a random key, from which each row gets one by its number; or a key for each row.
      new_tokens: how many to write.
      drafted: how many tokens the student drafts at a time. Both caches need room for so many more than are written.
      lengths: of the prompts without their padding, integers [batch]; None where none is padded.
      temperature: as in `sample`, of both.
      top_k: as in `sample`, of both.
      top_p: as in `sample`, of both.
      eos: as in `sample`. A text that has ended needs no more rounds, and no more of its draft is looked at.

    Raises:
      ValueError: prompts, lengths, keys or an option do not fit, the vocabularies differ, or a cache is missing or too short.

    >>> import jax, jax.numpy as jnp
    >>> from kdjax import models, networks
    >>> module = models.Decoder(vocabulary=32, depth=1, width=16, heads=2, hidden=24, cache=16)
    >>> decoder, prompts = networks.from_linen(module, mutable=('cache',)), jnp.array([[5, 7, 2]])
    >>> variables = decoder.init(jax.random.key(0), {'tokens': prompts})
    >>> both = decoder, variables, decoder, variables
    >>> written = speculative_sample(*both, prompts, jax.random.key(1), new_tokens=6, drafted=2)
    >>> written.tokens.shape, float(written.acceptance.compute()), int(written.rounds)
    ((1, 6), 1.0, 2)

    Reference:
      Leviathan, Kalman, Matias. Fast Inference from Transformers via Speculative Decoding. 2023.
      https://arxiv.org/abs/2211.17192
    """
    name = 'speculative_sample'
    check_sampling(name, new_tokens, temperature, top_k, top_p)
    check_count(name, drafted=drafted)
    checked = check_prompts(name, prompts, lengths)
    batch, networks = len(checked.tokens), (student, teacher)
    keys, rows = keys_of_rows(name, key, batch), jnp.arange(batch)
    weights = [{k: v for k, v in each.items() if k != 'cache'} for each in (student_variables, teacher_variables)]
    read_in = [
        read(name, network, variables, checked, new_tokens + drafted, eos)
        for network, variables in zip(networks, weights, strict=True)
    ]
    if read_in[0][0].shape != read_in[1][0].shape:
        shapes = ' and '.join(str(logits.shape[-1]) for logits, _ in read_in)
        raise ValueError(f'{name}: student and teacher must have the same tokens, got {shapes}')
    end = None if eos is None else jnp.asarray(eos, jnp.int32)

    def call(i: int, state: State, tokens: jax.Array, positions: jax.Array) -> tuple[jax.Array, State]:
        outputs, state = networks[i].apply({**weights[i], **state}, {'tokens': tokens, 'positions': positions})
        return filtered(dense_logits(outputs.logits), temperature, top_k, top_p), state

    def drafts(carry: tuple, i: jax.Array) -> tuple[tuple, tuple[jax.Array, jax.Array]]:
        token, position, state, at_round = carry
        log_q, state = call(0, state, token[:, None], position[:, None])
        drawn = draw(jax.vmap(lambda key: jax.random.fold_in(key, i))(at_round), log_q[:, 0])
        return (drawn, position + 1, state, at_round), (drawn, log_q[:, 0])

    def round_of(carry: dict[str, Any]) -> dict[str, Any]:
        last, written = carry['last'], carry['written']
        at_round = jax.vmap(lambda key: jax.random.fold_in(key, carry['rounds']))(keys)
        # The last token of the text is at this position, and neither network has seen it yet.
        position = checked.lengths + written - 1
        begin = last, position, carry['student'], at_round
        (final, ahead, state, _), (tokens, log_q) = jax.lax.scan(drafts, begin, jnp.arange(drafted))
        # Its cache wants the last draft too, for a round in which all are accepted.
        _, student_state = call(0, state, final[:, None], ahead[:, None])
        tokens, log_q = tokens.T, jnp.swapaxes(log_q, 0, 1)
        along = jnp.arange(drafted + 1, dtype=jnp.int32)[None]
        seen = jnp.concatenate([last[:, None], tokens], axis=1)
        log_p, teacher_state = call(1, carry['teacher'], seen, position[:, None] + along)
        chosen = [jnp.take_along_axis(x[:, :drafted], tokens[..., None], axis=-1)[..., 0] for x in (log_p, log_q)]
        uniform = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, drafted), (drafted,)))(at_round)
        accepted = jnp.cumprod(jnp.log(uniform) < chosen[0] - chosen[1], axis=1, dtype=jnp.int32)
        count = jnp.sum(accepted, axis=1)
        p = jnp.take_along_axis(jnp.exp(log_p), count[:, None, None], axis=1)[:, 0]
        q = jnp.take_along_axis(jnp.exp(log_q), jnp.minimum(count, drafted - 1)[:, None, None], axis=1)[:, 0]
        rest = jnp.where((count < drafted)[:, None], jnp.maximum(p - q, 0.0), p)
        # Rounding may leave nothing where both are alike; then a rejection has no probability either.
        rest = jnp.where(jnp.sum(rest, axis=-1, keepdims=True) > 0, rest, p)
        corrected = draw(jax.vmap(lambda key: jax.random.fold_in(key, drafted + 1))(at_round), jnp.log(rest))
        new = jnp.concatenate([jnp.where(accepted > 0, tokens, 0), jnp.zeros((batch, 1), jnp.int32)], axis=1)
        new = new.at[rows, count].set(corrected)
        ends = jnp.zeros(new.shape, jnp.bool_) if end is None else (new == end) & (along <= count[:, None])
        ended = jnp.any(ends, axis=1)
        taken = jnp.where(ended, jnp.argmax(ends, axis=1).astype(jnp.int32), count) + 1
        active = ~carry['ended'] & (written < new_tokens)
        index = jnp.where((along < taken[:, None]) & active[:, None], written[:, None] + along, new_tokens)
        # A draft is looked at until one is refused, or ends the text.
        both = jnp.minimum(count, taken), jnp.minimum(taken, drafted)
        total, looked = (jnp.sum(jnp.where(active, x, 0), dtype=jnp.float32) for x in both)
        return {
            'tokens': carry['tokens'].at[rows[:, None], index].set(new, mode='drop'),
            'last': jnp.where(active, corrected, last),
            'written': jnp.where(active, written + taken, written),
            'ended': carry['ended'] | (active & ended),
            'student': student_state,
            'teacher': teacher_state,
            'acceptance': Average(carry['acceptance'].total + total, carry['acceptance'].count + looked),
            'rounds': carry['rounds'] + 1,
        }

    # The first token is drawn from what the teacher says after the prompt, so that a round begins with a token that is new.
    first = draw(
        jax.vmap(lambda key: jax.random.fold_in(key, 2**31 - 1))(keys),
        filtered(read_in[1][0], temperature, top_k, top_p),
    )
    start = {
        'tokens': jnp.broadcast_to(jnp.int32(0) if end is None else end, (batch, new_tokens)).at[:, 0].set(first),
        'last': first,
        'written': jnp.ones(batch, jnp.int32),
        'ended': jnp.zeros(batch, jnp.bool_) if end is None else first == end,
        'student': read_in[0][1],
        'teacher': read_in[1][1],
        'acceptance': Average(jnp.float32(0), jnp.float32(0)),
        'rounds': jnp.int32(0),
    }
    found = jax.lax.while_loop(lambda carry: jnp.any(~carry['ended'] & (carry['written'] < new_tokens)), round_of, start)
    lengths_written = jnp.minimum(found['written'], new_tokens)
    return Speculated(found['tokens'], lengths_written, found['acceptance'], found['rounds'])
