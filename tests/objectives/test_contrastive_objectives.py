"""The memory of crd: which rows move, what stays fixed, who is a negative, and that all of it is learnt from."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.objective_checks import arrays, compile_quickly, features, init_error, random_params

from kdjax import losses, objectives

EXAMPLES, BATCH, CLASSES = 12, 4, 3
LABELS = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2], np.int32)


@functools.partial(compile_quickly, static_argnames='objective')
def run(objective, params, state, student, teacher, batch, step):
    """Loss and state."""
    loss, _, state = objective.apply(params, state, student, teacher, batch, step=step)
    return loss, state


def classes_as_embeddings(objective, labels):
    """Parameters that hand on features as they are, and banks whose rows are their examples' classes."""
    identity = {'Dense_0': {'kernel': jnp.eye(CLASSES), 'bias': jnp.zeros(CLASSES)}}
    bank = jnp.eye(CLASSES)[np.asarray(labels)]
    state = {
        'student_bank': bank,
        'teacher_bank': bank,
        'normalizers': jnp.zeros(2),
        'classes': losses.class_index(labels)._asdict(),
        'key': jax.random.key(3),
    }
    return {'crd': {'student': identity, 'teacher': identity}}, {'crd': state}


def expected(own, other, negatives, examples, temperature):
    """The loss, both directions, where an example's own row has cosine `own` and all of its negatives' have `other`."""
    scores = np.exp(np.array([own] + [other] * negatives) / temperature)
    p = scores / (examples * scores.mean())
    h = p / (p + negatives / examples + 1e-7)
    return -2 * (np.log(h[0]) + np.log(1 - h[1:]).sum())


def test_negatives_are_never_of_the_class():
    """Every negative's row is orthogonal to the embedding, at every step, where one of the same class would be equal to it."""
    objective = objectives.crd('s', 't', LABELS, negatives=50, width=CLASSES, temperature=0.5)
    params, start = classes_as_embeddings(objective, LABELS)
    for step in range(10):
        index = np.arange(step % 3, step % 3 + BATCH, dtype=np.int32)
        x = np.eye(CLASSES, dtype=np.float32)[LABELS[index]]
        loss, state = run(objective, params, start, features(s=x), features(t=x), {'index': index}, step)
        np.testing.assert_allclose(loss, expected(1.0, 0.0, 50, EXAMPLES, 0.5), rtol=1e-5)
        np.testing.assert_allclose(state['crd']['student_bank'], start['crd']['student_bank'], atol=1e-6)


@pytest.fixture(scope='module')
def three_steps():
    """States before, between and after three batches, the last of which has a mask; and what the batches were."""
    objective = objectives.crd('s', 't', LABELS, negatives=6, width=2, momentum=0.8)
    batches = [np.array([3, 0, 7, 11]), np.array([5, 3, 1, 2]), np.array([8, 0, 4, 6])]
    batches = [{'index': index.astype(np.int32), 'mask': np.ones(BATCH, bool)} for index in batches]
    batches[2]['mask'] = np.array([True, False, True, False])
    sides = [
        (features(s=x['s']), features(t=x['t'])) for x in (arrays({'s': (BATCH, 5), 't': (BATCH, 7)}, i) for i in range(3))
    ]
    params = random_params(objective, *sides[0], batches[0])
    _, state = objective.init(jax.random.key(0), *sides[0], batches[0])
    states = [state]
    for step, (batch, side) in enumerate(zip(batches, sides, strict=True)):
        states.append(run(objective, params, states[-1], *side, batch, step)[1])
    return params['crd'], batches, sides, [state['crd'] for state in states]


def test_a_bank_s_rows_start_within_their_published_bounds(three_steps):
    for name in ('student_bank', 'teacher_bank'):
        bank = three_steps[3][0][name]
        assert bank.shape == (EXAMPLES, 2)
        assert np.abs(bank).max() <= np.sqrt(3 / 2)
    assert not np.array_equal(three_steps[3][0]['student_bank'], three_steps[3][0]['teacher_bank'])


def test_banks_move_the_rows_of_the_batch_that_count_and_no_others(three_steps):
    params, batches, sides, states = three_steps
    for batch, side, before, after in zip(batches, sides, states, states[1:], strict=False):
        rows = batch['index'][batch['mask']]
        others = np.setdiff1d(np.arange(EXAMPLES), rows)
        for name, outputs, path in (('student', side[0], 's'), ('teacher', side[1], 't')):
            old, new = np.asarray(before[f'{name}_bank']), np.asarray(after[f'{name}_bank'])
            np.testing.assert_array_equal(new[others], old[others])
            layer = params[name]['Dense_0']
            embedding = (outputs.features[path] @ layer['kernel'] + layer['bias'])[batch['mask']]
            moved = 0.8 * old[rows] + 0.2 * embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
            np.testing.assert_allclose(new[rows], moved / np.linalg.norm(moved, axis=1, keepdims=True), rtol=1e-5, atol=1e-6)


