"""Evaluation against numpy in float64: of any positions, masked, weighted, unlabelled and padded."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import label_ranking_average_precision_score

from kdjax import metrics, networks, parallel, training
from kdjax.networks import Network, Outputs

CLASSES, BINS, IGNORE = 4, 10, 200
RNG = np.random.default_rng(0)
# 13 examples are no multiple of any batch size here, so the last batch is filled up.
LAYOUTS = {'examples': (13,), 'tokens': (13, 5), 'pixels': (13, 3, 2)}


def lookup():
    """A network whose logits, and those of its teacher, are its inputs, so that tests choose them."""

    def apply(variables, inputs, *, train=False, rng=None):
        return Outputs(inputs['student'] * variables['params'], {'other': inputs['other']}), {}

    return Network(lambda key, inputs: {'params': jnp.float32(1)}, apply)


def teacher():
    return Network(lookup().init, lambda variables, inputs, *, train=False, rng=None: (Outputs(inputs['teacher']), {}))


def of_others(metric, name):
    """The metric of the feature and of other labels, so that one program measures all kinds."""
    return lambda outputs, batch: metric(Outputs(outputs.features['other']), {**batch, 'labels': batch[name]})


OF_CLASSES = {
    'accuracy': metrics.accuracy(ignore=IGNORE),
    'top_1': metrics.top_k_accuracy(1, ignore=IGNORE),
    'top_2': metrics.top_k_accuracy(2, ignore=IGNORE),
    'nll': metrics.nll(ignore=IGNORE),
    'perplexity': metrics.perplexity(ignore=IGNORE),
    'bits_per_byte': metrics.bits_per_byte('sizes', ignore=IGNORE),
    'calibration_error': metrics.calibration_error(bins=BINS, ignore=IGNORE),
    'confusion_matrix': metrics.confusion_matrix(ignore=IGNORE),
    'intersection_over_union': metrics.intersection_over_union(ignore=IGNORE),
    'agreement': metrics.agreement(),
}
OF_OTHERS = {
    'binary_accuracy': of_others(metrics.binary_accuracy(threshold=0.3), 'several'),
    'ranking': of_others(metrics.label_ranking_average_precision(), 'several'),
    'squared_error': of_others(metrics.squared_error(), 'numbers'),
    'absolute_error': of_others(metrics.absolute_error(), 'numbers'),
}
ALL = OF_CLASSES | OF_OTHERS
VARIABLES = {'params': jnp.float32(1)}


def examples(shape):
    """Data with positions of a shape, of which labels, mask and weights leave some out; what these leave out is NaN."""
    numbers = functools.partial(RNG.standard_normal, dtype=np.float32)
    mask, weights = RNG.random(shape) < 0.7, (RNG.integers(0, 3, shape) / 2).astype(np.float32)
    mask.flat[0] = weights.flat[0] = 1
    counts = mask & (weights > 0)
    inputs = {name: 3 * numbers((*shape, CLASSES)) for name in ('student', 'teacher', 'other')}
    for array in inputs.values():
        array[~counts] = np.nan
    labels = RNG.integers(0, CLASSES, shape)
    labels[RNG.random(shape) < 0.2] = -1
    labels[RNG.random(shape) < 0.1] = IGNORE
    labels[~counts] = 77
    several = RNG.integers(0, 2, (*shape, CLASSES))
    several[RNG.random(several.shape) < 0.1] = -1
    return {
        'inputs': inputs,
        'labels': labels,
        'several': several,
        'numbers': numbers((*shape, CLASSES)),
        'mask': mask,
        'weights': weights,
        'sizes': RNG.integers(1, 6, shape),
    }


def sliced(array, counts):
    return np.asarray(array)[counts].astype(np.float64)


def oracle(data):
    """Every metric of what counts, sliced out, in float64."""
    counts = data['mask'] & (data['weights'] > 0)
    labelled = counts & (data['labels'] >= 0) & (data['labels'] != IGNORE)
    z, w = sliced(data['inputs']['student'], labelled), sliced(data['weights'], labelled)
    y = data['labels'][labelled]
    average = functools.partial(np.average, weights=w)
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    best, confidence, surprise = z.argmax(-1), p.max(-1), -np.log(p[np.arange(len(y)), y])
    error = 0.0
    for i in range(BINS):
        inside = (confidence > i / BINS) & (confidence <= (i + 1) / BINS)
        error += abs(((best == y) - confidence)[inside] @ w[inside]) / w.sum()
    confusion = np.zeros((CLASSES, CLASSES))
    np.add.at(confusion, (y, best), w)
    both, either = np.diag(confusion), confusion.sum(0) + confusion.sum(1) - np.diag(confusion)
    expected = {
        'accuracy': average(best == y),
        'top_1': average(best == y),
        'top_2': average([label in row[-2:] for label, row in zip(y, z.argsort(-1), strict=True)]),
        'nll': average(surprise),
        'perplexity': np.exp(average(surprise)),
        'bits_per_byte': w @ surprise / np.log(2) / (w @ sliced(data['sizes'], labelled)),
        'calibration_error': error,
        'confusion_matrix': confusion,
        'intersection_over_union': np.mean(both[either > 0] / either[either > 0]),
    }
    w = sliced(data['weights'], counts)
    student, teacher, other = (sliced(data['inputs'][name], counts) for name in ('student', 'teacher', 'other'))
    several, numbers = sliced(data['several'], counts), sliced(data['numbers'], counts)
    right = (1 / (1 + np.exp(-other)) > 0.3) == several
    ranked = np.array(
        [
            label_ranking_average_precision_score(labels[None, labels >= 0], scores[None, labels >= 0])
            if (labels == 1).any()
            else 0
            for labels, scores in zip(several, other, strict=True)
        ]
    )
    return expected | {
        'agreement': np.average(student.argmax(-1) == teacher.argmax(-1), weights=w),
        'binary_accuracy': np.average(right, weights=w[:, None] * (several >= 0)),
        'ranking': np.average(ranked, weights=w * (several == 1).any(-1)),
        'squared_error': np.average(np.square(other - numbers).mean(-1), weights=w),
        'absolute_error': np.average(np.abs(other - numbers).mean(-1), weights=w),
    }


def check(measured, expected, rtol=1e-5):
    assert measured.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(measured[name], value, rtol=rtol, atol=1e-7, err_msg=name)


@pytest.fixture(scope='module')
def evaluate():
    """All metrics, eight examples at a time."""
    return training.evaluator(lookup(), teacher=teacher(), metrics=ALL, batch_size=8)


def test_every_metric_that_there_is_stands_in_the_table():
    makers = {name for name in vars(metrics) if name.islower() and callable(getattr(metrics, name))}
    makers -= {'add', 'compute', 'divide', 'mean'}
    names = {'top_k_accuracy', 'label_ranking_average_precision'} | (ALL.keys() - {'top_1', 'top_2', 'ranking'})
    assert makers == names


@pytest.mark.parametrize('layout', LAYOUTS)
def test_equals_numpy_of_what_counts(layout, evaluate):
    data = examples(LAYOUTS[layout])
    check(metrics.compute(evaluate(VARIABLES, data, {})), oracle(data))


def test_a_weight_of_zero_is_a_mask_and_equal_weights_are_none(evaluate):
    data = examples(LAYOUTS['tokens'])
    counts = data['mask'] & (data['weights'] > 0)
    ones = {**data, 'mask': counts, 'weights': counts.astype(np.float32)}
    expected = oracle(ones)
    alone = {name: array for name, array in ones.items() if name != 'weights'}
    weighted = {name: array for name, array in ones.items() if name != 'mask'} | {'weights': 3 * ones['weights']}
    check(metrics.compute(evaluate(VARIABLES, alone, {})), expected)
    check(
        metrics.compute(evaluate(VARIABLES, weighted, {})), {**expected, 'confusion_matrix': 3 * expected['confusion_matrix']}
    )


def test_batches_of_any_size_sources_loaders_and_devices_give_the_same(evaluate):
    data = examples(LAYOUTS['examples'])
    expected = oracle(data)
    take = lambda indices: jax.tree.map(lambda array: array[indices], data)  # noqa: E731
    loader = (take(slice(start, start + 5)) for start in range(0, 13, 5))
    check(metrics.compute(evaluate(VARIABLES, loader, {})), expected)
    with pytest.raises(ValueError, match='there are no examples; an iterator, such as a generator, can be read only once'):
        evaluate(VARIABLES, loader, {})
    on_mesh = parallel.shard(parallel.data_parallel(), VARIABLES)
    check(metrics.compute(evaluate(on_mesh, data, {})), expected)
    whole = training.evaluator(lookup(), teacher=teacher(), metrics=ALL, batch_size=64)
    check(metrics.compute(whole(VARIABLES, jax.tree.map(jnp.asarray, data), {})), expected)


def test_a_source_is_read_example_by_example():
    data = {'inputs': np.eye(CLASSES, dtype=np.uint8)[[0, 1, 2, 3, 0]], 'labels': np.array([0, 1, 2, 0, -1])}
    source = [{name: array[i] for name, array in data.items()} for i in range(5)]
    network = networks.preprocess(
        networks.from_linen(nn.Dense(CLASSES, kernel_init=lambda *_: 9 * jnp.eye(CLASSES))), jnp.float32
    )
    variables = network.init(jax.random.key(0), data['inputs'])
    evaluate = training.evaluator(network, batch_size=2)
    measured = evaluate(variables, source)
    assert measured.keys() == {'accuracy', 'nll', 'calibration_error'}
    assert measured['accuracy'] == (3, 4)
    check(metrics.compute(evaluate(variables, data)), metrics.compute(measured))


def test_what_was_measured_wrong_before():
    """Examples without labels counted, and positions were divided by examples."""
    logits = np.log(np.array([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1]] * 5, np.float32))
    labels = np.array([1, 0, -1, -1, 1, 1, -1, -1, 1, 2])
    plain = Network(lookup().init, lambda variables, inputs, **_: (Outputs(inputs), {}))
    evaluate = training.evaluator(plain, batch_size=8)
    measured = metrics.compute(evaluate({}, {'inputs': logits, 'labels': labels}))
    masked = {'inputs': logits, 'labels': np.maximum(labels, 0), 'mask': labels >= 0}
    assert measured['accuracy'] == pytest.approx(4 / 6)
    assert measured['nll'] == pytest.approx(-np.log([0.5, 0.6, 0.5, 0.3, 0.5, 0.1]).mean())
    check(metrics.compute(evaluate({}, masked)), measured)
    for shape in ((20, 4, 256), (20, 8, 8)):
        pixels = {'inputs': RNG.standard_normal((*shape, 3), np.float32), 'labels': RNG.integers(0, 3, shape)}
        right = pixels['inputs'].argmax(-1) == pixels['labels']
        assert metrics.compute(evaluate({}, pixels))['accuracy'] == pytest.approx(right.mean())


def test_tasks_of_other_classes_are_positions():
    network = networks.multitask([networks.from_linen(nn.Dense(classes)) for classes in (3, 2)])
    inputs, labels = RNG.standard_normal((6, 5), np.float32), np.array([[0, 1], [2, -1], [-1, -1], [1, 0], [-1, 1], [2, 1]])
    variables = network.init(jax.random.key(0), inputs)
    logits = np.asarray(network.apply(variables, inputs)[0].logits, np.float64)
    likelihood = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    picked = [likelihood[i, task, labels[i, task]] for i, task in zip(*np.nonzero(labels >= 0), strict=True)]
    measured = metrics.compute(training.evaluator(network)(variables, {'inputs': inputs, 'labels': labels}))
    assert measured['nll'] == pytest.approx(-np.log(picked).mean(), rel=1e-5)
    assert measured['accuracy'] == pytest.approx((logits.argmax(-1) == labels)[labels >= 0].mean())


def test_nothing_that_counts_is_nan():
    data = {**examples((8,)), 'mask': np.zeros(8, bool)}
    measured = metrics.compute(
        training.evaluator(lookup(), metrics=OF_CLASSES)(VARIABLES, {**data, 'teacher_logits': data['inputs']['teacher']})
    )
    assert (measured.pop('confusion_matrix') == 0).all()
    assert all(np.isnan(value) for value in measured.values())


def test_what_is_no_number_and_counts_makes_every_metric_nan(evaluate):
    data = examples((8,))
    data |= {'mask': np.ones(8, bool), 'weights': np.ones(8, np.float32), 'labels': np.ones(8, int)}
    for fill in (np.nan, np.inf):
        inputs = {
            name: np.where(np.arange(8)[:, None] == 3, np.float32(fill), np.ones((8, CLASSES), np.float32))
            for name in data['inputs']
        }
        measured = metrics.compute(evaluate(VARIABLES, {**data, 'inputs': inputs, 'several': np.ones((8, CLASSES), int)}, {}))
        assert not {name for name, value in measured.items() if np.isfinite(value).any()}


def bad(**changed):
    return {'inputs': np.zeros((6, 3), np.float32), 'labels': np.array([0, 1, 2, 0, 1, 2]), **changed}


@pytest.mark.parametrize(
    'data, message',
    [
        (bad(inputs=np.zeros((0, 3)), labels=np.zeros(0, int)), 'there are no examples'),
        ({'inputs': np.zeros((6, 3))}, r"accuracy needs batch\['labels'\]; the batch has inputs, mask"),
        (bad(labels=np.array([0, 1, 255, 0, 1, 3])), 'labels go up to 255, the logits have 3 classes, .* give ignore=255 if'),
        (bad(labels=np.zeros(6)), 'accuracy: labels must be integer class indices, got float'),
        (bad(labels=np.zeros((6, 3), int)), r'labels \(6, 3\) must have the shape of the logits without classes, \(6, 3\)'),
        (bad(inputs=np.zeros((6, 1)), labels=np.zeros(6, int)), r'logits \(6, 1\) have one: binary_accuracy is for single'),
        (bad(mask=np.ones(6)), r"batch\['mask'\] must be boolean"),
        (bad(weights=np.ones(6, int)), r"batch\['weights'\] must be floating point"),
        (bad(mask=np.ones(5, bool)), 'must have the same number of examples'),
    ],
)
def test_bad_data_is_refused(data, message):
    plain = Network(lookup().init, lambda variables, inputs, **_: (Outputs(inputs), {}))
    with pytest.raises(ValueError, match=message):
        training.evaluator(plain, metrics=[metrics.accuracy()], batch_size=6)({}, data)


@pytest.mark.parametrize(
    'metric, labels, message',
    [
        (metrics.binary_accuracy(), np.full((2, 3), 2), 'labels must be 1, 0, or negative where they are not known, got 2'),
        (metrics.binary_accuracy(), np.zeros(2, int), r'labels int32 \(2,\) must be 1 or 0 for each logit of \(2, 3\)'),
        (metrics.squared_error(), np.zeros((2, 3), int), r'labels must be floating point, .*\(2, 3\), got int32 \(2, 3\)'),
        (metrics.top_k_accuracy(4), np.zeros(2, int), 'top_4_accuracy: the logits have 3 classes'),
        (metrics.agreement(), np.zeros(2, int), r"agreement needs batch\['teacher_logits'\]; the batch has labels"),
    ],
)
def test_labels_of_another_kind_are_refused(metric, labels, message):
    with pytest.raises(ValueError, match=message):
        metric(Outputs(jnp.zeros((2, 3))), {'labels': labels})


def test_where_labels_are_traced_a_wrong_one_is_nan():
    measure = jax.jit(
        lambda labels: {
            name: OF_CLASSES[name](Outputs(jnp.eye(3)), {'labels': labels, 'sizes': jnp.ones(3)})
            for name in OF_CLASSES
            if name != 'agreement'
        }
    )
    wrong, right = (metrics.compute(measure(np.array([0, 1, last]))) for last in (3, 2))
    assert all(np.isnan(value).all() for value in wrong.values())
    assert all(np.isfinite(value).all() for value in right.values())
    several = jax.jit(lambda labels: metrics.binary_accuracy()(Outputs(jnp.eye(3)), {'labels': labels}))
    assert np.isnan(several(np.full((3, 3), 2)).compute())


def test_in_a_program_and_outside_metrics_are_the_same(evaluate):
    data = examples((8,))
    outputs, batch = (
        Outputs(jnp.asarray(data['inputs']['student']), {'other': jnp.asarray(data['inputs']['other'])}),
        {**data, 'teacher_logits': data['inputs']['teacher']},
    )
    check(
        metrics.compute({name: metric(outputs, batch) for name, metric in ALL.items()}),
        metrics.compute(evaluate(VARIABLES, data, {})),
        1e-6,
    )


def test_of_equal_logits_the_first_is_the_largest():
    """So that a network that says nothing is right once in as many classes, and the first of the k is that of accuracy."""
    batch, outputs = {'labels': np.arange(4)}, Outputs(jnp.zeros((4, 4)))
    assert [metrics.top_k_accuracy(k)(outputs, batch).compute() for k in (1, 2, 4)] == [0.25, 0.5, 1]
    assert metrics.accuracy()(outputs, batch).compute() == 0.25


def test_metrics_add_up_beyond_the_integers_of_float32():
    """A cell of a confusion matrix with more pixels than float32 can count one by one."""
    cell = metrics.confusion_matrix()
    outputs = Outputs(jnp.broadcast_to(jnp.array([1.0, 0.0]), (2**24 + 8, 2)))
    measured = jax.jit(lambda outputs: cell(outputs, {'labels': jnp.zeros(2**24 + 8, jnp.int32)}))(outputs)
    assert measured.compute()[0, 0] == 2**24 + 8


def test_names_of_metrics_are_those_of_their_functions_or_given():
    names = [metrics.top_k_accuracy(k) for k in (1, 3)]
    plain = Network(lookup().init, lambda variables, inputs, **_: (Outputs(inputs), {}))
    assert training.evaluator(plain, metrics=names)({}, bad()).keys() == {'top_1_accuracy', 'top_3_accuracy'}
    with pytest.raises(ValueError, match=r"got \['nll', 'nll'\]: give a dictionary of names and metrics"):
        training.evaluator(plain, metrics=[metrics.nll(), metrics.nll(ignore=3)])
    for function, message in (
        (lambda: metrics.top_k_accuracy(0), 'k must be'),
        (lambda: metrics.calibration_error(bins=0), 'bins must be'),
        (lambda: metrics.binary_accuracy(threshold=1), 'threshold must be'),
    ):
        with pytest.raises(ValueError, match=message):
            function()


def test_a_mesh_with_explicit_axes_changes_no_metric():
    """As `jax.make_mesh` makes it, where the type of an array says how it is split."""
    data = jax.tree.map(lambda x: np.nan_to_num(x[:8]), examples(LAYOUTS['tokens']))
    mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Explicit,))
    placed = jax.device_put(data, jax.NamedSharding(mesh, jax.P('data')))

    @jax.jit
    def measure(data):
        inputs, batch = data['inputs'], {**data, 'teacher_logits': data['inputs']['teacher']}
        outputs = Outputs(inputs['student'], {'other': inputs['other']})
        return {name: metric(outputs, batch) for name, metric in ALL.items()}

    expected = metrics.compute(measure(data))
    with jax.set_mesh(mesh):
        measured = metrics.compute(measure(placed))
    for name, value in expected.items():
        assert np.isfinite(value).all()
        np.testing.assert_allclose(measured[name], value, rtol=1e-5, err_msg=name)
