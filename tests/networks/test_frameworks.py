"""One suite for both frameworks: what `from_linen` and `from_nnx` make must be told apart by nothing."""

import functools
import itertools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kdjax import networks, paths
from kdjax.networks import Network, Outputs

CHANNELS = (3, 3, 3)
CLASSES = 5
SHAPE = (4, 4, 4, 3)
# Both blocks have the same shapes, which saves compiling; values tell them apart.
SHAPES = {
    'params/head/kernel': (3, 5),
    'params/head/bias': (5,),
}
for block in '01':
    SHAPES |= {
        f'params/blocks/{block}/conv/kernel': (3, 3, 3, 3),
        f'params/blocks/{block}/conv/bias': (3,),
        f'params/blocks/{block}/norm/scale': (3,),
        f'params/blocks/{block}/norm/bias': (3,),
        f'batch_stats/blocks/{block}/norm/mean': (3,),
        f'batch_stats/blocks/{block}/norm/var': (3,),
    }


class LinenBlock(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Conv(self.width, (3, 3), name='conv')(x)
        return nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name='norm')(x))


class LinenBlocks(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for i, width in enumerate(CHANNELS[1:]):
            x = LinenBlock(width, name=str(i))(x, train)
        return x


class LinenPool(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x.mean((1, 2))


class LinenNet(nn.Module):
    dropout: float = 0.5

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = LinenPool(name='pool')(LinenBlocks(name='blocks')(x, train))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(CLASSES, name='head')(x)


class NnxBlock(nnx.Module):
    def __init__(self, incoming: int, width: int, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(incoming, width, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.relu(self.norm(self.conv(x)))


class NnxPool(nnx.Module):
    def __call__(self, x: jax.Array) -> jax.Array:
        return x.mean((1, 2))


class NnxNet(nnx.Module):
    def __init__(self, dropout: float = 0.5, *, rngs: nnx.Rngs):
        self.blocks = nnx.List([NnxBlock(*widths, rngs=rngs) for widths in itertools.pairwise(CHANNELS)])
        self.pool = NnxPool()
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.head = nnx.Linear(CHANNELS[-1], CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        return self.head(self.dropout(self.pool(x)))


def linen_net(features: str | tuple[str, ...] = (), dropout: float = 0.5) -> Network:
    return networks.from_linen(LinenNet(dropout), features=features)


def nnx_net(features: str | tuple[str, ...] = (), dropout: float = 0.5) -> Network:
    return networks.from_nnx(functools.partial(NnxNet, dropout), features=features)


both = pytest.mark.parametrize('make', [pytest.param(linen_net, id='linen'), pytest.param(nnx_net, id='nnx')])
Make = Callable[..., Network]


@functools.cache
def inputs() -> jax.Array:
    return jax.random.normal(jax.random.key(17), SHAPE)


@functools.cache
def trained(make: Make) -> dict:
    """Variables in which no bias and no statistic is what it starts as, so that none can be mixed up unnoticed."""
    variables = make().init(jax.random.key(5), inputs())
    leaves, structure = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(6), len(leaves))
    return structure.unflatten(
        [leaf + jax.random.uniform(key, leaf.shape, leaf.dtype, -0.4, 0.4) for key, leaf in zip(keys, leaves, strict=True)]
    )


def copied(tree: dict) -> dict:
    return jax.tree.map(np.array, tree)


def assert_bitwise_equal(got: object, wanted: object) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def assert_close(got: object, wanted: object, tolerance: float = 1e-5) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, wanted)


def assert_only_dictionaries_of_arrays(tree: object, kind: type = jax.Array) -> None:
    if isinstance(tree, dict):
        for name, node in tree.items():
            assert type(name) is str
            assert_only_dictionaries_of_arrays(node, kind)
    else:
        assert isinstance(tree, kind)


def convolution_by_hand(x: np.ndarray, params: dict) -> np.ndarray:
    kernel, bias = (np.asarray(params['conv'][name], np.float64) for name in ('kernel', 'bias'))
    height, width = x.shape[1:3]
    padded = np.pad(np.asarray(x, np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [(i, j, padded[:, i : i + height, j : j + width]) for i in range(3) for j in range(3)]
    return sum(patch @ kernel[i, j] for i, j, patch in shifted) + bias


def block_by_hand(x: np.ndarray, params: dict, stats: dict) -> np.ndarray:
    y = convolution_by_hand(x, params)
    mean, var = (np.asarray(stats['norm'][name], np.float64) for name in ('mean', 'var'))
    scale, bias = (np.asarray(params['norm'][name], np.float64) for name in ('scale', 'bias'))
    return np.maximum((y - mean) / np.sqrt(var + 1e-5) * scale + bias, 0)


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


class LinenTwice(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = nn.Dense(2, name='dense')
        return dense(dense(x))


class NnxTwice(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.dense = nnx.Linear(2, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dense(self.dense(x))


@pytest.mark.parametrize(
    'network', [networks.from_linen(LinenTwice(), features='dense'), networks.from_nnx(NnxTwice, features='dense')]
)
def test_of_a_module_that_is_called_twice_the_last_output_is_the_feature(network: Network, key: jax.Array) -> None:
    outputs, _ = network.apply(network.init(key, jnp.ones((3, 2))), jax.random.normal(key, (3, 2)))
    assert_bitwise_equal(outputs.features['dense'], outputs.logits)


class LinenSower(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(3, name='body')(x)
        self.sow('intermediates', 'mean', x.mean(-1))
        return nn.Dense(2, name='head')(x)


class NnxSower(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.body, self.head = nnx.Linear(4, 3, rngs=rngs), nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.body(x)
        self.sow(nnx.Intermediate, 'mean', x.mean(-1))
        return self.head(x)


def sower(framework: str, features: tuple[str, ...]) -> Network:
    if framework == 'linen':
        return networks.from_linen(LinenSower(), features=features)
    return networks.from_nnx(NnxSower, features=features)


@pytest.mark.parametrize('framework', ['linen', 'nnx'])
def test_sown_names_are_features(framework: str, key: jax.Array) -> None:
    network = sower(framework, ('body', 'mean'))
    x = jax.random.normal(key, (5, 4))
    variables = network.init(key, x)
    assert sorted(variables) == ['params']
    outputs, state = network.apply(variables, x, train=True)
    assert state == {}
    np.testing.assert_allclose(outputs.features['mean'], outputs.features['body'].mean(-1), rtol=1e-6)


@pytest.mark.parametrize(
    'framework',
    [
        'linen',
        'nnx',
    ],
)
def test_what_is_sown_and_not_wanted_is_dropped(framework: str, key: jax.Array) -> None:
    network = sower(framework, ())
    outputs, state = network.apply(network.init(key, jnp.ones((1, 4))), jnp.ones((1, 4)))
    assert outputs.features == state == {}


# Other modules.


@pytest.mark.parametrize(
    'network', [networks.from_linen(nn.Dense(3)), networks.from_nnx(functools.partial(nnx.Linear, 4, 3))], ids=['linen', 'nnx']
)
def test_module_without_a_train_argument(network: Network, key: jax.Array) -> None:
    x = jax.random.normal(key, (2, 4))
    variables = network.init(key, x)
    assert sorted(variables) == ['params']
    wanted = np.asarray(x, np.float64) @ np.asarray(variables['params']['kernel']) + np.asarray(variables['params']['bias'])
    for train in (False, True):
        outputs, state = network.apply(variables, x, train=train)
        assert state == {}
        np.testing.assert_allclose(outputs.logits, wanted, rtol=1e-5, atol=1e-6)


class LinenDeterministic(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        return nn.Dropout(0.5, deterministic=deterministic)(nn.Dense(20)(x))


class LinenTraining(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, *, training: bool) -> jax.Array:
        return nn.Dropout(0.5, deterministic=not training)(nn.Dense(20)(x))


class LinenIsTraining(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, is_training: bool) -> jax.Array:
        return nn.Dropout(0.5, deterministic=not is_training)(nn.Dense(20)(x))


@pytest.mark.parametrize('module', [LinenDeterministic(), LinenTraining(), LinenIsTraining()], ids=lambda m: type(m).__name__)
def test_switch_by_another_name(module: nn.Module, key: jax.Array) -> None:
    network = networks.from_linen(module)
    x = jax.random.normal(key, (2, 4))
    variables = network.init(key, x)
    assert not np.any(network.apply(variables, x)[0].logits == 0)
    assert np.any(network.apply(variables, x, train=True, rng=key)[0].logits == 0)


def test_linen_draws_every_random_stream_from_rng(key: jax.Array) -> None:
    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, train: bool) -> jax.Array:
            x = nn.Dense(3)(x)
            return x + jax.random.normal(self.make_rng('noise'), x.shape) if train else x

    network = networks.from_linen(Noisy())
    variables = network.init(key, jnp.ones((2, 4)))
    one, other = (network.apply(variables, jnp.ones((2, 4)), train=True, rng=rng)[0].logits for rng in jax.random.split(key))
    assert not np.any(one == other)


def test_existing_nnx_module_is_taken_with_its_variables(key: jax.Array) -> None:
    module = NnxNet(rngs=nnx.Rngs(3))
    before = copied(nnx.to_pure_dict(nnx.state(module, (nnx.Param, nnx.BatchStat))))
    network = networks.from_nnx(module, features='blocks/1')
    variables = network.init(key, inputs())
    assert_bitwise_equal(variables, network.init(jax.random.fold_in(key, 1), inputs()))
    np.testing.assert_array_equal(variables['params']['head']['kernel'], module.head.kernel[...])
    np.testing.assert_array_equal(variables['batch_stats']['blocks']['1']['norm']['var'], module.blocks[1].norm.var[...])
    outputs, _ = network.apply(variables, inputs())
    network.apply(variables, inputs(), train=True, rng=key)
    # The module is a template: what apply does never reaches it.
    assert_bitwise_equal(copied(nnx.to_pure_dict(nnx.state(module, (nnx.Param, nnx.BatchStat)))), before)
    module.eval()
    np.testing.assert_allclose(outputs.logits, module(inputs()), rtol=1e-6, atol=1e-6)


def test_variables_of_an_existing_nnx_module_may_be_donated(key: jax.Array) -> None:
    """As the training step does with those of the student; the module, and a second run from it, must outlive that."""
    network = networks.from_nnx(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    donate = jax.jit(lambda variables: jax.tree.map(lambda leaf: leaf + 1, variables), donate_argnums=0)
    first = donate(network.init(key, jnp.ones((1, 2))))
    second = donate(network.init(key, jnp.ones((1, 2))))
    assert_bitwise_equal(first, second)


class LinenOutputs(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> Outputs:
        hidden = nn.Dense(4, name='body')(x)
        return Outputs(nn.Dense(2, name='head')(hidden), {'doubled': hidden * 2})


class NnxOutputs(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.body, self.head = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> Outputs:
        hidden = self.body(x)
        return Outputs(self.head(hidden), {'doubled': hidden * 2})


@pytest.mark.parametrize(
    'network', [networks.from_linen(LinenOutputs(), features='body'), networks.from_nnx(NnxOutputs, features='body')]
)
def test_module_that_returns_outputs_keeps_its_own_features(network: Network, key: jax.Array) -> None:
    x = jax.random.normal(key, (5, 3))
    outputs, _ = jax.jit(network.apply)(network.init(key, x), x)
    assert sorted(outputs.features) == ['body', 'doubled']
    assert outputs.logits.shape == (5, 2)
    np.testing.assert_allclose(outputs.features['doubled'], 2 * outputs.features['body'], rtol=1e-6)


class LinenTuple(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return nn.Dense(2)(x), x


class NnxTuple(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.head = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.head(x), x


@pytest.mark.parametrize(
    'network', [networks.from_linen(LinenTuple()), networks.from_nnx(NnxTuple)], ids=['LinenTuple', 'NnxTuple']
)
def test_module_that_returns_a_tuple_is_an_error_that_names_it(network: Network, request: pytest.FixtureRequest) -> None:
    variables = network.init(jax.random.key(0), jnp.ones((1, 3)))
    with pytest.raises(
        ValueError, match=f'^{request.node.callspec.id} must return logits or kdjax.networks.Outputs, got tuple$'
    ):
        network.apply(variables, jnp.ones((1, 3)))


def test_nnx_dropout_without_rng_is_an_error_in_training_only() -> None:
    with pytest.raises(ValueError, match='draws random numbers in training: pass rng='):
        nnx_net().apply(trained(nnx_net), inputs(), train=True)
    nnx_net().apply(trained(nnx_net), inputs())


def test_nnx_module_without_dropout_needs_no_rng(key: jax.Array) -> None:
    network = networks.from_nnx(functools.partial(NnxBlock, 3, 2))
    network.apply(network.init(key, inputs()), inputs(), train=True)