def test_the_constants_are_those_of_the_first_batch_for_ever(three_steps):
    """Their value is in the oracle of all objectives; here, that they stay."""
    states = three_steps[3]
    np.testing.assert_array_equal(states[0]['normalizers'], [0, 0])
    assert np.all(states[1]['normalizers'] > 0)
    for state in states[2:]:
        np.testing.assert_array_equal(state['normalizers'], states[1]['normalizers'])
        assert jax.random.key_data(state['key']).tolist() == jax.random.key_data(states[0]['key']).tolist()


def test_a_first_batch_that_is_masked_out_leaves_the_constants_to_the_next():
    objective = objectives.crd('s', 't', LABELS, negatives=50, width=CLASSES, temperature=0.5)
    params, start = classes_as_embeddings(objective, LABELS)
    index = np.arange(BATCH, dtype=np.int32)
    x = np.eye(CLASSES, dtype=np.float32)[LABELS[index]]
    measured, state = [], start
    for mask in (np.zeros(BATCH, bool), np.ones(BATCH, bool)):
        loss, state = run(objective, params, state, features(s=x), features(t=x), {'index': index, 'mask': mask}, 0)
        measured.append(float(loss))
    np.testing.assert_allclose(measured, [0.0, expected(1.0, 0.0, 50, EXAMPLES, 0.5)], rtol=1e-5)


@pytest.mark.parametrize('name', ['crd', 'info_nce'])
def test_the_student_comes_to_tell_examples_apart(name):
    """Embeddings of a student that sees the classes and some noise, trained for some steps; crd's loss with banks at rest."""
    rng = np.random.default_rng(0)
    student = np.eye(CLASSES)[LABELS] + 0.3 * rng.normal(size=(EXAMPLES, CLASSES))
    student, teacher = features(s=np.float32(student)), features(t=arrays({'t': (EXAMPLES, 6)})['t'])
    make = {
        'crd': lambda: objectives.crd('s', 't', LABELS, negatives=16, width=4),
        'info_nce': lambda: objectives.info_nce('s', 't', width=4),
    }
    objective, optimizer, batch = make[name](), optax.adam(0.02), {'index': jnp.arange(EXAMPLES)}
    params = random_params(objective, student, teacher, batch)
    _, state = objective.init(jax.random.key(1), student, teacher, batch)

    def step(carry, i):
        params, optimizer_state, state = carry

        def loss(params):
            value, _, new = objective.apply(params, state, student, teacher, batch, step=i)
            return value, new

        (value, state), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        with jax.numpy_dtype_promotion('standard'):
            updates, optimizer_state = optimizer.update(gradient, optimizer_state)
        return (optax.apply_updates(params, updates), optimizer_state, state), value

    _, values = compile_quickly(lambda carry: jax.lax.scan(step, carry, jnp.arange(60)))(
        (params, optimizer.init(params), state)
    )
    assert np.mean(values[-5:]) < 0.7 * np.mean(values[1:6])


def test_a_batch_must_say_which_examples_it_holds():
    message = init_error(
        objectives.crd('s', 't', LABELS), features(s=np.ones((4, 2))), features(t=np.ones((4, 2))), {'inputs': np.ones(4)}
    )
    assert message == "crd needs batch['index']; the batch has inputs"


def test_labels_must_leave_negatives():
    with pytest.raises(ValueError, match=r'^class_index: [^\n]+$'):
        objectives.crd('s', 't', np.zeros(5, np.int32))


@pytest.mark.parametrize('outside', [-1, EXAMPLES])
def test_an_index_outside_the_banks_is_an_error_or_nan_and_moves_no_row(outside):
    objective = objectives.crd('s', 't', LABELS, negatives=2, width=CLASSES, temperature=0.5)
    params, state = classes_as_embeddings(objective, LABELS)
    index = np.array([0, 1, outside, 3], np.int32)
    x = np.eye(CLASSES, dtype=np.float32)[[1, 1, 2, 2]]
    sides = features(s=x), features(t=x)
    told = rf"^crd: batch\['index'\] must be one of the 12 examples with labels, got {outside} \(1 such\)$"
    with pytest.raises(ValueError, match=told):
        objective.apply(params, state, *sides, {'index': index}, step=0)
    with pytest.raises(ValueError, match=told):
        objective.check(*sides, {'index': index})
    loss, moved = run(objective, params, state, *sides, {'index': index}, 0)
    assert np.isnan(loss)
    for name in ('student_bank', 'teacher_bank'):
        changed = np.any(moved['crd'][name] != state['crd'][name], axis=1)
        np.testing.assert_array_equal(np.flatnonzero(changed), [0, 3])
    masked = {'index': index, 'mask': np.array([True, True, False, True])}
    objective.check(*sides, masked)
    assert np.isfinite(run(objective, params, state, *sides, masked, 0)[0])
