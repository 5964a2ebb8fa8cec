"""Products of integers equal the fake-quantized ones, in every layout that networks have, and against qwix."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import nnx
from helpers.model_checks import filled
from helpers.scanned import ScannedMLP

from kdjax import models, networks, paths, quantization
from kdjax.networks import Network, Outputs
from kdjax.quantization import QuantizedArray, Rule
from kdjax.quantization._fake_quantize_network import fake_product, transform
from kdjax.quantization._quantize_network import integer_product

RNG = np.random.default_rng(0)


def drawn(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.standard_normal(shape) + 0.3, jnp.float32)


def pure(function: Callable[[Any, Any], jax.Array], params: Any) -> Network:
    """A network of no framework."""
    return Network(lambda key, inputs: {'params': params}, lambda v, inputs, **_: (Outputs(function(v['params'], inputs)), {}))


def agreed(rule: Rule, product: Any, operands: Any, ranges: Any) -> jax.Array:
    """The fake-quantized product where the integer one is the same to float rounding, NaN elsewhere.

    Compared product by product, for what rounding moves may round to another integer in the next layer.
    """
    fake, integer = (multiply(rule, product, operands, ranges) for multiply in (fake_product, integer_product))
    close = jnp.abs(integer - fake) <= 1e-5 * jnp.max(jnp.abs(fake))
    return jnp.where(close, fake, jnp.nan)


def assert_equal(network: Network, rules: Any, stored: Any, inputs: Any, floating: Any) -> jax.Array:
    """That all products agree, and come near those in floating point; returns how far the outputs are off."""
    check = transform('agreed', network, rules, agreed)
    outputs, wanted = jax.jit(
        lambda *arguments: (check.apply(*arguments)[0].logits, network.apply(floating, inputs)[0].logits)
    )(stored, inputs)
    assert np.all(np.isfinite(outputs))
    return np.linalg.norm(outputs - wanted) / np.linalg.norm(wanted)


class Convolutional(nnx.Module):
    """Grouped convolution, batch norm and attention, in NNX."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(2, 4, (3, 3), strides=2, feature_group_count=2, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm(self.conv(x))).reshape(x.shape[0], -1, 4)
        return self.attention(x).mean(1)


IMAGES = drawn(3, 8, 8, 2)
MODULES = {
    'transformer': models.VisionTransformer(1, 8, 2, patches=2),
    'resnet': models.ResNet(8, widths=(4, 4, 4, 6)),
    'mobilenet': models.MobileNetV2(stages=((1, 4, 1, 1), (2, 4, 2, 2)), stem=4, last=8),
    'scanned': ScannedMLP(2, 6),
    'rematerialized': ScannedMLP(2, 6, rematerialized=True),
}
PRODUCTS = {'transformer': 10, 'resnet': 10, 'mobilenet': 11, 'scanned': 3, 'rematerialized': 3, 'nnx': 7}


@pytest.mark.parametrize('name', PRODUCTS)
def test_models_are_equal_in_integers(name: str) -> None:
    if name == 'nnx':
        network = networks.from_nnx(Convolutional)
        variables = network.init(jax.random.key(0), IMAGES)
    else:
        network, variables = networks.from_linen(MODULES[name]), filled(MODULES[name], IMAGES)
    rule = Rule()
    calibrated = quantization.calibrate(network, rule, variables, [IMAGES, -IMAGES])
    integers = quantization.quantize_variables(network, rule, calibrated, IMAGES)
    assert 0 < assert_equal(network, rule, integers, IMAGES, variables) < 0.05
    ranges = paths.leaves_with_paths(calibrated['quantization']['ranges'])
    assert len({path.rsplit('/', 2)[0] for path in ranges}) == PRODUCTS[name]
    stored = jax.tree.leaves(integers['params'], is_leaf=lambda leaf: isinstance(leaf, QuantizedArray))
    weights = [leaf for leaf in stored if isinstance(leaf, QuantizedArray)]
    assert len(weights) == sum(not path.startswith('products/') for path in {path.rsplit('/', 2)[0] for path in ranges})
    assert {leaf.values.dtype for leaf in weights} == {jnp.dtype('int8')}


