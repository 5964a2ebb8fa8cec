"""How inputs and the training switch meet the arguments of modules, in both frameworks."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.framework_checks import assert_bitwise_equal

from kdjax import networks
from kdjax.networks import Network

IDS = jnp.array([[0, 1, 2], [3, 4, 0]])
TYPES = jnp.array([[0, 0, 1], [1, 0, 1]])


class LinenPair(nn.Module):
    """Two inputs, with the switch between them."""

    @nn.compact
    def __call__(self, ids: jax.Array, train: bool = False, types: jax.Array | None = None, *, scale: Any = None) -> jax.Array:
        x = nn.Embed(5, 4, name='ids')(ids)
        x = x if types is None else x + nn.Embed(2, 4, name='types')(types)
        x = nn.Dropout(0.5, deterministic=not train)(x if scale is None else x * scale)
        return nn.Dense(3, name='head')(x)


class NnxPair(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.ids, self.types = nnx.Embed(5, 4, rngs=rngs), nnx.Embed(2, 4, rngs=rngs)
        self.drop, self.head = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, ids: jax.Array, train: bool = False, types: jax.Array | None = None, *, scale: Any = None) -> jax.Array:
        x = self.ids(ids)
        x = x if types is None else x + self.types(types)
        return self.head(self.drop(x if scale is None else x * scale, deterministic=not train))


@functools.cache
def pair(framework: str) -> Network:
    return networks.from_linen(LinenPair()) if framework == 'linen' else networks.from_nnx(NnxPair)


@functools.cache
def pair_variables() -> dict:
    return pair('linen').init(jax.random.key(0), (IDS, TYPES))


by_framework = pytest.mark.parametrize('framework', ['linen', 'nnx'])
CALLS = {
    'one': (IDS, None, None),
    'tuple': ((IDS, TYPES), TYPES, None),
    'list': ([IDS, TYPES], TYPES, None),
    'by name': ({'types': TYPES, 'ids': IDS}, TYPES, None),
    'one by name': ({'ids': IDS}, None, None),
    'all by name': ({'ids': IDS, 'types': TYPES, 'scale': jnp.float32(2.0)}, TYPES, 2.0),
}


@by_framework
@pytest.mark.parametrize('call', CALLS)
def test_inputs_are_spread_over_the_arguments(framework: str, call: str, key: jax.Array) -> None:
    inputs, types, scale = CALLS[call]
    network, variables = pair(framework), pair_variables()
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), variables['params'])
    x = params['ids']['embedding'][IDS]
    x = x if types is None else x + params['types']['embedding'][types]
    wanted = (x if scale is None else x * scale) @ params['head']['kernel'] + params['head']['bias']
    apply = jax.jit(network.apply, static_argnames='train')
    np.testing.assert_allclose(apply(variables, inputs)[0].logits, wanted, rtol=1e-5, atol=1e-6)
    assert not np.allclose(apply(variables, inputs, train=True, rng=key)[0].logits, wanted)
    shapes = jax.eval_shape(network.init, key, jax.eval_shape(lambda: inputs))
    assert set(shapes['params']) >= {'ids', 'head'}


@by_framework
@pytest.mark.parametrize(
    'inputs, got',
    [
        ((IDS, TYPES, IDS), '3 of them'),
        ((), '0 of them'),
        ({'ids': IDS, 'typos': TYPES}, 'ids, typos'),
        ({'types': TYPES}, 'types'),
    ],
)
def test_inputs_that_do_not_fit_are_an_error_of_one_line(framework: str, inputs: Any, got: str) -> None:
    name = 'LinenPair' if framework == 'linen' else 'NnxPair'
    listed = r'ids, types \(optional\), scale \(optional\), as a tuple or as a dictionary with these names'
    with pytest.raises(ValueError, match=f'^{name} takes the inputs {listed}; got {got}$'):
        pair(framework).apply(pair_variables(), inputs)


class Two(nn.Module):
    @nn.compact
    def __call__(self, a: jax.Array, *, b: jax.Array) -> jax.Array:
        return nn.Dense(2)(a) + b


class Whole(nn.Module):
    """One argument, which is all the inputs."""

    @nn.compact
    def __call__(self, inputs: Any) -> jax.Array:
        leaves = jax.tree.leaves(inputs)
        return nn.Dense(2)(sum(leaves[1:], leaves[0]))


class AnyNumber(nn.Module):
    @nn.compact
    def __call__(self, *inputs: jax.Array) -> jax.Array:
        return Whole()(inputs)


class AnyName(nn.Module):
    @nn.compact
    def __call__(self, **inputs: jax.Array) -> jax.Array:
        return Whole()(inputs)


def test_one_argument_is_the_whole_pytree_and_a_sequence_is_called_as_its_first_layer(key: jax.Array) -> None:
    x = jnp.ones((3, 2))
    for module, inputs in [
        (Whole(), {'a': x, 'b': (x, x)}),
        (Whole(), (x, x)),
        (AnyNumber(), (x, x, x)),
        (AnyNumber(), x),
        (AnyName(), {'a': x, 'b': x}),
        (nn.Sequential([Whole(), nn.Dense(2)]), {'a': x, 'b': x}),
        (nn.Sequential([lambda inputs: inputs['a'], nn.Dense(2)]), {'a': x}),
        (nn.Sequential([Two(), nn.Dense(2)]), {'a': x, 'b': x}),
        (nn.Sequential([nn.gelu, nn.Dense(2)]), x),
    ]:
        network = networks.from_linen(module)
        logits = jax.eval_shape(lambda inputs, n=network: n.apply(n.init(key, inputs), inputs)[0].logits, inputs)
        assert logits.shape == (3, 2), module
    for inputs, got in [(x, 'one'), ((x, x), 'one'), ({'a': x}, 'a')]:
        with pytest.raises(ValueError, match=f'^Two takes the inputs a, b, as a tuple or .* these names; got {got}$'):
            networks.from_linen(Two()).init(key, inputs)


# The switch between training and evaluation.


class LinenRun(nn.Module):
    @nn.compact
    def run(self, x: jax.Array, train: bool) -> jax.Array:
        return nn.Dropout(0.5, deterministic=not train)(nn.Dense(20)(x))


class NnxRun(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.dense, self.drop = nnx.Linear(4, 20, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def run(self, x: jax.Array, train: bool) -> jax.Array:
        return self.drop(self.dense(x), deterministic=not train)


def is_train(self: Any, x: jax.Array, is_train: bool = False) -> jax.Array:
    return self.run(x, is_train)


def evaluation(self: Any, x: jax.Array, *, eval: bool = True) -> jax.Array:
    return self.run(x, not eval)


def inference(self: Any, x: jax.Array, inference) -> jax.Array:
    return self.run(x, not inference)


def camel(self: Any, x: jax.Array, isTraining=False, train=False) -> jax.Array:  # noqa: N803
    return self.run(x, isTraining and train)


def noisy(self: Any, x: jax.Array, noisy=False) -> jax.Array:
    return self.run(x, noisy)


def required(self: Any, x: jax.Array, noisy: bool) -> jax.Array:
    return self.run(x, noisy)


def rated(self: Any, x: jax.Array, train: bool = False, return_hidden: bool = False, eval_points: Any = 3) -> jax.Array:
    return self.run(x, train)


def make(framework: str, call: Callable, train_argument: Any) -> Network:
    if framework == 'linen':
        return networks.from_linen(type('Net', (LinenRun,), {'__call__': call})(), train_argument=train_argument)
    return networks.from_nnx(type('Net', (NnxRun,), {'__call__': call}), train_argument=train_argument)


@by_framework
@pytest.mark.parametrize(
    'call, train_argument',
    [
        (is_train, 'is_train'),
        (evaluation, {'eval': False}),
        (inference, {'inference': False}),
        (camel, ('isTraining',)),
        (noisy, 'noisy'),
        (required, {'noisy': True}),
        (rated, None),
    ],
)
def test_a_switch_of_any_name_is_set(framework: str, call: Callable, train_argument: Any, key: jax.Array) -> None:
    network = make(framework, call, train_argument)
    x = jax.random.normal(key, (2, 4))
    variables = network.init(key, x)
    assert not np.any(network.apply(variables, x)[0].logits == 0)
    assert np.any(network.apply(variables, x, train=True, rng=key)[0].logits == 0)


@by_framework
@pytest.mark.parametrize('call', [is_train, evaluation, inference, camel, noisy, required])
def test_what_may_be_a_switch_and_is_not_known_is_an_error_that_says_how_to_name_it(framework: str, call: Callable) -> None:
    """Never does a network stay in evaluation without a word."""
    name = {is_train: 'is_train', evaluation: 'eval', inference: 'inference', camel: 'isTraining'}.get(call, 'noisy')
    message = (
        f"^from_{framework}: argument '{name}' of Net may be the switch to training: say train_argument='{name}' if it is True "
        f"in training, {{'{name}': False}} if it is False, or \\(\\) if it has nothing to do with it$"
    )
    with pytest.raises(ValueError, match=message):
        make(framework, call, None)
    if call not in (inference, required):
        make(framework, call, ())


@by_framework
@pytest.mark.parametrize(
    'train_argument, message',
    [
        ('is_trian', "Net has no argument 'is_trian'; there are: x, is_train"),
        ({'is_train': 1}, "train_argument gives the value in training, True or False, got 1 for 'is_train'"),
    ],
)
def test_switches_that_do_not_exist_or_are_no_switches_are_errors(framework: str, train_argument: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f'^from_{framework}: {message}$'):
        make(framework, is_train, train_argument)


@by_framework
def test_a_sequence_sets_the_switch_of_its_first_layer_and_refuses_those_it_cannot_set(framework: str, key: jax.Array) -> None:
    def sequence(first: Callable, second: Callable | None, train_argument: Any = None) -> Network:
        calls = [call for call in (first, second) if call is not None]
        if framework == 'linen':
            layers = [type('Net', (LinenRun,), {'__call__': call})() for call in calls]
            return networks.from_linen(nn.Sequential([*layers, nn.relu]), train_argument=train_argument)
        layers = [type('Net', (NnxRun,), {'__call__': call})(rngs=nnx.Rngs(0)) for call in calls]
        return networks.from_nnx(nnx.Sequential(*layers, nnx.relu), train_argument=train_argument)

    network = sequence(rated, None)
    variables = network.init(key, jnp.ones((1, 4)))
    shares = [
        np.mean(network.apply(variables, jnp.ones((50, 4)), train=train, rng=key)[0].logits == 0) for train in (False, True)
    ]
    assert shares[1] > shares[0]
    message = f'^from_{framework}: Sequential never sets train of Net, its layer 1, in training: write a module that does, or '
    with pytest.raises(ValueError, match=message):
        sequence(rated, rated)
    sequence(rated, rated, ())


class LinenAttribute(nn.Module):
    is_train: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dropout(0.5, deterministic=not self.is_train)(nn.Dense(20)(x))


class NnxAttribute(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.dense, self.training = nnx.Linear(4, 20, rngs=rngs), False

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dense(x) * (2 if self.training else 1)


class NnxSwitched(NnxAttribute):
    def train(self, **attributes: bool) -> None:
        super().train(training=True, **attributes)

    def eval(self, **attributes: bool) -> None:
        super().eval(training=False, **attributes)


def test_an_attribute_that_nobody_sets_is_an_error(key: jax.Array) -> None:
    def within(*, rngs: nnx.Rngs) -> nnx.Module:
        return nnx.Sequential(NnxAttribute(rngs=rngs), nnx.relu)

    for make, name in [
        (lambda **options: networks.from_linen(LinenAttribute(), **options), "'is_train' of LinenAttribute"),
        (lambda **options: networks.from_nnx(NnxAttribute, **options), "'training' of NnxAttribute"),
        (lambda **options: networks.from_nnx(within, **options), "'training' of NnxAttribute"),
    ]:
        with pytest.raises(
            ValueError, match=f'attribute {name} may be the switch to training, and stays as it is: make it an argument'
        ):
            make()
        make(train_argument=())
    network = networks.from_nnx(NnxSwitched)
    variables = network.init(key, jnp.ones((1, 4)))
    logits = [network.apply(variables, jnp.ones((1, 4)), train=train)[0].logits for train in (False, True)]
    np.testing.assert_allclose(logits[1], 2 * logits[0], rtol=1e-6)


def test_the_switch_of_nnx_batch_norm_is_that_of_the_module_and_of_linen_is_named() -> None:
    networks.from_nnx(functools.partial(nnx.BatchNorm, 3))
    with pytest.raises(ValueError, match="argument 'use_running_average' of BatchNorm may be the switch"):
        networks.from_linen(nn.BatchNorm())
    network = networks.from_linen(nn.BatchNorm(), train_argument={'use_running_average': False})
    variables = network.init(jax.random.key(0), jnp.ones((4, 3)))
    _, state = network.apply(variables, jnp.ones((4, 3)), train=True)
    np.testing.assert_allclose(state['batch_stats']['mean'], 0.01, rtol=1e-4)


class Counter(nn.Module):
    """A module whose state is its cache, which moves in evaluation too."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        calls = self.variable('cache', 'calls', jnp.zeros, (), jnp.int32)
        if not self.is_initializing() and self.is_mutable_collection('cache'):
            calls.value += 1
        return nn.Dense(2)(x)


def test_mutable_collections_change_in_evaluation_too(key: jax.Array) -> None:
    x = jnp.ones((1, 3))
    for mutable, wanted in [((), [0, 1]), ('cache', [1, 1])]:
        network = networks.from_linen(Counter(), mutable=mutable)
        variables = network.init(key, x)
        states = [network.apply(variables, x, train=train)[1] for train in (False, True)]
        assert [int(state['cache']['calls']) for state in states] == wanted
        assert_bitwise_equal(variables['cache']['calls'], jnp.int32(0))
    with pytest.raises(ValueError, match=r"^from_linen: mutable are collections of the state, such as 'cache', not 'params'$"):
        networks.from_linen(Counter(), mutable='params')
