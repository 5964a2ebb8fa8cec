"""Objectives over spans: means of the losses of spans, masks of the student's tokens, and training on two token streams."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdjax import data, losses, models, networks, objectives, training
from kdjax.networks import Outputs

RNG = np.random.default_rng(0)
STUDENT, TEACHER = (RNG.normal(size=shape).astype(np.float32) for shape in ((2, 6, 5), (2, 5, 7)))
BATCH = {
    'labels': RNG.integers(0, 5, (2, 6)).astype(np.int32),
    'teacher_labels': RNG.integers(0, 7, (2, 5)).astype(np.int32),
    'student_spans': np.array([[-1, 0, 0, 1, 2, -1], [0, 0, 1, 1, 2, 3]], np.int32),
    'teacher_spans': np.array([[0, 1, -1, 1, 2], [0, 1, 2, 3, -1]], np.int32),
}


@functools.cache
def program(name):
    objective = getattr(objectives, name)(temperature=2.0)

    def run(student, teacher, batch):
        outputs = Outputs(student), Outputs(teacher)
        own = objective.init(jax.random.key(0), *outputs, batch)
        return objective.apply(*own, *outputs, batch, step=0)[0]

    return jax.jit(run)


def of_spans(name):
    """What the loss says of every span, [batch, spans]."""
    entries = [BATCH[key] for key in ('labels', 'teacher_labels', 'student_spans', 'teacher_spans')]
    if name == 'span_universal_logit':
        return np.asarray(losses.span_universal_logit(STUDENT, TEACHER, *entries, temperature=2.0))
    sides = []
    for logits, labels, spans in zip((STUDENT, TEACHER), entries[:2], entries[2:], strict=True):
        log_p = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), labels[..., None], -1)[..., 0]
        sides.append(losses.span_log_probabilities(log_p, spans, 5))
    return np.asarray(losses.approximate_likelihood_matching(*sides, temperature=2.0))


both = pytest.mark.parametrize('name', ['span_universal_logit', 'approximate_likelihood_matching'])


@both
def test_it_is_the_mean_over_spans_that_count(name):
    values, run = of_spans(name), program(name)
    np.testing.assert_allclose(run(STUDENT, TEACHER, BATCH), np.sum(values) / 7, rtol=1e-5)
    # A span counts where all of its tokens do, and no label of it is missing.
    mask = np.ones((2, 6), bool)
    mask[0, 2] = mask[1, 5] = False
    left = [values[0, 1], values[0, 2], values[1, 0], values[1, 1], values[1, 2]]
    np.testing.assert_allclose(run(STUDENT, TEACHER, {**BATCH, 'mask': mask}), np.mean(left), rtol=1e-5)
    over = objectives.over_positions(getattr(objectives, name)(temperature=2.0), 'completion')
    outputs, completion = (Outputs(STUDENT), Outputs(TEACHER)), {**BATCH, 'completion': mask}
    within = over.apply(*over.init(jax.random.key(0), *outputs, completion), *outputs, completion, step=0)[0]
    np.testing.assert_allclose(within, np.mean(left), rtol=1e-5)
    labels = np.where(mask, BATCH['labels'], -1)
    np.testing.assert_allclose(run(STUDENT, TEACHER, {**BATCH, 'labels': labels}), np.mean(left), rtol=1e-5)
    others = np.where(BATCH['teacher_spans'] == 1, -1, BATCH['teacher_labels'])
    left = [values[0, 0], values[0, 2], values[1, 0], values[1, 2], values[1, 3]]
    np.testing.assert_allclose(run(STUDENT, TEACHER, {**BATCH, 'teacher_labels': others}), np.mean(left), rtol=1e-5)
    # By the largest weight of their tokens; examples have weights too.
    weights = np.array([[1, 1, 3, 1, 2, 1], [1, 1, 1, 0, 1, 2]], np.float32)
    spans = np.array([[3, 1, 2, 0, 0], [1, 0, 1, 2, 0]], np.float32)
    weighted = run(STUDENT, TEACHER, {**BATCH, 'weights': weights})
    np.testing.assert_allclose(weighted, np.sum(spans * values) / spans.sum(), rtol=1e-5)
    one = run(STUDENT, TEACHER, {**BATCH, 'mask': np.array([False, True])})
    np.testing.assert_allclose(one, np.sum(values[1]) / 4, rtol=1e-5)


@both
def test_labels_beyond_the_classes_and_missing_entries_are_named(name):
    objective = getattr(objectives, name)()
    outputs = Outputs(STUDENT), Outputs(TEACHER)
    labels = BATCH['teacher_labels'].copy()
    labels[0, 2] = 7  # of no span
    objective.check(*outputs, {**BATCH, 'teacher_labels': labels})
    labels[0, 3] = 9
    with pytest.raises(ValueError, match=rf"^{name}: batch\['teacher_labels'\] must be below 7 in a span, got 9 \(1 such\)"):
        objective.check(*outputs, {**BATCH, 'teacher_labels': labels})
    with pytest.raises(ValueError, match=rf"^{name} needs batch\['teacher_spans'\]"):
        objective.init(jax.random.key(0), *outputs, {k: v for k, v in BATCH.items() if k != 'teacher_spans'})
    with pytest.raises(ValueError, match=rf"^{name}: batch\['student_spans'\] must be integers \[batch, length\]"):
        objective.init(jax.random.key(0), *outputs, {**BATCH, 'student_spans': BATCH['teacher_spans']})


TEXT = 'the teacher reads words and the student reads letters of them '


def tokenized(texts, pattern, vocabulary):
    """Tokens and offsets of every text, with one of no character before."""
    found = [list(re.finditer(pattern, text)) for text in texts]
    tokens = [[0, *(vocabulary.setdefault(m.group(), len(vocabulary) + 1) for m in each)] for each in found]
    length = max(map(len, tokens))
    return np.array([np.pad(x, (0, length - len(x))) for x in tokens], np.int32), [
        [(0, 0), *(m.span() for m in each)] for each in found
    ]


@pytest.mark.long
def test_a_student_of_letters_learns_what_a_teacher_of_words_says_of_them():
    """The teacher's text is likelier to a student that never saw a label, in tokens that the teacher has not."""
    texts = [(TEXT * 2)[i : i + 40].strip() for i in range(0, 60, 2)]
    letters, letter_offsets = tokenized(texts, '.', {})
    words, word_offsets = tokenized(texts, r' ?\w{1,2}| ', {})
    spans = data.align_tokens(letter_offsets, word_offsets)
    batch = {
        'inputs': {'student': letters[:, :-1], 'teacher': words[:, :-1]},
        'labels': letters[:, 1:],
        'teacher_labels': words[:, 1:],
        'student_spans': spans[0][:, 1:],
        'teacher_spans': spans[1][:, 1:],
    }
    assert (batch['teacher_spans'] >= 0).mean() > 0.8

    def network(side, tokens):
        module = models.Decoder(vocabulary=int(tokens.max()) + 1, depth=1, width=16, heads=2, hidden=32)
        return networks.preprocess(networks.from_linen(module), lambda inputs: inputs[side])

    teacher, student = network('teacher', words), network('student', letters)
    own = {'inputs': batch['inputs'], 'labels': np.where(batch['teacher_spans'] >= 0, words[:, 1:], -1)}
    problem = training.distillation(teacher, None, objectives.hard_labels(), optax.adam(2e-2))
    taught = training.fit(problem, own, key=jax.random.key(0), batch_size=30, steps=60)
    objective = objectives.approximate_likelihood_matching(temperature=10.0) + objectives.span_universal_logit()
    problem = training.distillation(student, teacher, objective, optax.adam(2e-2))
    start = student.init(jax.random.key(1), batch['inputs'])
    fitted = training.fit(
        problem, batch, taught.variables, key=jax.random.key(2), batch_size=30, steps=60, student_variables=start
    )

    def nll(variables):
        log_p = jax.nn.log_softmax(student.apply(variables, batch['inputs'])[0].logits)
        chosen = jnp.take_along_axis(log_p, batch['labels'][..., None], axis=-1)[..., 0]
        return -float(jnp.mean(chosen, where=batch['student_spans'] >= 0))

    assert nll(fitted.variables) < 0.5 * nll(start)
