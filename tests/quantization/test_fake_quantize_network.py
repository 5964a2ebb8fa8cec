"""Fake-quantized networks against float64, their ranges and gradients by hand, and what they refuse."""

import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.model_checks import filled
from helpers.scanned import ScannedMLP

from kdjax import models, networks, quantization
from kdjax.networks import Network, Outputs
from kdjax.quantization import Rule

RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.standard_normal((2, 4, 6, 6, 2)), jnp.float32)
PARAMS = {
    'filters': jnp.asarray(RNG.standard_normal((3, 3, 2, 4)), jnp.float32),
    'head': jnp.asarray(RNG.standard_normal((4, 3)), jnp.float32),
}


def pure(function: Callable[[Any, Any], jax.Array], params: Any) -> Network:
    """A network of no framework."""
    return Network(lambda key, inputs: {'params': params}, lambda v, inputs, **_: (Outputs(function(v['params'], inputs)), {}))


def convolve(x: jax.Array, filters: jax.Array) -> jax.Array:
    layout = ('NHWC', 'HWIO', 'NHWC')
    return jax.lax.conv_general_dilated(x, filters, (2, 2), ((1, 1), (1, 1)), dimension_numbers=layout)


CNN = pure(lambda p, x: jnp.mean(nn.relu(convolve(x, p['filters'])), (1, 2)) @ p['head'], PARAMS)
DENSE = pure(lambda p, x: x @ p['kernel'], {'kernel': jnp.array([[1.0, -0.5], [0.25, 0.5]])})


def on_grid(x: np.ndarray, low: Any, high: Any, bits: int | None, symmetric: bool) -> np.ndarray:
    if bits is None:
        return x
    if symmetric:
        largest = 2 ** (bits - 1) - 1
        scale = np.maximum(-low, high) / largest
        return np.clip(np.rint(x / scale), -largest, largest) * scale
    low, high, smallest = np.minimum(low, 0), np.maximum(high, 0), -(2 ** (bits - 1))
    scale = (high - low) / (2**bits - 1)
    zero_point = smallest - np.rint(low / scale)
    return (np.clip(np.rint(x / scale) + zero_point, smallest, -smallest - 1) - zero_point) * scale


def weights_on_grid(rule: Rule, weights: np.ndarray) -> np.ndarray:
    largest = np.max(np.abs(weights), axis=tuple(range(weights.ndim - 1)) if rule.per_channel else None, keepdims=True)
    return on_grid(weights, -largest, largest, rule.weights, True)


def expected(rule: Rule, images: jax.Array, seen: jax.Array) -> np.ndarray:
    """The logits of `CNN`, with the ranges that activations have on what was seen, in float64."""
    x, seen = (np.pad(np.asarray(a, np.float64), ((0, 0), (1, 1), (1, 1), (0, 0))) for a in (images, seen))
    filters, head = (np.asarray(PARAMS[name], np.float64) for name in ('filters', 'head'))

    def hidden(x: np.ndarray, filters: np.ndarray) -> np.ndarray:
        sums = sum(x[:, i : i + 5 : 2, j : j + 5 : 2] @ filters[i, j] for i in range(3) for j in range(3))
        return np.maximum(sums, 0).mean((1, 2))

    # Ranges of a layer are those of its inputs in the network that saw them: float in calibration, quantized in a dynamic one.
    first = on_grid(x, seen.min(), seen.max(), rule.activations, rule.symmetric)
    y = hidden(first, weights_on_grid(rule, filters))
    seen = y if rule.ranges == 'dynamic' else hidden(seen, filters)
    return on_grid(y, seen.min(), seen.max(), rule.activations, rule.symmetric) @ weights_on_grid(rule, head)


RULES = {
    'dynamic': Rule(ranges='dynamic'),
    'dynamic symmetric, per tensor': Rule(ranges='dynamic', symmetric=True, per_channel=False),
    'dynamic activations in 4 bits': Rule(None, 4, ranges='dynamic'),
    'static, weights in 4 bits': Rule(4, ranges='static'),
    'static symmetric': Rule(ranges='static', symmetric=True),
    'moving average, calibrated': Rule(),
    'weights alone': Rule(4, None, per_channel=False),
}


@pytest.mark.parametrize('name', RULES)
def test_outputs_are_those_of_rounded_operands(name: str) -> None:
    rule = RULES[name]
    seen = IMAGES[1] if rule.ranges == 'dynamic' else IMAGES.reshape(8, 6, 6, 2)
    variables = quantization.calibrate(CNN, rule, {'params': PARAMS}, IMAGES)
    outputs, _ = jax.jit(quantization.fake_quantize_network(CNN, rule).apply)(variables, IMAGES[1])
    wanted = expected(rule, IMAGES[1], seen)
    np.testing.assert_allclose(outputs.logits, wanted, rtol=1e-5, atol=1e-5)
    floating = np.asarray(CNN.apply(variables, IMAGES[1])[0].logits)
    assert 1e-3 < np.max(np.abs(wanted - floating)) / np.max(np.abs(floating)) < 0.5


