"""Inputs of several arrays: calibration, reports, channels and quantized networks find in them what they find in one array."""

import jax
import numpy as np
import pytest
from helpers.framework_checks import assert_bitwise_equal
from helpers.token_networks import CASES, Case

from kdjax import networks, pruning, quantization
from kdjax.quantization import Rule


@pytest.fixture(scope='module', params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def variables_of(case: Case) -> dict:
    return jax.jit(case.network.init)(jax.random.key(0), case.inputs)


def test_inputs_of_several_arrays_give_what_the_same_numbers_in_one_array_give(case: Case) -> None:
    variables, rule = variables_of(case), Rule(ranges='static')

    def everything(network: networks.Network, inputs: list) -> tuple:
        calibrated = quantization.calibrate(network, rule, variables, inputs)
        integers = quantization.quantize_variables(network, rule, calibrated, inputs[0])
        quantized = jax.jit(quantization.quantize_network(network, rule).apply)(integers, inputs[0])[0].logits
        sites = quantization.report(network, rule, calibrated, inputs[0])
        return calibrated, integers, quantized, [site._replace(rule=None) for site in sites]

    packed = [case.packed, case.packed[::-1]]
    several = everything(case.network, [case.unpack(x) for x in packed])
    one = everything(networks.preprocess(case.network, case.unpack), packed)
    for got, wanted in zip(several[:3], one[:3], strict=True):
        assert_bitwise_equal(got, wanted)
    assert several[3] == one[3]
    assert len(several[3]) >= 2
    # The grids that were found are of use: the integers are near to the floats.
    exact = jax.jit(case.network.apply)(variables, case.inputs)[0].logits
    assert 0 < np.linalg.norm(several[2] - exact) < 0.05 * np.linalg.norm(exact)


def test_channels_and_shapes_alone(case: Case) -> None:
    variables = variables_of(case)
    shapes = jax.eval_shape(lambda *trees: trees, variables, case.inputs)
    found = pruning.channel_groups(case.network, *shapes)
    packed = pruning.channel_groups(networks.preprocess(case.network, case.unpack), variables, case.packed)
    members = lambda channels: [[(m.path, m.axis) for m in group.members] for group in channels.groups]  # noqa: E731
    assert members(found) == members(packed)
    assert case.hidden in [group.size for group in found.groups]


def test_a_whole_batch_is_refused_with_a_line_that_says_what_to_give(case: Case) -> None:
    variables, rule = variables_of(case), Rule(ranges='dynamic')
    batch = {'inputs': case.inputs, 'labels': np.zeros(4, np.int32)}
    for call in (
        lambda: quantization.calibrate(case.network, rule, variables, [batch]),
        lambda: quantization.report(case.network, rule, variables, batch),
        lambda: quantization.quantize_variables(case.network, rule, variables, batch),
        lambda: pruning.channel_groups(case.network, variables, batch),
        lambda: pruning.product_kernels(case.network, variables, batch),
        lambda: pruning.factorize(case.network, variables, batch, energy=0.5, leaves='*'),
    ):
        with pytest.raises(ValueError, match=r"^the network does not take these inputs \(.*\); .* give batch\['inputs'\]"):
            call()


def test_a_network_that_takes_a_dictionary_with_that_name_gets_it() -> None:
    case = CASES['floats']
    network = networks.preprocess(case.network, lambda batch: batch['inputs'])
    sites = quantization.report(network, Rule(ranges='dynamic'), variables_of(case), {'inputs': case.inputs})
    assert len(sites) >= 2
