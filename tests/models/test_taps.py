"""What every model taps: its stages, each of them before its last ReLU, and the embedding before its head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.architectures import ARCHITECTURES
from kdjax import networks

NAMES = ['cnn_8_16', 'mlp_30', 'resnet8', 'resnet18', 'wrn_16_2', 'vgg8', 'mobilenet_v2', 'shufflenet', 'shufflenet_v2']
NAMES += ['squeezenet']


@pytest.mark.parametrize('name', NAMES)
def test_every_model_taps_stages_preacts_and_the_embedding(name):
    architecture = ARCHITECTURES[name]
    preacts = [f'{stage}/preact' for stage in architecture.stages] if architecture.preacts else []
    network = networks.from_linen(architecture.make(5), features=(*architecture.stages, 'pooled', *preacts))
    inputs = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))

    @jax.jit
    def run(inputs):
        variables = network.init(jax.random.key(0), inputs)
        bare = networks.from_linen(architecture.make(5))
        return network.apply(variables, inputs)[0], bare.apply(variables, inputs)[0].logits, variables

    outputs, logits, variables = run(inputs)
    taps = outputs.features
    # What is tapped changes nothing.
    np.testing.assert_array_equal(outputs.logits, logits)
    assert set(variables) <= {'params', 'batch_stats'}
    # The head is all that is left after the embedding; SqueezeNet's has a ReLU before the mean.
    assert taps['pooled'].shape[0] == 2
    assert taps['pooled'].ndim == 2
    if name != 'squeezenet':
        head = variables['params']['head']
        np.testing.assert_allclose(taps['pooled'] @ head['kernel'] + head['bias'][None], logits, rtol=1e-5, atol=1e-5)
    for stage, preact in zip(architecture.stages, preacts, strict=bool(preacts)):
        after, before = taps[stage], taps[preact]
        if name in ('wrn_16_2', 'mobilenet_v2'):
            np.testing.assert_array_equal(before, after)
            continue
        assert jnp.min(before) < 0
        if before.shape == after.shape and name != 'shufflenet_v2':
            np.testing.assert_array_equal(jnp.maximum(before, 0), after)
        elif name == 'shufflenet_v2':
            # Half of the channels come from the units before the last, where their ReLU has been.
            np.testing.assert_allclose(jnp.maximum(before, 0), after, rtol=1e-6)
            assert jnp.mean(jnp.min(before, axis=(0, 1, 2)) < 0) <= 0.5
        else:
            pooled = jnp.maximum(before, 0).reshape(2, after.shape[1], 2, after.shape[2], 2, -1).max((2, 4))
            np.testing.assert_array_equal(pooled, after)
