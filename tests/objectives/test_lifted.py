"""Losses lifted to objectives: labels, masks, features, connectors, and the same loss on one device as on eight."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kdjax import losses, objectives, training
from kdjax.networks import Outputs

BATCH, CLASSES = 8, 5
LABELS = np.array([0, 4, -1, 2, 1, -1, 3, 3], np.int32)
MASK = np.array([True, True, True, False, True, False, False, True])
KEY = jax.random.key(0)


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


def outputs():
    """What student and teacher give: logits, and images of 3 and of 6 channels."""
    rng = np.random.default_rng(0)

    def side(name, channels):
        logits, image = rng.normal(size=(BATCH, CLASSES)), rng.normal(size=(BATCH, 4, 4, channels))
        return Outputs(logits.astype(np.float32), {name: image.astype(np.float32)})

    return side('s', 3), side('t', 6)


def init(objective, student, teacher, batch):
    """Random parameters and the state, from shapes alone; the parameters' own draw would take a second for every shape."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (student, teacher, batch))
    rng = np.random.default_rng(3)
    params, state = jax.eval_shape(lambda: objective.init(KEY, *shapes))
    return jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape).astype(x.dtype), params), state


def value_and_gradients(*arguments, step=0):
    """Loss, metrics, and the gradients with respect to parameters, student and teacher, as numpy arrays."""
    return jax.device_get(jitted(*arguments, step))


@functools.partial(jax.jit, static_argnames='objective')
def jitted(objective, params, state, student, teacher, batch, step):
    """`value_and_gradients` on the device."""

    def loss(params, student, teacher):
        value, metrics, _ = objective.apply(params, state, student, teacher, batch, step=step)
        return value, metrics

    (value, metrics), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(params, student, teacher)
    return value, metrics, gradients


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


def sharded(*trees):
    """Every device holds one example."""
    return jax.device_put(trees, NamedSharding(training.data_parallel(), PartitionSpec('data')))


@every_objective
def test_eight_devices_give_what_one_gives(name):
    """Loss, gradients and metrics see the global batch, in which every device holds another share of mask and labels."""
    objective, (student, teacher) = CASES[name].objective, outputs()
    batch = {'labels': LABELS, 'mask': MASK}
    params, state = init(objective, student, teacher, batch)
    one = value_and_gradients(objective, params, state, student, teacher, batch)
    shares = sharded(student, teacher, batch)
    eight = jitted(objective, *training.replicate(training.data_parallel(), (params, state)), *shares, 0)
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


def init_error(objective, student, teacher, batch):
    """The one-line message of the ValueError that init raises."""
    with pytest.raises(ValueError, match=r'\S') as error:
        init(objective, student, teacher, batch)
    message = str(error.value).split('\n--------------------\n')[0]
    assert '\n' not in message
    return message


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


def hard_labels_oracle(logits, labels, smoothing=0.0):
    """-Σ_c target log p over labelled rows, in float64, target = (1 - ε)·onehot + ε / C; their mean."""
    logits = logits.astype(np.float64)
    log_p = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    targets = (1 - smoothing) * np.eye(logits.shape[-1])[labels] + smoothing / logits.shape[-1]
    return np.mean(-np.sum(targets * log_p, axis=-1)[labels >= 0])


def hard_labels_value(objective, logits, labels, batch=None, step=0):
    """Loss and gradient."""
    state = {'hard_labels': {}}
    value, metrics, gradients = value_and_gradients(
        objective, state, state, Outputs(logits), Outputs(None), {'labels': labels, **(batch or {})}, step=step
    )
    return value, metrics, gradients[1].logits


def test_hard_labels_is_cross_entropy_over_the_labelled_examples():
    student, _ = outputs()
    value, metrics, gradient = hard_labels_value(objectives.hard_labels(), student.logits, LABELS)
    np.testing.assert_allclose(value, hard_labels_oracle(student.logits, LABELS), rtol=1e-5)
    assert metrics['hard_labels'].count == 6
    p = np.exp(student.logits) / np.sum(np.exp(student.logits), axis=1, keepdims=True)
    expected = (LABELS >= 0)[:, None] * (p - np.eye(CLASSES)[LABELS]) / 6
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)


