"""One suite for both frameworks: what `from_linen` and `from_nnx` make must be told apart by nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.framework_checks import (
    CHANNELS,
    CLASSES,
    SHAPE,
    SHAPES,
    Make,
    assert_bitwise_equal,
    assert_close,
    assert_only_dictionaries_of_arrays,
    block_by_hand,
    both,
    convolution_by_hand,
    copied,
    inputs,
    linen_net,
    nnx_net,
    trained,
)

from kdjax import paths

# Variables.


@both
def test_init_gives_params_and_batch_stats_named_by_one_rule(make: Make, key: jax.Array) -> None:
    variables = make().init(key, inputs())
    assert sorted(variables) == ['batch_stats', 'params']
    assert_only_dictionaries_of_arrays(variables)
    assert {path: leaf.shape for path, leaf in paths.leaves_with_paths(variables).items()} == SHAPES
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype('float32')}


@both
def test_init_is_deterministic_per_key_and_needs_shapes_only(make: Make, key: jax.Array) -> None:
    network = make()
    variables = network.init(key, inputs())
    assert_bitwise_equal(network.init(key, inputs()), variables)
    for shaped in (jax.ShapeDtypeStruct(SHAPE, jnp.float32), jnp.full(SHAPE, jnp.nan)):
        assert_bitwise_equal(network.init(key, shaped), variables)
    other = network.init(jax.random.fold_in(key, 1), inputs())
    for name in ('blocks/0/conv/kernel', 'blocks/1/conv/kernel', 'head/kernel'):
        a, b = (paths.leaves_with_paths(tree['params'])[name] for tree in (variables, other))
        assert not np.any(np.asarray(a) == np.asarray(b)), name


@both
def test_init_under_jit_and_vmap_gives_a_tree_that_checkpoints_take(make: Make, key: jax.Array) -> None:
    """Traced, that is; what is stacked has one more axis, and names are strings still."""
    network = make()
    init = jax.jit(jax.vmap(lambda key: network.init(key, jax.ShapeDtypeStruct(SHAPE, jnp.float32))))
    stacked = jax.eval_shape(init, jax.random.split(key, 2))
    assert_only_dictionaries_of_arrays(stacked, jax.ShapeDtypeStruct)
    assert {path: leaf.shape for path, leaf in paths.leaves_with_paths(stacked).items()} == {
        path: (2, *shape) for path, shape in SHAPES.items()
    }


# The forward pass.


@both
def test_apply_leaves_its_arguments_alone(make: Make, key: jax.Array) -> None:
    variables, x = jax.tree.map(jnp.array, trained(make)), jnp.array(inputs())
    before = copied(variables), np.array(x)
    structure = jax.tree.structure(variables)
    for train in (False, True):
        make('blocks/1').apply(variables, x, train=train, rng=key)
    assert jax.tree.structure(variables) == structure
    assert_bitwise_equal((variables, x), before)


@both
@pytest.mark.parametrize('train', [False, True])
def test_jit_equals_eager(make: Make, train: bool, key: jax.Array) -> None:
    network = make(('blocks/0', 'head'))
    eager = network.apply(trained(make), inputs(), train=train, rng=key)
    jitted = jax.jit(functools.partial(network.apply, train=train))(trained(make), inputs(), rng=key)
    assert jax.tree.structure(jitted) == jax.tree.structure(eager)
    assert_close(jitted, eager, 1e-6)


@both
def test_vmap_over_stacked_variables_equals_one_after_the_other(make: Make, key: jax.Array) -> None:
    network = make('blocks/1')
    trees = [trained(make), network.init(key, inputs())]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    got = jax.jit(jax.vmap(network.apply, in_axes=(0, None)))(stacked, inputs())
    for i, tree in enumerate(trees):
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], got), network.apply(tree, inputs()))


@functools.cache
def loss_and_gradient(make: Make) -> tuple[jax.Array, dict]:
    """Of a network in training, at the variables of the Linen one."""
    network = make(dropout=0.0)
    variables = trained(linen_net)

    def loss(params: dict) -> jax.Array:
        outputs, _ = network.apply({**variables, 'params': params}, inputs(), train=True, rng=jax.random.key(0))
        return jnp.sum(jnp.sin(outputs.logits))

    return jax.jit(jax.value_and_grad(loss))(variables['params'])


@both
def test_gradient_is_that_of_finite_differences(make: Make) -> None:
    network = make()
    variables = trained(make)
    weights = jnp.arange(1.0, 6.0)

    def loss(bias: jax.Array) -> jax.Array:
        params = {**variables['params'], 'head': {**variables['params']['head'], 'bias': bias}}
        logits = network.apply({**variables, 'params': params}, inputs())[0].logits
        return jnp.sum(logits * weights[None])

    # Each bias is added to its logit once per example.
    np.testing.assert_allclose(jax.grad(loss)(variables['params']['head']['bias']), SHAPE[0] * weights, rtol=1e-6)
    direction = jax.tree.map(lambda g: g / 10, loss_and_gradient(make)[1])
    slope = sum(jnp.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (loss_and_gradient(make)[1], direction)), strict=True))
    step, start = 1e-2, trained(linen_net)

    def moved(sign: float) -> jax.Array:
        params = jax.tree.map(lambda p, d: p + sign * step * d, start['params'], direction)
        outputs, _ = make(dropout=0.0).apply({**start, 'params': params}, inputs(), train=True, rng=jax.random.key(0))
        return jnp.sum(jnp.sin(outputs.logits))

    np.testing.assert_allclose((moved(1.0) - moved(-1.0)) / (2 * step), slope, rtol=1e-2)


def test_frameworks_agree_with_the_same_variables() -> None:
    """Variables go from one to the other without renaming, and logits, features, statistics and gradients are the same."""
    variables = trained(linen_net)
    taps = ('blocks/0', 'blocks/1', 'head', 'pool', 'blocks/0/conv', 'blocks/0/norm')
    ours, theirs = (make(taps).apply(variables, inputs()) for make in (linen_net, nnx_net))
    assert sorted(ours[0].features) == sorted(theirs[0].features) == sorted(taps)
    assert_close(theirs, ours, 1e-5)
    # The trained statistics of one are those of the other.
    in_training = [
        make(dropout=0.0).apply(variables, inputs(), train=True, rng=jax.random.key(0)) for make in (linen_net, nnx_net)
    ]
    assert_close(*in_training, 1e-5)
    assert_close(loss_and_gradient(nnx_net), loss_and_gradient(linen_net), 1e-4)


# Training and evaluation.


@both
def test_training_moves_batch_statistics_by_the_batch(make: Make, key: jax.Array) -> None:
    variables = trained(make)
    outputs, state = make().apply(variables, inputs(), train=True, rng=key)
    assert list(state) == ['batch_stats']
    assert jax.tree.structure(state['batch_stats']) == jax.tree.structure(variables['batch_stats'])
    y = convolution_by_hand(inputs(), variables['params']['blocks']['0'])
    old = variables['batch_stats']['blocks']['0']['norm']
    new = state['batch_stats']['blocks']['0']['norm']
    np.testing.assert_allclose(new['mean'], 0.9 * np.asarray(old['mean']) + 0.1 * y.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(new['var'], 0.9 * np.asarray(old['var']) + 0.1 * y.var((0, 1, 2)), rtol=1e-5)
    assert not np.allclose(outputs.logits, make().apply(variables, inputs())[0].logits)


@both
def test_dropout_in_training_is_a_function_of_rng(make: Make, key: jax.Array) -> None:
    network, variables = make(), trained(make)
    one, again, other = (
        network.apply(variables, inputs(), train=True, rng=rng)[0].logits for rng in (key, key, jax.random.fold_in(key, 1))
    )
    assert_bitwise_equal(again, one)
    assert not np.array_equal(one, other)


@both
def test_dropout_drops_its_share_and_scales_the_rest(make: Make, key: jax.Array) -> None:
    """With an identity for a head the logits are what dropout leaves of the pooled activations: none of it or twice as much."""
    network = make('pool')
    variables = trained(make)
    head = {'kernel': jnp.eye(CHANNELS[-1], CLASSES), 'bias': jnp.zeros(CLASSES)}
    variables = {**variables, 'params': {**variables['params'], 'head': head}}
    apply = jax.jit(lambda rng: network.apply(variables, inputs(), train=True, rng=rng)[0])
    outputs = [apply(rng) for rng in jax.random.split(key, 30)]
    ratios = np.concatenate([(out.logits[:, : CHANNELS[-1]] / out.features['pool']).ravel() for out in outputs])
    dropped = np.isclose(ratios, 0)
    np.testing.assert_allclose(ratios[~dropped], 2, rtol=1e-5)
    # 360 coins: five standard deviations.
    assert abs(dropped.mean() - 0.5) < 5 * 0.5 / np.sqrt(dropped.size)


@both
def test_evaluation_changes_no_state_and_no_rng_matters(make: Make, key: jax.Array) -> None:
    network, variables = make(), trained(make)
    outputs, state = network.apply(variables, inputs())
    assert_bitwise_equal(state, {'batch_stats': variables['batch_stats']})
    for options in ({'train': False}, {'rng': key}, {'rng': jax.random.fold_in(key, 1), 'train': False}):
        again, state = network.apply(variables, inputs(), **options)
        assert_bitwise_equal(again, outputs)
        assert_bitwise_equal(state, {'batch_stats': variables['batch_stats']})


@both
def test_evaluation_treats_every_example_alone(make: Make) -> None:
    together = make().apply(trained(make), inputs())[0].logits
    alone = jnp.concatenate([make().apply(trained(make), inputs()[i : i + 1])[0].logits for i in range(SHAPE[0])])
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-6)


# Features.


@both
def test_features_are_the_activations_of_the_modules_on_the_path(make: Make) -> None:
    variables = trained(make)
    params, stats = variables['params'], variables['batch_stats']
    taps = ('blocks/0', 'blocks/1', 'blocks/0/conv', 'pool', 'head')
    outputs, _ = make(taps).apply(variables, inputs())
    first = block_by_hand(inputs(), params['blocks']['0'], stats['blocks']['0'])
    second = block_by_hand(first, params['blocks']['1'], stats['blocks']['1'])
    logits = second.mean((1, 2)) @ np.asarray(params['head']['kernel'], np.float64) + np.asarray(params['head']['bias'])
    assert list(outputs.features) == list(taps)
    np.testing.assert_allclose(
        outputs.features['blocks/0/conv'], convolution_by_hand(inputs(), params['blocks']['0']), atol=1e-5
    )
    np.testing.assert_allclose(outputs.features['blocks/0'], first, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(outputs.features['blocks/1'], second, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(outputs.features['pool'], second.mean((1, 2)), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(outputs.logits, logits, rtol=1e-5, atol=1e-5)
    assert_bitwise_equal(outputs.features['head'], outputs.logits)


@both
@pytest.mark.parametrize('train', [False, True])
def test_taps_change_neither_logits_nor_state(make: Make, train: bool, key: jax.Array) -> None:
    plain, state = make().apply(trained(make), inputs(), train=train, rng=key)
    tapped, tapped_state = make(('blocks/1', 'pool')).apply(trained(make), inputs(), train=train, rng=key)
    assert plain.features == {}
    assert_bitwise_equal(tapped.logits, plain.logits)
    assert_bitwise_equal(tapped_state, state)


@both
def test_one_feature_may_be_given_as_a_string(make: Make) -> None:
    assert_bitwise_equal(*(make(taps).apply(trained(make), inputs()) for taps in ('blocks/1', ('blocks/1',))))


@both
@pytest.mark.parametrize('tap', ['blocks/2', 'block/1', 'blocks_1', 'blocks/1/', ''])
def test_misspelt_feature_is_an_error_of_one_line_that_lists_the_paths(make: Make, tap: str) -> None:
    network = make(('blocks/0', tap))
    with pytest.raises(ValueError, match=f'no feature {tap!r}; there are: ') as error:
        jax.eval_shape(network.apply, trained(make), inputs())
    message = str(error.value)
    assert '\n' not in message
    listed = message.split('there are: ')[1].split(', ')
    for path in ('blocks/0', 'blocks/1', 'blocks/0/conv', 'blocks/1/norm', 'head', 'pool'):
        assert path in listed
    assert '' not in listed
    # What is listed can be tapped.
    make(tuple(listed)).apply(trained(make), inputs())