def test_scanned_layers_have_ranges_of_their_own() -> None:
    module, inputs = ScannedMLP(3, 5, classes=2), jnp.asarray(RNG.standard_normal((4, 6)), jnp.float32)
    variables, rule = filled(module, inputs), Rule(ranges='static')
    x, params = np.asarray(inputs, np.float64), jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables['params'])
    layers = params['layers']['dense']
    dense = [params['embed'], *({name: layers[name][i] for name in layers} for i in range(3)), params['head']]
    floating = rounded = x
    for i, layer in enumerate(dense):
        rounded = on_grid(rounded, floating.min(), floating.max(), 8, False) @ weights_on_grid(rule, layer['kernel'])
        activation = (lambda y: np.maximum(y, 0)) if 0 < i < 4 else lambda y: y
        rounded, floating = activation(rounded + layer['bias']), activation(floating @ layer['kernel'] + layer['bias'])
    for rematerialized in (False, True):
        network = networks.from_linen(ScannedMLP(3, 5, 2, rematerialized))
        calibrated = quantization.calibrate(network, rule, variables, [inputs])
        assert calibrated['quantization']['ranges']['layers']['dense']['kernel']['lhs']['low'].shape == (3, 1, 1)
        outputs, _ = jax.jit(quantization.fake_quantize_network(network, rule).apply)(calibrated, inputs)
        np.testing.assert_allclose(outputs.logits, rounded, rtol=1e-5, atol=1e-5)


def test_moving_averages_begin_with_the_first_batch_decay_and_freeze() -> None:
    network = quantization.fake_quantize_network(DENSE, Rule(decay=0.75, freeze=2))
    variables = network.init(jax.random.key(0), jax.ShapeDtypeStruct((2, 2), jnp.float32))
    apply = jax.jit(network.apply, static_argnames='train')
    assert np.all(np.isnan(apply(variables, jnp.ones((2, 2)))[0].logits))
    wanted = [(-1.0, 2.0), (-2.0, 3.0), (-2.0, 3.0)]
    batches = [[[-1.0, 2.0], [0.0, 1.0]], [[-5.0, 0.0], [6.0, 1.0]], [[-50.0, 0.0], [60.0, 1.0]]]
    for steps, (ends, batch) in enumerate(zip(wanted, batches, strict=True), start=1):
        outputs, state = apply(variables, jnp.asarray(batch), train=True)
        variables = {**variables, **state}
        found = state['quantization']['ranges']['kernel']['lhs']
        assert (found['low'].item(), found['high'].item(), state['quantization']['steps']) == (*ends, steps)
        assert np.all(np.isfinite(outputs.logits))
    _, state = apply(variables, jnp.full((2, 2), 99.0))
    jax.tree.map(np.testing.assert_array_equal, state['quantization'], variables['quantization'])


def test_gradients_pass_inside_the_range_and_stop_outside() -> None:
    network = quantization.fake_quantize_network(DENSE, Rule(ranges='static'))
    variables = quantization.calibrate(DENSE, Rule(ranges='static'), DENSE.init(None, None), [jnp.array([[-1.0, 1.55]])])
    inputs = jnp.array([[0.5, 3.0], [-2.0, 0.0]])

    def total(params: Any, inputs: jax.Array) -> jax.Array:
        return jnp.sum(network.apply({**variables, 'params': params}, inputs)[0].logits)

    params, through = jax.grad(total, argnums=(0, 1))(variables['params'], inputs)
    # Sums of the rounded kernel's rows: 0.25 lies between 31 and 32 steps of 1 / 127.
    sums = np.asarray([1.0 - 0.5, 32 / 127 + 0.5])
    np.testing.assert_allclose(through, [[sums[0], 0.0], [0.0, sums[1]]], rtol=1e-6)
    # The kernel's gradient is the rounded inputs: steps of 0.01, from -1 to 1.55.
    np.testing.assert_allclose(params['kernel'], [[0.5 - 1.0] * 2, [1.55] * 2], rtol=1e-6)


