"""Layers that are copied between variables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.toy_problem import SmallNetwork

from kdjax import networks
from kdjax.paths import leaves_with_paths

NETWORK = networks.from_linen(SmallNetwork(4))
INPUTS = jnp.ones((2, 4, 4, 1))


@pytest.mark.parametrize('layers', ['block/*', ('block/*',), lambda path, leaf: path.startswith('block/')])
def test_chosen_layers_come_with_their_statistics_and_the_rest_stays(layers):
    source, target = (jax.device_get(NETWORK.init(jax.random.key(seed), INPUTS)) for seed in (0, 1))
    source = jax.tree.map(lambda x: x + 1, source)
    before = jax.tree.map(np.copy, target)
    copied = networks.copy_layers(source, target, layers)
    assert jax.tree.structure(copied) == jax.tree.structure(target)
    taken = {path for path, leaf in leaves_with_paths(copied).items() if np.array_equal(leaf, leaves_with_paths(source)[path])}
    kept = {path for path, leaf in leaves_with_paths(copied).items() if np.array_equal(leaf, leaves_with_paths(target)[path])}
    assert taken == {path for path in leaves_with_paths(target) if '/block/' in path}
    assert kept == {'params/head/kernel', 'params/head/bias'}
    assert jax.tree.all(jax.tree.map(np.array_equal, target, before))


def test_layers_that_do_not_fit_are_refused():
    source = NETWORK.init(jax.random.key(0), INPUTS)
    wider = networks.from_linen(SmallNetwork(5)).init(jax.random.key(0), INPUTS)
    with pytest.raises(ValueError, match=r'params/head/kernel \(4, 3\) does not fit .* which has \(5, 3\) there'):
        networks.copy_layers(source, wider, 'head/*')
    with pytest.raises(ValueError, match=r'params/head/bias \(3,\) does not fit .* which has no such array'):
        networks.copy_layers(source, {'params': {'block': wider['params']['block']}}, 'head/*')
    with pytest.raises(ValueError, match=r"the pattern 'haed/\*' matches no path"):
        networks.copy_layers(source, wider, 'haed/*')
