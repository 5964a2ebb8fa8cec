"""Evaluation against numpy, with batches that do not divide the data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import metrics, networks, training
from kdjax.networks import Network, Outputs


def lookup(name):
    """A network whose logits are its inputs' columns, so that tests choose them."""
    columns = {'student': slice(0, 4), 'teacher': slice(4, 8)}[name]
    return Network(
        lambda key, inputs: {}, lambda variables, inputs, *, train=False, rng=None: (Outputs(inputs[:, columns]), {})
    )


@pytest.fixture
def examples(key):
    logits_key, labels_key = jax.random.split(key)
    return {
        'inputs': 3 * jax.random.normal(logits_key, (53, 8)),
        'labels': jax.random.randint(labels_key, (53,), 0, 4),
    }


@pytest.mark.parametrize('batch_size', [7, 53, 64])
def test_equals_numpy_whatever_the_batch_size(examples, batch_size):
    evaluate = training.evaluator(lookup('student'), teacher=lookup('teacher'), batch_size=batch_size, bins=10)
    measured = metrics.compute(evaluate({}, examples, {}))
    inputs, labels = np.asarray(examples['inputs'], np.float64), np.asarray(examples['labels'])
    logits, teacher = inputs[:, :4], inputs[:, 4:]
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    correct, confidence = logits.argmax(-1) == labels, p.max(-1)
    error = 0.0
    for low, high in zip(np.linspace(0, 1, 11)[:-1], np.linspace(0, 1, 11)[1:], strict=True):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            error += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    expected = {
        'accuracy': correct.mean(),
        'nll': -np.log(p[np.arange(53), labels]).mean(),
        'calibration_error': error,
        'agreement': (logits.argmax(-1) == teacher.argmax(-1)).mean(),
    }
    assert measured.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(measured[name], value, rtol=1e-5, err_msg=name)


def test_perfect_and_confident_is_calibrated():
    examples = {'inputs': 100 * jnp.eye(8)[:4], 'labels': jnp.arange(4)}
    measured = metrics.compute(training.evaluator(lookup('student'))({}, examples))
    assert measured['accuracy'] == 1
    assert measured['calibration_error'] < 1e-6
    assert 'agreement' not in measured


def test_bad_data_is_refused():
    evaluate = training.evaluator(lookup('student'))
    with pytest.raises(ValueError, match='the split is empty'):
        evaluate({}, {'inputs': jnp.ones((0, 8)), 'labels': jnp.ones(0, jnp.int32)})
    with pytest.raises(ValueError, match='labels'):
        evaluate({}, {'inputs': jnp.ones((3, 8))})


def test_evaluates_teachers_of_uint8_images_too():
    network = networks.preprocess(lookup('student'), lambda x: x.astype(jnp.float32))
    examples = {'inputs': jnp.eye(8, dtype=jnp.uint8)[:4], 'labels': jnp.arange(4)}
    assert metrics.compute(training.evaluator(network)({}, examples))['accuracy'] == 1