def test_first_matching_rule_counts_and_what_has_none_stays_bitwise() -> None:
    rules = {'filters': None, '*': Rule(ranges='dynamic'), 'head': Rule(2, ranges='dynamic')}
    variables = CNN.init(None, None)
    quantized = quantization.fake_quantize_network(CNN, rules).apply(variables, IMAGES[0])[0].logits
    hidden = jnp.mean(nn.relu(convolve(IMAGES[0], PARAMS['filters'])), (1, 2))
    head = pure(lambda p, x: x @ p['head'], PARAMS)
    alone = quantization.fake_quantize_network(head, Rule(ranges='dynamic')).apply(variables, hidden)[0].logits
    np.testing.assert_array_equal(quantized, alone)
    untouched = quantization.fake_quantize_network(CNN, {'*': None}).apply(variables, IMAGES[0])[0].logits
    np.testing.assert_array_equal(untouched, CNN.apply(variables, IMAGES[0])[0].logits)
    # A name that no pattern matches has no rule.
    only = quantization.fake_quantize_network(CNN, {'head': Rule(ranges='dynamic')}).apply(variables, IMAGES[0])[0].logits
    np.testing.assert_array_equal(only, alone)


def test_products_of_attention_are_quantized_by_name() -> None:
    module, inputs, rules = models.VisionTransformer(1, 8, 2, patches=2, classes=3), IMAGES[0], {'products/0': Rule()}
    query, key, scores = (f'block0/attention/{name}' for name in ('query', 'key', 'scores'))
    network, variables = networks.from_linen(module, features=(query, key, scores)), filled(module, inputs)
    calibrated = quantization.calibrate(network, rules, variables, [inputs])
    assert list(calibrated['quantization']['ranges']['products']['0']) == ['lhs', 'rhs']
    features = jax.jit(quantization.fake_quantize_network(network, rules).apply)(calibrated, inputs)[0].features
    # Nothing before them is quantized.
    rounded = [np.asarray(features[name], np.float64).swapaxes(1, 2) for name in (query, key)]
    rounded = [on_grid(x, x.min(), x.max(), 8, False) for x in rounded]
    np.testing.assert_allclose(features[scores], np.einsum('bhqd,bhkd->bhqk', *rounded) / 2, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    'estimate',
    [quantization.minmax_range, lambda x: quantization.percentile_range(x, 95), lambda x: quantization.mse_range(x, bits=4)],
)
@pytest.mark.parametrize('join', [quantization.union_range, quantization.average_range])
def test_calibration_joins_what_it_estimates_on_every_batch(estimate: Any, join: Any) -> None:
    found = quantization.calibrate(
        DENSE, Rule(), DENSE.init(None, None), IMAGES[..., 0, :, :][:, 0], estimate=estimate, join=join
    )
    ends = [estimate(batch) for batch in IMAGES[..., 0, :, :][:, 0]]
    low, high = (np.asarray([getattr(end, side).item() for end in ends]) for side in ('low', 'high'))
    wanted = (low.min(), high.max()) if join is quantization.union_range else (low.mean(), high.mean())
    got = found['quantization']['ranges']['kernel']['lhs']
    np.testing.assert_allclose([got['low'].item(), got['high'].item()], wanted, rtol=1e-6)
    assert low[0] != low[1]
    assert found['quantization']['steps'] == 0


def test_mistakes_are_named_when_traced() -> None:
    variables = CNN.init(None, None)
    loop = pure(
        lambda p, x: jax.lax.fori_loop(0, x.shape[0] + jnp.int32(x[0, 0]), lambda i, x: x @ p['w'], x), {'w': jnp.eye(2)}
    )
    cases = [
        (
            lambda: quantization.fake_quantize_network(CNN, {'tail': Rule()}),
            "the pattern 'tail' matches no path; there are: filters, head",
        ),
        (
            lambda: quantization.fake_quantize_network(CNN, Rule(ranges='static')),
            'filters has no range; use the variables that `calibrate`',
        ),
        (lambda: quantization.fake_quantize_network(CNN, Rule()), 'fake_quantize_network: filters has no range'),
        (
            lambda: quantization.fake_quantize_network(CNN, Rule(ranges='fixed')),
            'ranges must be one of moving_average, static, dynamic',
        ),
        (lambda: quantization.fake_quantize_network(CNN, Rule(decay=1.5)), 'decay must be between 0 and 1, got 1.5'),
        (lambda: quantization.fake_quantize_network(CNN, Rule(9)), 'bits must be between 2 and 8, got 9'),
        (lambda: quantization.fake_quantize_network(CNN, {}), 'or there are no rules'),
        (lambda: quantization.quantize_network(CNN, Rule(ranges='static')), 'quantize_network: filters has no range'),
    ]
    for make, message in cases:
        with pytest.raises(ValueError, match=re.escape(message)) as raised:
            jax.eval_shape(make().apply, variables, IMAGES[0])
        assert '\n' not in str(raised.value)
    with pytest.raises(ValueError, match="products within 'while' are not supported"):
        quantization.fake_quantize_network(loop, Rule(ranges='dynamic')).apply(loop.init(None, None), jnp.ones((2, 2)))
    with pytest.raises(ValueError, match='calibrate: there are no batches'):
        quantization.calibrate(CNN, Rule(), variables, [])
