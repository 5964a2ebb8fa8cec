"""Losses lifted to objectives: labels, masks, features, connectors, and the same loss on one device as on eight."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.lifted_checks import BATCH, KEY, LABELS, MASK, init, jitted, outputs, sharded, value_and_gradients
from helpers.objective_checks import init_error

from kdjax import losses, objectives, parallel
from kdjax.networks import Outputs


class Case(NamedTuple):
    """An objective, its loss, what it reads, and which examples count."""

    objective: objectives.Objective
    loss: object
    reads: str
    needs_labels: bool = False


def cross_entropy(student, teacher, labels):
    """-log p(y), written out."""
    del teacher
    return jax.nn.logsumexp(student, axis=-1) - student[jnp.arange(len(labels)), labels]


CASES = {
    'hard_labels': Case(objectives.hard_labels(), cross_entropy, 'logits', True),
    'soft_targets': Case(
        objectives.soft_targets(temperature=3.0), functools.partial(losses.soft_targets, temperature=3.0), 'logits'
    ),
    'logit_mse': Case(objectives.logit_mse(), losses.logit_mse, 'logits'),
    'decoupled_kd': Case(
        objectives.decoupled_kd(alpha=0.5, beta=2.0, temperature=3.0),
        functools.partial(losses.decoupled_kd, alpha=0.5, beta=2.0, temperature=3.0),
        'logits',
        True,
    ),
    'hint': Case(objectives.hint('s', 't'), losses.hint, 'features'),
    'attention_transfer': Case(
        objectives.attention_transfer('s', 't', power=3, variant='norm'),
        functools.partial(losses.attention_transfer, power=3, variant='norm'),
        'features',
    ),
    'similarity_preserving': Case(objectives.similarity_preserving('s', 't'), losses.similarity_preserving, 'features'),
}
every_objective = pytest.mark.parametrize('name', list(CASES))
on_logits = pytest.mark.parametrize('name', [name for name, case in CASES.items() if case.reads == 'logits'])
on_features = pytest.mark.parametrize('name', [name for name, case in CASES.items() if case.reads == 'features'])


@functools.cache
def computed(name):
    """The parameters and results of a case on a batch with labels, some of them missing."""
    student, teacher = outputs()
    batch = {'labels': LABELS, 'mask': np.ones(BATCH, bool)}
    params, state = init(CASES[name].objective, student, teacher, batch)
    return params, value_and_gradients(CASES[name].objective, params, state, student, teacher, batch)


@every_objective
def test_loss_is_the_mean_of_the_pure_loss_over_examples_that_count(name):
    case, (student, teacher) = CASES[name], outputs()
    params, (value, metrics, _) = computed(name)
    keep = LABELS >= 0 if case.needs_labels else np.ones(BATCH, bool)
    if case.reads == 'logits':
        arguments = student.logits[keep], teacher.logits[keep], *([LABELS[keep]] if case.needs_labels else [])
    elif name == 'hint':
        connector = params['hint']['Conv_0']
        arguments = student.features['s'] @ connector['kernel'][0, 0] + connector['bias'], teacher.features['t']
    else:
        arguments = student.features['s'], teacher.features['t']
    values = np.asarray(jax.jit(case.loss)(*arguments))
    np.testing.assert_allclose(value, values.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics[name].total, values.sum(), rtol=1e-5)
    np.testing.assert_array_equal(metrics[name].count, 1 if values.ndim == 0 else keep.sum())


@every_objective
def test_gradients_reach_student_and_connector_and_never_the_teacher(name):
    params, (_, _, gradients) = computed(name)
    _, teacher = outputs()
    params_gradient, student_gradient, teacher_gradient = gradients
    for leaf in jax.tree.leaves(params_gradient):
        assert np.any(np.abs(leaf) > 1e-4)
    assert bool(jax.tree.leaves(params)) == (name == 'hint')
    used = student_gradient.logits if CASES[name].reads == 'logits' else student_gradient.features['s']
    assert np.any(np.abs(used) > 1e-4)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(student_gradient))
    for leaf, primal in zip(jax.tree.leaves(teacher_gradient), jax.tree.leaves(teacher), strict=True):
        np.testing.assert_array_equal(leaf, np.zeros(primal.shape))


@every_objective
def test_a_mask_equals_slicing_the_batch(name):
    """Loss, metrics and gradients; what is masked out gets none."""
    objective, (student, teacher) = CASES[name].objective, outputs()
    params, state = init(objective, student, teacher, {'labels': LABELS})
    masked = value_and_gradients(objective, params, state, student, teacher, {'labels': LABELS, 'mask': MASK})
    kept = jax.tree.map(lambda x: x[MASK], (student, teacher, {'labels': LABELS}))
    sliced = value_and_gradients(objective, params, state, *kept)
    np.testing.assert_allclose(masked[0], sliced[0], rtol=1e-5)
    for x, y in zip(jax.tree.leaves(masked[1]), jax.tree.leaves(sliced[1]), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5)
    for x, y in zip(jax.tree.leaves(masked[2][0]), jax.tree.leaves(sliced[2][0]), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    for x, y in zip(jax.tree.leaves(masked[2][1]), jax.tree.leaves(sliced[2][1]), strict=True):
        np.testing.assert_allclose(x[MASK], y, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(x[~MASK], np.zeros(x[~MASK].shape))


@every_objective
def test_a_batch_that_is_masked_out_gives_zero_and_zero_gradients(name):
    objective, (student, teacher) = CASES[name].objective, outputs()
    batch = {'labels': LABELS, 'mask': np.zeros(BATCH, bool)}
    params, state = init(objective, student, teacher, batch)
    value, _, gradients = value_and_gradients(objective, params, state, student, teacher, batch)
    np.testing.assert_array_equal(value, 0.0)
    for leaf in jax.tree.leaves(gradients):
        np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))


@pytest.mark.parametrize('name', [name for name, case in CASES.items() if case.needs_labels])
def test_a_batch_without_a_labelled_example_gives_zero_and_zero_gradients(name):
    objective, (student, teacher) = CASES[name].objective, outputs()
    batch = {'labels': np.full(BATCH, -1, np.int32), 'mask': MASK}
    params, state = init(objective, student, teacher, batch)
    value, metrics, gradients = value_and_gradients(objective, params, state, student, teacher, batch)
    np.testing.assert_array_equal(value, 0.0)
    np.testing.assert_array_equal(metrics[name].count, 0.0)
    for leaf in jax.tree.leaves(gradients):
        np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))


@every_objective
def test_eight_devices_give_what_one_gives(name):
    """Loss, gradients and metrics see the global batch, in which every device holds another share of mask and labels."""
    objective, (student, teacher) = CASES[name].objective, outputs()
    batch = {'labels': LABELS, 'mask': MASK}
    params, state = init(objective, student, teacher, batch)
    one = value_and_gradients(objective, params, state, student, teacher, batch)
    shares = sharded(student, teacher, batch)
    eight = jitted(objective, *parallel.replicate(parallel.data_parallel(), (params, state)), *shares, 0)
    assert len(jax.devices()) == len(eight[0].sharding.device_set) == 8
    assert {len(leaf.addressable_shards[0].data) for leaf in jax.tree.leaves(shares)} == {1}
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@every_objective
def test_half_precision_networks_get_a_float32_loss(name):
    objective = CASES[name].objective
    student, teacher = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), outputs())
    params, state = jax.eval_shape(lambda: objective.init(KEY, student, teacher, {'labels': LABELS}))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    loss, metrics, _ = jax.eval_shape(
        functools.partial(objective.apply, step=0), params, state, student, teacher, {'labels': LABELS}
    )
    assert {leaf.dtype for leaf in jax.tree.leaves((loss, metrics))} == {jnp.dtype('float32')}


@every_objective
def test_objectives_read_no_more_than_they_need(name):
    """Unlabelled data for those without labels, networks without logits for those on features, and the reverse."""
    case, (student, teacher) = CASES[name], outputs()
    if case.reads == 'logits':
        student, teacher = Outputs(student.logits), Outputs(teacher.logits)
    else:
        student, teacher = Outputs(None, student.features), Outputs(None, teacher.features)
    if name == 'hard_labels':
        teacher = Outputs(None)
    batch = {'labels': LABELS} if case.needs_labels else {}
    params, state = init(case.objective, student, teacher, batch)
    assert set(params) == set(state) == {name}


@pytest.mark.parametrize('name', [name for name, case in CASES.items() if case.needs_labels])
def test_missing_labels_are_an_error_that_says_what_the_batch_has(name):
    message = init_error(CASES[name].objective, *outputs(), {'inputs': np.zeros(BATCH, np.float32), 'mask': MASK})
    assert message == f"{name} needs batch['labels']; the batch has inputs, mask"


@on_logits
def test_missing_logits_are_an_error_that_says_whose(name):
    student, teacher = outputs()
    assert init_error(CASES[name].objective, Outputs(None), teacher, {'labels': LABELS}) == (
        f'{name} needs the logits of a student, and there are none'
    )
    if name != 'hard_labels':
        assert init_error(CASES[name].objective, student, Outputs(None), {'labels': LABELS}) == (
            f'{name} needs the logits of a teacher, and there are none'
        )


@on_features
def test_missing_features_are_an_error_that_lists_those_there_are(name):
    student, teacher = outputs()
    make = getattr(objectives, name)
    message = init_error(make('stage9', 't'), student, teacher, {})
    assert message.startswith(f"{name}: the student gives no feature 'stage9' (it gives: s)")
    message = init_error(make('s', 'stage9'), student, teacher, {})
    assert message.startswith(f"{name}: the teacher gives no feature 'stage9' (it gives: t)")
    message = init_error(make('s', 't'), Outputs(student.logits), teacher, {})
    assert '(it gives: none)' in message


@pytest.mark.parametrize('name', ['soft_targets', 'logit_mse', 'decoupled_kd'])
def test_networks_with_other_classes_are_refused_by_init(name):
    """Before anything is trained."""
    student, teacher = outputs()
    message = init_error(CASES[name].objective, student, Outputs(teacher.logits[:, :4]), {'labels': LABELS})
    assert message.startswith(f'{name}: ')
    assert '(8, 5)' in message
    assert '(8, 4)' in message


@pytest.mark.parametrize('name', [name for name, case in CASES.items() if case.needs_labels])
def test_labels_of_another_batch_are_refused_by_init(name):
    message = init_error(CASES[name].objective, *outputs(), {'labels': LABELS[:3]})
    assert message.startswith(f'{name}: labels (3,)')


@on_features
def test_features_of_another_batch_are_refused_by_init(name):
    student, teacher = outputs()
    message = init_error(CASES[name].objective, student, Outputs(None, {'t': teacher.features['t'][:3]}), {})
    assert '8' in message
    assert '3' in message


@pytest.mark.parametrize(
    'make, loss, scheduled',
    [
        (objectives.soft_targets, losses.soft_targets, {'temperature': optax.linear_schedule(8.0, 2.0, 3)}),
        (
            objectives.decoupled_kd,
            losses.decoupled_kd,
            {
                'alpha': optax.linear_schedule(0.0, 2.0, 3),
                'beta': optax.linear_schedule(0.0, 8.0, 3),
                'temperature': optax.linear_schedule(8.0, 2.0, 3),
            },
        ),
    ],
)
def test_hyperparameters_may_be_schedules_inside_one_compilation(make, loss, scheduled):
    student, teacher = outputs()
    labels = np.where(LABELS < 0, 0, LABELS)
    objective, traces = make(**scheduled), []
    name = loss.__name__
    params, state = init(objective, student, teacher, {'labels': labels})

    @jax.jit
    def run(step):
        traces.append(step)
        return objective.apply(params, state, student, teacher, {'labels': labels}, step=step)[:2]

    arguments = student.logits, teacher.logits, *([labels] if 'alpha' in scheduled else [])
    plain = jax.jit(lambda now: jnp.mean(loss(*arguments, **now)))
    for step in range(4):
        value, metrics = run(jnp.int32(step))
        now = {key: schedule(step) for key, schedule in scheduled.items()}
        np.testing.assert_allclose(value, plain(now), rtol=1e-5)
        for key, expected in now.items():
            np.testing.assert_allclose(metrics[f'{name}/{key}'].total, expected, rtol=1e-6)
            assert metrics[f'{name}/{key}'].count == 1
    assert len(traces) == 1
