"""Metrics of linear heads: those of the products, in `jit` and outside of it, and with a teacher that is one too."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.linear_checks import assert_close

from kdjax import metrics, networks, training
from kdjax.networks import LinearLogits, Outputs, dense_logits

RNG = np.random.default_rng(0)
POSITIONS, CLASSES = (4, 5), 7
METRICS = {
    'absolute_error': (metrics.absolute_error(), 'numbers'),
    'accuracy': (metrics.accuracy(), 'labels'),
    'agreement': (metrics.agreement(), 'labels'),
    'binary_accuracy': (metrics.binary_accuracy(), 'several_labels'),
    'bits_per_byte': (metrics.bits_per_byte('sizes'), 'labels'),
    'calibration_error': (metrics.calibration_error(), 'labels'),
    'confusion_matrix': (metrics.confusion_matrix(), 'labels'),
    'intersection_over_union': (metrics.intersection_over_union(ignore=3), 'labels'),
    'label_ranking_average_precision': (metrics.label_ranking_average_precision(), 'several_labels'),
    'nll': (metrics.nll(), 'labels'),
    'perplexity': (metrics.perplexity(), 'labels'),
    'squared_error': (metrics.squared_error(), 'numbers'),
    'top_k_accuracy': (metrics.top_k_accuracy(3), 'labels'),
}


def head(width):
    hidden, kernel = (RNG.normal(size=shape).astype(np.float32) for shape in ((*POSITIONS, width), (width, CLASSES)))
    return LinearLogits(jnp.asarray(hidden), jnp.asarray(kernel), chunk=3)


def made():
    """Logits, a teacher's, and a batch."""
    batch = {
        'mask': RNG.uniform(size=POSITIONS) < 0.8,
        'weights': RNG.uniform(size=POSITIONS[:1]).astype(np.float32),
        'labels': RNG.integers(-1, CLASSES, POSITIONS).astype(np.int32),
        'several_labels': RNG.integers(-1, 2, (*POSITIONS, CLASSES)).astype(np.int32),
        'numbers': RNG.normal(size=(*POSITIONS, CLASSES)).astype(np.float32),
        'sizes': RNG.integers(1, 5, POSITIONS),
    }
    return head(3), head(4), batch


def measured(logits, teacher, batch):
    return {
        name: metric(Outputs(logits), {**batch, 'labels': batch[entry], 'teacher_logits': teacher})
        for name, (metric, entry) in METRICS.items()
    }


def test_every_metric_is_that_of_the_products():
    logits, teacher, batch = made()
    expected = jax.jit(measured)(dense_logits(logits), dense_logits(teacher), batch)
    assert_close(jax.jit(measured)(logits, teacher, batch), expected)
    assert_close(jax.jit(measured)(dense_logits(logits), teacher, batch), expected)
    assert_close(measured(logits, teacher, batch), expected)


def test_all_metrics_are_in_the_table():
    made = {name for name, x in vars(metrics).items() if callable(x) and not isinstance(x, type) and not name.startswith('_')}
    assert made - {'Metric', 'add', 'compute', 'divide', 'mean'} == set(METRICS)


def test_labels_beyond_the_classes():
    logits, _, batch = made()
    batch['labels'][0], batch['mask'][0] = CLASSES, True
    with pytest.raises(ValueError, match=r'^accuracy: labels go up to 7, the logits have 7 classes'):
        metrics.accuracy()(Outputs(logits), batch)
    assert np.isnan(jax.jit(metrics.accuracy())(Outputs(logits), batch).compute())
    with pytest.raises(ValueError, match=r'^nll: labels \(4, 4\) must have .* \(4, 5, 7\)'):
        metrics.nll()(Outputs(logits), {'labels': batch['labels'][:, 1:]})


def test_an_evaluation_with_a_teacher():
    """Both linear heads; the teacher's largest logits recorded too."""
    module = nn.Sequential([nn.Embed(CLASSES, 4), nn.Dense(4), nn.Dense(CLASSES)])
    network = networks.from_linen(module, features='layers_1')
    linear = networks.linear_head(network, 'layers_1', 'layers_2/kernel', bias='layers_2/bias', chunk=3)
    data = {'inputs': RNG.integers(0, CLASSES, (6, 3)).astype(np.int32)}
    data['labels'] = data['inputs'][:, ::-1]
    own, other = (jax.jit(network.init)(jax.random.key(i), data['inputs']) for i in range(2))
    found = [training.evaluator(each, batch_size=4, teacher=each)(own, data, other) for each in (linear, network)]
    assert_close(*found)


def test_a_teacher_s_largest_logits_are_recorded_a_chunk_at_a_time(tmp_path):
    module = nn.Sequential([nn.Embed(CLASSES, 4), nn.Dense(CLASSES)])
    network = networks.from_linen(module, features='layers_0')
    linear = networks.linear_head(network, 'layers_0', 'layers_1/kernel', bias='layers_1/bias', chunk=3)
    data = {'inputs': RNG.integers(0, CLASSES, (6, 3)).astype(np.int32)}
    own = jax.jit(network.init)(jax.random.key(0), data['inputs'])
    for options in ({}, {'top_k': 2}):
        found = [
            training.record_teacher(each, own, data, tmp_path / f'{i}{len(options)}', batch_size=4, **options)
            for i, each in enumerate((linear, network))
        ]
        assert_close(*found)
