"""Every name on the command line makes a network that has the features which recipes ask for."""

import jax
import jax.numpy as jnp
import pytest

from experiments.architectures import ARCHITECTURES, network

IMAGES = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)


@pytest.mark.parametrize('name', list(ARCHITECTURES))
def test_logits_and_stages(name):
    made = network(ARCHITECTURES[name], 7)
    variables = jax.eval_shape(lambda: made.init(jax.random.key(0), IMAGES))
    outputs = jax.eval_shape(lambda variables, inputs: made.apply(variables, inputs)[0], variables, IMAGES)
    assert outputs.logits.shape == (2, 7)
    stages = [outputs.features[stage] for stage in ARCHITECTURES[name].stages]
    assert all(stage.shape[0] == 2 for stage in stages)
    areas = [stage.shape[1] * stage.shape[2] for stage in stages if stage.ndim == 4]
    assert areas == sorted(areas, reverse=True)
