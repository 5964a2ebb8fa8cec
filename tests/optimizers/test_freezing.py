"""Frozen layers: they and their state stay bit for bit, and the others are trained as if they were alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.framework_checks import Make, assert_bitwise_equal, both, copied, inputs

from kdjax import objectives, optimizers, pruning, training
from kdjax.paths import leaves_with_paths


@both
def test_what_is_frozen_stays_bit_for_bit_with_its_statistics_and_the_rest_is_trained(make: Make):
    network = make('blocks/0')
    optimizer = optimizers.train_only(optax.adamw(1e-2, weight_decay=0.1), ['blocks/1/*', 'head/*'])
    problem = training.distillation(network, None, objectives.hard_labels(), optimizer)
    batch = {'inputs': inputs(), 'labels': jnp.arange(4) % 3}
    state = problem.init(jax.random.key(1), batch)
    evaluate = jax.jit(lambda variables: network.apply(variables, batch['inputs'])[0].features['blocks/0'])
    before, features = copied(state.variables), copied(evaluate(state.variables))
    for _ in range(2):
        state, _ = problem.step(state, {}, batch)
    old, new = leaves_with_paths(before), leaves_with_paths(copied(state.variables))
    changed = {path for path in new if (old[path] != new[path]).any()}
    # All but a bias before a batch norm, whose gradient is zero or nearly so.
    assert changed | {'params/blocks/1/conv/bias'} == {path for path in new if '/blocks/0/' not in path}
    assert_bitwise_equal(copied(evaluate(state.variables)), features)


def test_the_optimizer_neither_sees_nor_remembers_what_is_frozen():
    params = {'hidden': jnp.arange(4.0), 'head': jnp.array([1.0, 2.0])}
    gradients = {'hidden': jnp.full(4, 100.0), 'head': jnp.array([3.0, -4.0])}
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1, weight_decay=0.3))
    optimizer = optimizers.train_only(inner, lambda path, leaf: path == 'head')
    with jax.numpy_dtype_promotion('standard'):
        state, own_state = optimizer.init(params), inner.init({'head': params['head']})
        for _ in range(3):
            updates, state = optimizer.update(gradients, state, params)
            own, own_state = inner.update({'head': gradients['head']}, own_state, {'head': params['head']})
            np.testing.assert_array_equal(updates['head'], own['head'])
            np.testing.assert_array_equal(updates['hidden'], 0.0)
    assert sum(leaf.size for leaf in jax.tree.leaves(state.inner)) == sum(leaf.size for leaf in jax.tree.leaves(own_state))


def test_rules_that_pick_nothing_are_refused():
    with pytest.raises(ValueError, match=r"the pattern 'haed/\*' matches no path; there are: head"):
        optimizers.train_only(optax.sgd(0.1), 'haed/*').init({'head': jnp.ones(2)})


def nested(layers: dict[str, float]) -> dict:
    tree: dict = {}
    for path, value in layers.items():
        node = tree
        for name in path.split('/')[:-1]:
            node = node.setdefault(name, {})
        node[path.rpartition('/')[2]] = jnp.full(2, value)
    return tree


PARAMS = nested(
    dict.fromkeys(['backbone/conv/kernel', 'backbone/norm/scale', 'neck/norm/scale', 'neck/norm/bias', 'head/kernel'], 1.0)
)
# Norms with parameters of their own; with none, whose layer is that around it; and state that is of no layer.
FROZEN = ['batch_stats/backbone/norm/mean', 'batch_stats/backbone/bare/mean', 'cache/backbone/conv/kernel/range']
ALIVE = ['batch_stats/neck/norm/mean', 'batch_stats/neck/bare/mean', 'batch_stats/bare/mean', 'quantization/ranges/head/kernel']
ALIVE += ['quantization/steps']
TRAINED = optimizers.train_only(optax.adam(0.1), ['neck/norm/bias', 'head/*'])
SIDES = {
    'head': optimizers.train_only(optax.adam(0.1), 'head/*'),
    'rest': optimizers.train_only(optax.sgd(0.1), 'neck/norm/bias'),
}
WRAPPED = {
    'alone': TRAINED,
    'in a chain': optax.chain(optax.clip(1.0), TRAINED, optax.scale(0.5)),
    'in wrappers': optimizers.average_parameters(optax.apply_if_finite(optax.MultiSteps(pruning.prune(TRAINED, 0.5), 2), 3)),
    'side by side': optax.partition(SIDES, {'backbone': 'rest', 'neck': 'rest', 'head': 'head'}),
    'one in another': optimizers.train_only(optimizers.train_only(optax.sgd(0.1), '*/bias'), ['neck/*', 'head/*']),
}


@pytest.mark.parametrize('name', [*WRAPPED, 'none'])
def test_state_is_kept_where_all_parameters_of_the_nearest_layer_are_frozen(name: str):
    params = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), PARAMS)
    opt_state = WRAPPED.get(name, optax.adam(0.1)).init(params)
    old, new = nested(dict.fromkeys(FROZEN + ALIVE, 0.0)), nested(dict.fromkeys(FROZEN + ALIVE, 1.0))
    kept = leaves_with_paths(jax.jit(optimizers.keep_frozen_state)(opt_state, old, new))
    assert {path for path, leaf in kept.items() if (leaf == 0.0).all()} == (set() if name == 'none' else set(FROZEN))
    assert {path for path, leaf in kept.items() if (leaf == 1.0).all()} == set(ALIVE if name != 'none' else FROZEN + ALIVE)