CONVOLUTION = {'window_strides': (1, 1), 'padding': 'SAME', 'dimension_numbers': ('NHWC', 'HWIO', 'NHWC')}
CONVOLUTIONS = {
    'same': {},
    'valid and strided': {'padding': 'VALID', 'window_strides': (2, 1)},
    'padded on one side': {'padding': ((2, 0), (0, 1))},
    'cut': {'padding': ((-1, 0), (0, -1))},
    'dilated': {'rhs_dilation': (2, 1)},
    'transposed': {'lhs_dilation': (2, 3), 'padding': ((2, 1), (1, 2))},
    'grouped': {'feature_group_count': 2},
    'depthwise': {'feature_group_count': 4},
    'channels first': {'dimension_numbers': ('NCHW', 'OIHW', 'NHWC')},
}
ASYMMETRIC = Rule(ranges='dynamic')


def dot(dimensions: Any, reverse: bool = False) -> Callable[[Any, Any], jax.Array]:
    return lambda p, x: jax.lax.dot_general(*((p['w'], x) if reverse else (x, p['w'])), dimensions)


FUNCTIONS: dict[str, tuple[Callable[[Any, Any], jax.Array], tuple[int, ...], tuple[int, ...]]] = {
    'dot': (dot((((1,), (0,)), ((), ()))), (4, 6), (6, 5)),
    'weights on the left': (dot((((1,), (1,)), ((), ())), reverse=True), (4, 6), (5, 6)),
    'two axes contracted': (dot((((1, 2), (0, 1)), ((), ()))), (4, 2, 3), (2, 3, 5)),
    'batched weights': (dot((((2,), (1,)), ((0,), (2,)))), (3, 4, 6), (5, 6, 3)),
    'of inputs alone': (lambda p, x: jnp.einsum('bqd,bkd->bqk', x + p['w'], 1 - x), (3, 4, 6), (3, 4, 6)),
    'weights convolved with inputs': (
        lambda p, x: jax.lax.conv_general_dilated(p['w'], x, (1,), 'VALID', dimension_numbers=('NWC', 'OWI', 'NWC')),
        (5, 3, 2),
        (4, 9, 2),
    ),
} | {
    name: (
        lambda p, x, options=options: jax.lax.conv_general_dilated(x, p['w'], **(CONVOLUTION | options)),
        (2, 4, 6, 5) if name == 'channels first' else (2, 6, 5, 4),
        (8, 4, 3, 2) if name == 'channels first' else (3, 2, 4 // CONVOLUTIONS[name].get('feature_group_count', 1), 8),
    )
    for name, options in CONVOLUTIONS.items()
}


@pytest.mark.parametrize('rule', [ASYMMETRIC, Rule(4, 6, 'dynamic', symmetric=True, per_channel=False)], ids=['8', '4'])
@pytest.mark.parametrize('name', FUNCTIONS)
def test_products_are_equal_in_integers(name: str, rule: Rule) -> None:
    function, shape, weights = FUNCTIONS[name]
    rule = rule._replace(symmetric=rule.symmetric or name == 'weights convolved with inputs')
    inputs, variables = drawn(*shape), {'params': {'w': drawn(*weights)}}
    network = pure(function, variables['params'])
    integers = quantization.quantize_variables(network, rule, variables, inputs)
    # Of 8 bits as the integers that are stored, of 4 as numbers.
    error = assert_equal(network, rule, integers if rule.weights == 8 else variables, inputs, variables)
    assert 0 < error < (0.02 if rule.weights == 8 else 0.2)
    if name != 'of inputs alone':
        assert np.max(np.abs(integers['params']['w'].values)) == (127 if rule.weights == 8 else 7)
        assert (integers['params']['w'].scale.size > 1) == rule.per_channel


def test_integers_are_summed_in_32_bits() -> None:
    """The jaxpr of a dense layer multiplies int8 to int32, and sums of 20,000 largest products do not wrap around."""
    network = pure(lambda p, x: x @ p['w'], None)
    variables, inputs = {'params': {'w': jnp.ones((20_000, 1))}}, jnp.ones((1, 20_000))
    quantized = quantization.quantize_network(network, Rule(ranges='dynamic', symmetric=True))
    np.testing.assert_allclose(quantized.apply(variables, inputs)[0].logits, 20_000, rtol=1e-6)
    text = str(jax.make_jaxpr(quantized.apply)(variables, inputs))
    assert 'preferred_element_type=int32' in text
    assert text.count('dot_general') == 1


@pytest.mark.parametrize('channels', [1023, 1024, 2000])
def test_sums_of_convolutions_are_exact_to_the_last_integer(channels: int) -> None:
    """The largest sums, whose last bit float32 would lose beyond 2^24: 127² · channels, less one."""
    layout = ('NHWC', 'HWIO', 'NHWC')
    network = pure(lambda p, x: jax.lax.conv_general_dilated(x, p['w'], (1, 1), 'SAME', dimension_numbers=layout), None)
    kernel, image = np.full((1, 1, channels, 1), 127.0, np.float32), np.full((1, 1, 1, channels), 127.0, np.float32)
    kernel[0, 0, -1], image[0, 0, 0, -1] = 1.0, -1.0
    quantized = quantization.quantize_network(network, Rule(ranges='dynamic', symmetric=True))
    found = jax.jit(quantized.apply)({'params': {'w': jnp.asarray(kernel)}}, jnp.asarray(image))[0].logits
    assert float(found.item()) == np.float32(127 * 127 * (channels - 1) - 1)


@pytest.mark.parametrize('rule', [Rule(8, None), Rule(None, 8, 'dynamic')])
def test_a_product_of_one_quantized_operand_stays_in_floating_point(rule: Rule) -> None:
    network = pure(lambda p, x: x @ p['w'], None)
    variables, inputs = {'params': {'w': drawn(6, 5)}}, drawn(4, 6)
    fake, integer = (
        make(network, rule).apply(variables, inputs)[0].logits
        for make in (quantization.fake_quantize_network, quantization.quantize_network)
    )
    np.testing.assert_array_equal(fake, integer)
    assert np.any(fake != network.apply(variables, inputs)[0].logits)


def test_whole_networks_are_equal() -> None:
    """From end to end, with weights of 4 bits and static ranges."""
    module, inputs, rule = ScannedMLP(2, 6, classes=3), drawn(4, 5), Rule(4, ranges='static')
    network = networks.from_linen(module)
    variables = quantization.calibrate(network, rule, filled(module, inputs), [inputs])
    integers = quantization.quantize_variables(network, rule, variables, inputs)
    wanted = quantization.fake_quantize_network(network, rule).apply(variables, inputs)[0].logits
    for make in (quantization.fake_quantize_network, quantization.quantize_network):
        for stored in (variables, integers):
            np.testing.assert_allclose(make(network, rule).apply(stored, inputs)[0].logits, wanted, rtol=1e-5, atol=1e-5)
    kernel = integers['params']['layers']['dense']['kernel']
    assert (kernel.scale.shape, kernel.bits, np.max(np.abs(kernel.values))) == ((2, 1, 6), 4, 7)


def test_weights_stay_in_floating_point_where_integers_would_change_them() -> None:
    params = {name: drawn(4, 4) for name in ('dense', 'twice', 'both', 'embedding', 'halved', 'left', 'bias')}

    def function(p: Any, x: jax.Array) -> jax.Array:
        x = x @ p['dense'] @ p['twice'] @ p['twice'] @ p['both'] @ p['both'].T
        x = x @ (0.5 * p['halved']) + p['embedding'][jnp.array([0, 1, 2])] + p['bias'][:1]
        return x @ p['embedding'].T @ p['left']

    network, inputs = pure(function, params), drawn(3, 4)
    rules = {'left': None, '*': ASYMMETRIC}
    stored = quantization.quantize_variables(network, rules, {'params': params}, inputs)['params']
    assert [name for name, leaf in stored.items() if isinstance(leaf, QuantizedArray)] == ['dense', 'twice']
    assert 0 < assert_equal(network, rules, {'params': stored}, inputs, {'params': params}) < 0.05
    # Tied weights whose two uses need different scales.
    tied = pure(lambda p, x: jax.lax.dot_general(x @ p['w'], p['w'], (((1,), (1,)), ((), ()))), None)
    params = {'w': drawn(4, 4)}
    kept = quantization.quantize_variables(tied, ASYMMETRIC, {'params': params}, inputs)['params']['w']
    np.testing.assert_array_equal(kept, params['w'])
    per_tensor = quantization.quantize_variables(tied, ASYMMETRIC._replace(per_channel=False), {'params': params}, inputs)
    assert isinstance(per_tensor['params']['w'], QuantizedArray)


@pytest.mark.parametrize('shape', [(6, 1), (2, 5)], ids=['along the sum', 'groups'])
def test_integers_with_scales_along_a_sum_are_rounded_again(shape: tuple[int, ...]) -> None:
    network, inputs = pure(lambda p, x: x @ p['w'], None), drawn(4, 6)
    values = jnp.asarray(RNG.integers(-127, 128, (6, 5)), jnp.int8)
    stored = QuantizedArray(values, jnp.asarray(RNG.uniform(0.01, 0.02, shape), jnp.float32))
    floating = {'params': {'w': stored.dequantize()}}
    assert 0 < assert_equal(network, ASYMMETRIC, {'params': {'w': stored}}, inputs, floating) < 0.02


def test_networks_in_half_precision_take_integers() -> None:
    module = nn.Sequential([nn.Conv(4, (3, 3), dtype=jnp.bfloat16), nn.relu, nn.Dense(3, dtype=jnp.bfloat16)])
    network, variables = networks.from_linen(module), filled(module, IMAGES)
    for rules in (ASYMMETRIC, {'layers_0/*': None, '*': ASYMMETRIC}):
        stored = quantization.quantize_variables(network, rules, variables, IMAGES)
        outputs = [
            np.asarray(make(network, rules).apply(weights, IMAGES)[0].logits, np.float32)
            for make in (quantization.fake_quantize_network, quantization.quantize_network)
            for weights in (variables, stored)
        ]
        assert isinstance(stored['params']['layers_2']['kernel'], QuantizedArray)
        np.testing.assert_array_equal(outputs[2], outputs[3])
        for other in outputs[1:]:
            # A bfloat16 has 8 bits.
            assert np.linalg.norm(other - outputs[0]) < 2**-7 * np.linalg.norm(outputs[0])


def test_convolutions_that_integers_cannot_do_are_named() -> None:
    batch_groups = pure(
        lambda p, x: jax.lax.conv_general_dilated(
            x, p['w'], (1,), 'SAME', dimension_numbers=('NWC', 'WIO', 'NWC'), batch_group_count=2
        ),
        None,
    )
    variables, inputs = {'params': {'w': drawn(3, 2, 4)}}, drawn(4, 6, 2)
    with pytest.raises(ValueError, match=r'^quantize_network: w is a convolution with batch groups; give it no rule$'):
        quantization.quantize_network(batch_groups, ASYMMETRIC).apply(variables, inputs)
    function, shape, weights = FUNCTIONS['weights convolved with inputs']
    with pytest.raises(ValueError, match=r'^quantize_network: w convolves with activations; give it a symmetric rule$'):
        quantization.quantize_network(pure(function, None), ASYMMETRIC).apply({'params': {'w': drawn(*weights)}}, drawn(*shape))


TYPES = {8: jnp.int8, 6: 'int6'}


@pytest.mark.parametrize('bits', TYPES)
@pytest.mark.parametrize('kind', ['dot', 'convolution'])
def test_products_agree_with_those_of_qwix(kind: str, bits: int) -> None:
    """Its bound is 127.5 where ours is 127: operands lie on the grid of scale 1 already, on which both agree."""
    largest = 2 ** (bits - 1) - 1
    shapes = ((5, 16), (16, 7)) if kind == 'dot' else ((2, 6, 6, 3), (3, 3, 3, 4))
    lhs, rhs = (jnp.asarray(RNG.integers(-largest, largest + 1, shape), jnp.float32) for shape in shapes)
    lhs, rhs = (0.02 * x.at[(0,) * x.ndim].set(largest) for x in (lhs, rhs))
    theirs = [
        qwix.quantize(x, TYPES[bits], calibration_method=f'fixed,{-0.02 * bound},{0.02 * bound}')
        for x, bound in ((lhs, largest + 0.5), (rhs, largest + 0.5))
    ]
    if kind == 'dot':
        function = lambda p, x: x @ p['w']  # noqa: E731
        with jax.numpy_dtype_promotion('standard'):
            wanted = qwix.dot_general(*theirs, (((1,), (0,)), ((), ())))
    else:
        function = lambda p, x: jax.lax.conv_general_dilated(x, p['w'], **CONVOLUTION)  # noqa: E731
        with jax.numpy_dtype_promotion('standard'):
            wanted = qwix.conv_general_dilated(*theirs, **CONVOLUTION)
    rule = Rule(bits, bits, 'dynamic', symmetric=True, per_channel=False)
    outputs, _ = quantization.quantize_network(pure(function, None), rule).apply({'params': {'w': rhs}}, lhs)
    np.testing.assert_allclose(outputs.logits, wanted, rtol=1e-5, atol=1e-5)
