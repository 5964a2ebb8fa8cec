"""The report's figures against float64, and its table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.model_checks import filled
from helpers.scanned import ScannedMLP

from kdjax import models, networks, quantization
from kdjax.quantization import Rule, Site

RNG = np.random.default_rng(0)
INPUTS = jnp.asarray(RNG.standard_normal((6, 5)), jnp.float32)


def error(rounded: np.ndarray, exact: np.ndarray) -> float:
    return np.linalg.norm(rounded - exact) / np.linalg.norm(exact)


def affine(x: np.ndarray, low: float, high: float) -> np.ndarray:
    scale = (high - low) / 255
    zero_point = -128 - np.rint(low / scale)
    return (np.clip(np.rint(x / scale) + zero_point, -128, 127) - zero_point) * scale


def symmetric(w: np.ndarray, bits: int) -> np.ndarray:
    scale = np.max(np.abs(w), axis=0, keepdims=True) / (2 ** (bits - 1) - 1)
    return np.rint(w / scale) * scale


def test_figures_are_those_of_each_product_quantized_alone() -> None:
    """Of a scanned network: float, then three layers in one site, then weights of 4 bits alone."""
    module = ScannedMLP(3, 4, classes=2)
    network, variables = networks.from_linen(module), filled(module, INPUTS)
    rules = {'layers/*': Rule(decay=0.5), 'head/*': Rule(4, None)}
    calibrated = quantization.calibrate(network, rules, variables, [0.5 * INPUTS])
    sites = {site.name: site for site in quantization.report(network, rules, calibrated, INPUTS)}
    assert list(sites) == ['embed/kernel', 'layers/dense/kernel', 'head/kernel']

    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables['params'])
    layers = params['layers']['dense']

    def inputs_of_layers(x: np.ndarray) -> list[np.ndarray]:
        xs = [x @ params['embed']['kernel'] + params['embed']['bias']]
        for kernel, bias in zip(layers['kernel'], layers['bias'], strict=True):
            xs.append(np.maximum(xs[-1] @ kernel + bias, 0))
        return xs

    x = np.asarray(INPUTS, np.float64)
    *xs, last = inputs_of_layers(x)
    seen = inputs_of_layers(0.5 * x)[:3]
    ends = [(min(y.min(), 0), max(y.max(), 0)) for y in seen]
    exact = np.stack([y @ kernel for y, kernel in zip(xs, layers['kernel'], strict=True)])
    kernels = np.stack([symmetric(kernel, 8) for kernel in layers['kernel']])
    rounded = np.stack([affine(y, *end) @ kernel for y, end, kernel in zip(xs, ends, kernels, strict=True)])
    scanned = sites['layers/dense/kernel']
    assert (scanned.rule, scanned.shape) == (rules['layers/*'], (4, 4))
    np.testing.assert_allclose(scanned.weight_error, error(kernels, layers['kernel']), rtol=1e-3)
    np.testing.assert_allclose(scanned.output_error, error(rounded, exact), rtol=1e-3)
    np.testing.assert_allclose(scanned.ranges, [(min(low for low, _ in ends), max(high for _, high in ends))], rtol=1e-5)

    head, kernel = sites['head/kernel'], params['head']['kernel']
    np.testing.assert_allclose(head.weight_error, error(symmetric(kernel, 4), kernel), rtol=1e-3)
    np.testing.assert_allclose(head.output_error, error(last @ symmetric(kernel, 4), last @ kernel), rtol=1e-3)
    np.testing.assert_allclose(head.ranges, [(0, last.max())], rtol=1e-5)
    embed = sites['embed/kernel']
    assert (embed.rule, embed.shape, embed.weight_error, embed.output_error) == (None, (5, 4), 0.0, 0.0)
    np.testing.assert_allclose(embed.ranges, [(x.min(), x.max())], rtol=1e-5)


def test_attention_has_two_ranges_and_no_weights() -> None:
    module, images = models.VisionTransformer(1, 4, 2, patches=2), jnp.asarray(RNG.standard_normal((2, 4, 4, 1)), jnp.float32)
    network, rules = networks.from_linen(module), {'products/1': Rule(ranges='dynamic')}
    variables = filled(module, images)
    sites = quantization.report(network, rules, variables, images)
    assert [site.name for site in sites if site.rule] == ['products/1']
    (site,) = (site for site in sites if site.name == 'products/1')
    assert (site.shape, site.weight_error) == (None, None)
    values, probabilities = sorted(site.ranges)
    assert probabilities[0] == 0 < probabilities[1] <= 1
    assert values[0] < 0 < values[1]
    assert 0 < site.output_error < 0.02
    stored = quantization.quantize_variables(network, Rule(ranges='dynamic'), variables, images)
    packed = quantization.report(network, Rule(ranges='dynamic'), stored, images)
    # Integers are on their grid already.
    assert all(site.weight_error is None or site.weight_error < 1e-6 for site in packed)


def test_mistakes_are_those_of_the_quantized_network() -> None:
    module = ScannedMLP(1, 4)
    network, variables = networks.from_linen(module), filled(module, INPUTS)
    with pytest.raises(ValueError, match='report: embed/kernel has no range; use the variables that `calibrate` returns'):
        quantization.report(network, Rule(), variables, INPUTS)
    with pytest.raises(ValueError, match="the pattern 'tail' matches no path"):
        quantization.report(network, {'tail': Rule()}, variables, INPUTS)


def test_tables_have_a_row_for_every_site() -> None:
    sites = [
        Site('embed', None, (3, 4), 0.0, ((-1.0, 2.0),), 0.0),
        Site('products/0', Rule(ranges='static'), None, None, ((-1.25, 2.0), (0.0, 1e-5)), 0.01234),
        Site('head', Rule(4, None), (3, 4), 0.0567, ((0.0, 1.0),), float('nan')),
    ]
    assert quantization.table(sites).splitlines()[2:] == [
        '| embed | 3x4 | - | - | - | [-1, 2] | 0.00 % | 0.00 % |',
        '| products/0 | - | - | static | 8 | [-1.25, 2] x [0, 1e-05] | - | 1.23 % |',
        '| head | 3x4 | 4 | - | - | [0, 1] | 5.67 % | nan % |',
    ]
    assert {line.count('|') for line in quantization.table(sites).splitlines()} == {9}