def test_label_smoothing_spreads_the_target_and_may_be_scheduled():
    student, _ = outputs()
    objective = objectives.hard_labels(label_smoothing=lambda step: 0.1 * step)
    for step in range(3):
        value, metrics, _ = hard_labels_value(objective, student.logits, LABELS, step=step)
        np.testing.assert_allclose(value, hard_labels_oracle(student.logits, LABELS, 0.1 * step), rtol=1e-5)
        np.testing.assert_allclose(metrics['hard_labels/label_smoothing'].total, 0.1 * step, rtol=1e-6)
    value, metrics, _ = hard_labels_value(objectives.hard_labels(label_smoothing=0.3), student.logits, LABELS)
    np.testing.assert_allclose(value, hard_labels_oracle(student.logits, LABELS, 0.3), rtol=1e-5)
    assert 'hard_labels/label_smoothing' not in metrics


def test_hard_labels_of_sequences_count_labelled_tokens():
    """[batch, length, classes], with padding at -1 and one sequence masked out."""
    logits = np.random.default_rng(1).normal(size=(3, 4, CLASSES)).astype(np.float32)
    labels = np.array([[0, 1, 2, -1], [3, -1, -1, -1], [4, 4, 0, 1]], np.int32)
    mask = np.array([True, True, False])
    value, metrics, gradient = hard_labels_value(objectives.hard_labels(), logits, labels, {'mask': mask})
    np.testing.assert_allclose(value, hard_labels_oracle(logits[:2].reshape(8, -1), labels[:2].reshape(8)), rtol=1e-5)
    assert metrics['hard_labels'].count == 4
    counted = (labels >= 0) & mask[:, None]
    np.testing.assert_array_equal(np.any(gradient != 0, axis=-1), counted)


def test_hard_labels_are_finite_for_logits_of_minus_infinity():
    """A class that is not the label is as good as sliced away; the label costs 1e30; rows that do not count may be anything."""
    logits = np.array([[1, -np.inf, 2], [1e4, -1e4, -np.inf], [-np.inf, -np.inf, -np.inf]], np.float32)
    value, _, gradient = hard_labels_value(objectives.hard_labels(), logits, np.array([0, 1, -1], np.int32))
    np.testing.assert_allclose(value, (np.log1p(np.e) + 2e4) / 2, rtol=1e-6)
    softmax = np.exp([-1.0, 0.0]) / np.sum(np.exp([-1.0, 0.0]))
    expected = np.array([[softmax[0] - 1, 0, softmax[1]], [1, -1, 0], [0, 0, 0]]) / 2
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)
    for labels in ([1, 2, -1], [1, 2, 0]):
        for objective in (objectives.hard_labels(), objectives.hard_labels(label_smoothing=0.1)):
            value, _, gradient = hard_labels_value(objective, logits, np.array(labels, np.int32))
            np.testing.assert_array_less(1e29, value)
            assert np.isfinite(value)
            assert np.all(np.isfinite(gradient))


CONNECTORS = {
    'same size': ((BATCH, 4, 4, 3), (BATCH, 4, 4, 6), (1, 1, 3, 6)),
    'student twice as large': ((BATCH, 8, 8, 3), (BATCH, 4, 4, 6), (3, 3, 3, 6)),
    'student larger in width alone': ((BATCH, 4, 6, 3), (BATCH, 4, 2, 6), (1, 4, 3, 6)),
    'student half as large': ((BATCH, 2, 2, 3), (BATCH, 4, 4, 6), (4, 4, 3, 6)),
    'student larger, not a whole number of times': ((BATCH, 7, 5, 3), (BATCH, 4, 4, 6), (4, 2, 3, 6)),
    'dense': ((BATCH, 3), (BATCH, 6), (3, 6)),
    'tokens': ((BATCH, 5, 3), (BATCH, 5, 6), (3, 6)),
}


