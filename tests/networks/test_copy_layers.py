"""Layers that are copied between variables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.toy_problem import SmallNetwork

from kdjax import networks, objectives
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


def variables_of(*blocks, value=0.0):
    """Blocks with a norm that has statistics, and a head."""
    block = lambda i: {'dense': {'kernel': np.full((3, 3), value + i)}, 'norm': {'scale': np.full(3, value + i)}}  # noqa: E731
    params = {name: block(i) for i, name in enumerate(blocks)} | {'head': {'kernel': np.full((3, 2), value)}}
    return {'params': params, 'batch_stats': {name: {'norm': {'mean': np.full(3, value + i)}} for i, name in enumerate(blocks)}}


def test_a_mapping_takes_layers_of_other_names_with_their_statistics():
    teacher, student = variables_of('block0', 'block1', 'block10', 'block3', value=10.0), variables_of('block0', 'block1')
    copied = networks.copy_layers(teacher, student, {'block0': 'block3', 'block1': 'block1', 'head/kernel': 'head/kernel'})
    assert {path: float(leaf.flat[0]) for path, leaf in leaves_with_paths(copied).items()} == {
        'params/block0/dense/kernel': 13,
        'params/block0/norm/scale': 13,
        'params/block1/dense/kernel': 11,  # and nothing of block10
        'params/block1/norm/scale': 11,
        'params/head/kernel': 10,
        'batch_stats/block0/norm/mean': 13,
        'batch_stats/block1/norm/mean': 11,
    }
    assert float(student['params']['block0']['norm']['scale'][0]) == 0
    # One teacher layer may begin several of the student's; what the target has no collection of does not come.
    twice = networks.copy_layers(teacher, {'params': student['params']}, {'block0': 'block3', 'block1': 'block3'})
    assert list(twice) == ['params']
    np.testing.assert_array_equal(twice['params']['block1']['norm']['scale'], np.full(3, 13.0))
    # As `objectives.uniform_layers` maps them.
    uniform = objectives.uniform_layers(['block0', 'block1'], ['block0', 'block1', 'block10', 'block3'])
    np.testing.assert_array_equal(
        networks.copy_layers(teacher, student, uniform)['batch_stats']['block0']['norm']['mean'], np.full(3, 11.0)
    )


def test_mappings_that_do_not_fit_are_refused():
    teacher, student = variables_of('block0', 'block1'), variables_of('block0')
    with pytest.raises(ValueError, match=r"^copy_layers: the target has no layer 'block1'; it has block0, head$"):
        networks.copy_layers(teacher, student, {'block1': 'block0'})
    with pytest.raises(ValueError, match=r"^copy_layers: the source has no layer 'block'; it has block0, block1, head$"):
        networks.copy_layers(teacher, student, {'block0': 'block'})
    with pytest.raises(ValueError, match=r"^copy_layers: 'block0/norm' lies in 'block0'; name it once$"):
        networks.copy_layers(teacher, student, {'block0': 'block0', 'block0/norm': 'block1/norm'})
    with pytest.raises(ValueError, match=r"^copy_layers: the target's params/block0/dense/kernel has no counterpart .*'head'"):
        networks.copy_layers(teacher, student, {'block0': 'head'})
    with pytest.raises(ValueError, match=r'^copy_layers: params/head/norm/scale \(3,\) does not fit .* has no such array'):
        networks.copy_layers(
            {'params': {'block0': {'norm': {'scale': np.ones(3)}, 'kernel': np.ones((3, 2))}}}, student, {'head': 'block0'}
        )
    teacher['params']['block1']['dense']['kernel'] = np.ones((4, 3))
    with pytest.raises(
        ValueError, match=r'^copy_layers: params/block0/dense/kernel \(4, 3\) does not fit .* has \(3, 3\) there'
    ):
        networks.copy_layers(teacher, student, {'block0': 'block1'})
