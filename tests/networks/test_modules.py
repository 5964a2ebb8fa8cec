"""Modules that are unlike the usual one: called twice, sowing, with other switches, existing already, or returning more."""

import functools
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.framework_checks import (
    NnxBlock,
    NnxNet,
    assert_bitwise_equal,
    copied,
    inputs,
    nnx_net,
    trained,
)

from kdjax import networks
from kdjax.networks import Network, Outputs


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


# What an NNX module may hold.


class Count(nnx.Variable):
    """A kind of state that Flax has no name for."""


class Frozen(nnx.Param):
    """A kind of parameter of one's own."""


class LinenKinds(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        calls = self.variable('Count', 'calls', jnp.zeros, (), jnp.int32)
        table = self.variable('arrays', 'table', lambda: jnp.arange(1.0, 4.0)[None])
        if train and not self.is_initializing():
            calls.value += 1
            table.value *= 2
        shift = self.param('shift', nn.initializers.ones, (1, 3))
        return nn.Dense(3, name='head')(x) * table.value + shift


class NnxKinds(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.head = nnx.Linear(4, 3, rngs=rngs)
        self.calls, self.shift = Count(jnp.zeros((), jnp.int32)), Frozen(nnx.initializers.ones(rngs.params(), (1, 3)))
        self.table = jnp.arange(1.0, 4.0)[None]

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        if train:
            self.calls[...] += 1
            self.table = self.table * 2
        return self.head(x) * self.table + self.shift


@pytest.mark.parametrize('existing', [False, True])
@pytest.mark.parametrize('jit', [False, True])
def test_variables_of_own_kinds_and_arrays_are_state_as_in_linen(existing: bool, jit: bool, key: jax.Array) -> None:
    linen, ours = networks.from_linen(LinenKinds()), networks.from_nnx(NnxKinds(rngs=nnx.Rngs(0)) if existing else NnxKinds)
    x = jax.random.normal(key, (2, 4))
    wrap = jax.jit if jit else lambda function: function
    variables = wrap(ours.init)(key, x)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, linen.init(key, x))
    for train in (False, True):
        wanted = linen.apply(variables, x, train=train)
        got = wrap(functools.partial(ours.apply, train=train))(variables, x)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, wanted)
        assert int(got[1]['Count']['calls']) == train
    gradient = jax.grad(lambda params: jnp.sum(ours.apply({**variables, 'params': params}, x)[0].logits))(variables['params'])
    np.testing.assert_allclose(gradient['shift'], 2.0)


class NnxData(nnx.Module):
    """Arrays wrapped as data, of numpy too, and numbers; a random key; variables that are trees or empty."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.scales = nnx.data([jnp.full(3, 2.0), jnp.full(3, 0.5)])
        self.number, self.table, self.key = nnx.data(3), np.ones(3, np.float32), rngs.params()
        self.affine, self.empty = nnx.Param({'w': jnp.ones((4, 3)), 'b': jnp.ones(3)}), Count(None)

    def __call__(self, x: jax.Array) -> jax.Array:
        noise = jax.random.normal(self.key, (3,))
        x = (x @ self.affine['w'] + self.affine['b'][None]) * (self.scales[0] * self.scales[1] * self.table + noise)[None]
        return x * self.number.astype(x.dtype)


@pytest.mark.parametrize('existing', [False, True])
def test_whatever_nnx_calls_data_is_an_array_of_the_state(existing: bool, key: jax.Array) -> None:
    network = networks.from_nnx(NnxData(rngs=nnx.Rngs(0)) if existing else NnxData)
    x = jax.random.normal(key, (2, 4))
    variables = network.init(key, x)
    assert sorted(variables['arrays']) == ['key', 'number', 'scales', 'table']
    assert variables['params']['affine']['w'].shape == (4, 3)
    noise = jax.random.normal(variables['arrays']['key'], (3,))
    wanted = 3 * (x.sum(-1, keepdims=True) + 1) * (1 + noise)[None]
    outputs, state = jax.jit(functools.partial(network.apply, train=True))(variables, x)
    np.testing.assert_allclose(outputs.logits, wanted, rtol=1e-5, atol=1e-6)
    assert jax.tree.structure(state) == jax.tree.structure({name: variables[name] for name in ('Count', 'arrays')})


def test_what_an_nnx_module_has_sown_before_is_no_state(key: jax.Array) -> None:
    module = NnxSower(rngs=nnx.Rngs(0))
    x = jax.random.normal(key, (5, 4))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # Flax deprecates to sow outside of a capture
        module(jnp.ones((1, 4)))
    before = len(jax.tree.leaves(nnx.state(module, nnx.Intermediate)))
    network = networks.from_nnx(module, features='mean')
    variables = network.init(key, x)
    assert sorted(variables) == ['params']
    outputs, state = jax.jit(network.apply)(variables, x)
    np.testing.assert_allclose(outputs.features['mean'], module.body(x).mean(-1), rtol=1e-5)
    assert state == {}
    assert before == len(jax.tree.leaves(nnx.state(module, nnx.Intermediate))) == 1


class NnxBare(nnx.Pytree):
    """What is no nnx.Module, so has no train() and eval(), around one that is; it draws from a stream that it is given."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.net, self.drop = nnx.Linear(4, 20, rngs=rngs), nnx.Dropout(0.5)

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        return self.drop(self.net(x), rngs=rngs)


def test_nnx_modules_without_train_and_eval_and_with_streams_as_an_argument(key: jax.Array) -> None:
    network = networks.from_nnx(NnxBare)
    x = jax.random.normal(key, (2, 4))
    variables = network.init(key, x)
    assert not np.any(network.apply(variables, x)[0].logits == 0)
    one, other = (network.apply(variables, x, train=True, rng=rng)[0].logits == 0 for rng in jax.random.split(key))
    assert one.any()
    assert not np.array_equal(one, other)