@pytest.mark.parametrize('name', list(CONNECTORS))
def test_hint_s_connector_has_the_shape_that_the_sizes_ask_for_and_learns(name):
    """Its parameters come from shapes alone, all get gradients, and a few steps of SGD reduce the loss."""
    student_shape, teacher_shape, kernel_shape = CONNECTORS[name]
    rng = np.random.default_rng(2)
    student = Outputs(None, {'s': rng.normal(size=student_shape).astype(np.float32)})
    teacher = Outputs(None, {'t': rng.normal(size=teacher_shape).astype(np.float32) + 1})
    objective = objectives.hint('s', 't')
    params, state = init(objective, student, teacher, {})
    leaves = {leaf.shape for leaf in jax.tree.leaves(params)}
    assert leaves == {kernel_shape, kernel_shape[-1:]}
    values = []
    for _ in range(5):
        value, _, (gradient, student_gradient, _) = value_and_gradients(objective, params, state, student, teacher, {})
        values.append(float(value))
        assert all(np.all(np.any(leaf != 0, axis=-1)) for leaf in jax.tree.leaves(gradient))
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
    assert np.any(student_gradient.features['s'] != 0)
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0] - 0.01


@pytest.mark.parametrize(
    'student_shape, teacher_shape',
    [
        ((BATCH, 3, 3, 3), (BATCH, 4, 4, 6)),  # smaller, and not a whole number of times
        ((BATCH, 8, 2, 3), (BATCH, 4, 4, 6)),  # larger in height and smaller in width
        ((BATCH, 5, 3), (BATCH, 4, 6)),  # tokens of another length
        ((BATCH, 4, 4, 3), (BATCH, 6)),
        ((BATCH, 3), (BATCH, 4, 4, 6)),
    ],
    ids=str,
)
def test_shapes_that_no_connector_joins_are_refused_by_init(student_shape, teacher_shape):
    student = Outputs(None, {'s': np.ones(student_shape, np.float32)})
    teacher = Outputs(None, {'t': np.ones(teacher_shape, np.float32)})
    message = init_error(objectives.hint('s', 't'), student, teacher, {})
    assert str(student_shape) in message
    assert str(teacher_shape) in message


def test_hint_can_normalize_and_rectify_what_its_connector_gives():
    """relu(γ (y - mean) / sqrt(var + 1e-5) + β) of y = x W, with the statistics of the examples that count, in float64."""
    student, teacher = outputs()
    objective = objectives.hint('s', 't', normalize=True)
    params, state = init(objective, student, teacher, {})
    kernel, norm = np.float64(params['hint']['Conv_0']['kernel']), params['hint']['BatchNorm_0']
    for mask in (MASK, np.ones(BATCH, bool)):
        one = jitted(objective, params, state, student, teacher, {'mask': mask}, 0)
        y = student.features['s'][mask].astype(np.float64) @ kernel[0, 0]
        normalized = norm['scale'] * (y - y.mean(axis=(0, 1, 2))) / np.sqrt(y.var(axis=(0, 1, 2)) + 1e-5) + norm['bias']
        np.testing.assert_allclose(one[0], np.mean((np.maximum(normalized, 0) - teacher.features['t'][mask]) ** 2), rtol=1e-5)
        eight = jitted(objective, params, state, *sharded(student, teacher, {'mask': mask}), 0)
        for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    value, _, gradients = value_and_gradients(objective, params, state, student, teacher, {'mask': np.zeros(BATCH, bool)})
    np.testing.assert_array_equal(value, 0.0)
    for leaf in jax.tree.leaves(gradients):
        np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))


def test_two_hints_train_connectors_of_their_own():
    student, teacher = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), outputs())
    objective = objectives.hint('s', 't') + objectives.hint('s', 't')
    params, _ = objective.init(KEY, student, teacher, {})
    kernels = [params[name]['Conv_0']['kernel'] for name in ('hint', 'hint_2')]
    assert not np.array_equal(*kernels)


def test_attention_transfer_and_similarity_preserving_take_any_channels_and_sizes():
    """No connector: nothing to train."""
    student = Outputs(None, {'s': np.ones((BATCH, 7, 7, 3), np.float32)})
    teacher = Outputs(None, {'t': np.ones((BATCH, 3, 3, 6), np.float32)})
    params, _ = init(objectives.attention_transfer('s', 't') + objectives.similarity_preserving('s', 't'), student, teacher, {})
    assert params == {'attention_transfer': {}, 'similarity_preserving': {}}
