"""Batches that networks write: what is replaced and what stays, whose words they are, and runs that resume."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdjax import generation, models, networks, objectives, regimes, training

VOCABULARY, LENGTH, NEW = 7, 6, 4
MODULE = models.Decoder(vocabulary=VOCABULARY, depth=1, width=8, heads=2, hidden=8)
DECODER = networks.from_linen(MODULE)
WRITER = networks.from_linen(MODULE.clone(cache=LENGTH + NEW), mutable=('cache',))
TEXT = np.random.default_rng(0).integers(1, VOCABULARY, (5, LENGTH + 1)).astype(np.int32)
# Completions of four tokens, of two, of one, none, and of all labels.
BEGINS = np.array([3, 5, 6, 7, 1])
BATCH = {
    'inputs': TEXT[:, :-1],
    'labels': TEXT[:, 1:],
    'completion': np.arange(1, LENGTH + 1)[None] >= BEGINS[:, None],
    'mask': np.arange(LENGTH)[None] < np.array([6, 6, 6, 4, 6])[:, None],
    'topic': np.arange(5),
}


@functools.cache
def variables(seed):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(DECODER.init, jax.random.key(0), TEXT)
    return jax.tree.map(lambda x: (rng.normal(size=x.shape) * 0.6).astype(x.dtype), shapes)


def write(**options):
    return jax.jit(generation.completions(WRITER, new_tokens=NEW, **options))(
        jax.random.key(3), BATCH, variables(0), variables(1)
    )


def test_prompts_stay_and_completions_are_what_the_network_says():
    """Greedily, so that each token can be checked against the whole forward pass of the text before it."""
    for by, seed in (('student', 0), ('teacher', 1)):
        written = write(temperature=0, by=by)
        for i, begin in enumerate(BEGINS):
            text = np.concatenate([written['inputs'][i], written['labels'][i, -1:]])
            np.testing.assert_array_equal(written['labels'][i, :-1], written['inputs'][i, 1:])
            np.testing.assert_array_equal(text[:begin], TEXT[i, :begin])
            end = min(begin + NEW, LENGTH + 1) if begin <= LENGTH else LENGTH + 1
            likeliest = np.argmax(DECODER.apply(variables(seed), text[None])[0].logits[0], axis=-1)
            np.testing.assert_array_equal(text[begin:end], likeliest[begin - 1 : end - 1])
            at = np.arange(1, LENGTH + 1)
            expected = (at >= begin) & (at < end) if begin <= LENGTH else BATCH['completion'][i]
            np.testing.assert_array_equal(written['completion'][i], expected)
            np.testing.assert_array_equal(written['mask'][i], at < end if begin <= LENGTH else BATCH['mask'][i])
        np.testing.assert_array_equal(written['topic'], BATCH['topic'])
        assert {name: x.dtype for name, x in written.items()} == {name: jnp.result_type(x) for name, x in BATCH.items()}


def test_a_completion_ends_with_its_last_token():
    written, free = write(eos=2), write()
    for i, begin in enumerate(BEGINS[:3]):
        text, unended = (np.concatenate([x['inputs'][i], x['labels'][i, -1:]]) for x in (written, free))
        found = np.flatnonzero(unended[begin:] == 2)
        end = begin + (found[0] + 1 if found.size else len(unended) - begin)
        np.testing.assert_array_equal(text[:end], unended[:end])
        assert not np.any(written['completion'][i, end - 1 :])
        assert np.sum(written['completion'][i]) == end - begin


def problem(share, **options):
    objective = objectives.over_positions(objectives.jensen_shannon() + objectives.hard_labels(), 'completion')
    made = training.distillation(DECODER, DECODER, objective, optax.sgd(0.1))
    return regimes.on_policy(made, generation.completions(WRITER, new_tokens=NEW, **options), share=share), made


def run(made, steps=3, state=None):
    state = made.init(jax.random.key(5), BATCH) if state is None else state
    losses = []
    for _ in range(steps):
        state, measured = made.step(state, variables(1), BATCH)
        losses.append(float(measured['loss'].compute()))
    return losses, jax.device_get(state._replace(key=jax.random.key_data(state.key)))


def test_a_share_of_none_is_the_problem_itself_and_one_of_all_is_written_text():
    never, plain = problem(0.0)
    assert run(never)[0] == run(plain)[0]
    always, _ = problem(1.0)
    half, _ = problem(0.5)
    of_all, of_half, of_none = run(always, 8)[0], run(half, 8)[0], run(never, 8)[0]
    assert not set(of_all) & set(of_none)
    # As long as no step has generated, a run of one half is the plain one.
    first = next(i for i, (x, y) in enumerate(zip(of_half, of_none, strict=True)) if x != y)
    assert of_half[:first] == of_none[:first]


def test_text_is_the_student_s_of_the_step_and_gradients_do_not_flow_through_it():
    always, plain = problem(1.0, temperature=0)
    state = always.init(jax.random.key(5), BATCH)
    written = generation.completions(WRITER, new_tokens=NEW, temperature=0)(
        jax.random.key(0), BATCH, state.variables, variables(1)
    )
    expected, measured = plain.step(plain.init(jax.random.key(5), BATCH), variables(1), written)
    found, also = always.step(state, variables(1), BATCH)
    np.testing.assert_allclose(also['loss'].compute(), measured['loss'].compute(), rtol=1e-6)
    for x, y in zip(jax.tree.leaves(found.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)


def test_a_run_that_is_interrupted_goes_on_bit_for_bit():
    made, _ = problem(0.5)
    state = made.init(jax.random.key(5), BATCH)
    for _ in range(2):
        state, _ = made.step(state, variables(1), BATCH)
    state = jax.tree.map(jnp.copy, state)  # as read from a checkpoint
    resumed, straight = run(made, 2, state), run(made, 4)
    assert resumed[0] == straight[0][2:]
    for x, y in zip(jax.tree.leaves(resumed[1]), jax.tree.leaves(straight[1]), strict=True):
        np.testing.assert_array_equal(x, y)


def test_fit_trains_on_written_text():
    made, _ = problem(1.0)
    fitted = training.fit(made, BATCH, variables(1), key=jax.random.key(0), batch_size=5, steps=2)
    assert int(fitted.state.step) == 2


@pytest.mark.parametrize('share', [-0.1, 1.5, float('nan')])
def test_shares_out_of_range_are_named(share):
    with pytest.raises(ValueError, match=r'^on_policy: share must be from 0 to 1, got [^\n]+$'):
        problem(share)


def test_batches_that_do_not_fit_are_named():
    generate = generation.completions(WRITER, new_tokens=NEW)
    refused = [
        ({name: x for name, x in BATCH.items() if name != 'completion'}, r"need batch\['completion'\]"),
        ({**BATCH, 'labels': BATCH['labels'][:, 1:]}, 'of one shape'),
        ({**BATCH, 'completion': BATCH['labels']}, 'must be boolean'),
    ]
    for batch, message in refused:
        with pytest.raises(ValueError, match=rf'^completions[^\n]*{message}[^\n]*$'):
            generate(jax.random.key(0), batch, variables(0), variables(1))
    with pytest.raises(ValueError, match=r"^completions: by must be 'student' or 'teacher', got 'both'$"):
        generation.completions(WRITER, new_tokens=NEW, by='both')
    shorter = regimes.on_policy(problem(1.0)[1], lambda key, batch, s, t: {**batch, 'inputs': batch['inputs'][:, 1:]})
    with pytest.raises(ValueError, match=r'on_policy: what generate makes must have the shapes of the batch'):
        shorter.step(shorter.init(jax.random.key(0), BATCH), variables(1), BATCH)
