"""Networks made of networks: ensembles, preprocessing, and the teacher that is none."""

import functools
from collections.abc import Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.oracles import log_softmax

from kdjax import networks
from kdjax.networks import Network, Outputs


def constant(logits: np.ndarray) -> Network:
    """A network whose variables are its logits."""

    def apply(variables: dict, inputs: object, *, train: bool = False, rng: object = None) -> tuple[Outputs, dict]:
        return Outputs(variables['params']['logits'], {'shape': jnp.asarray(inputs)}), {}

    return Network(lambda key, inputs: {'params': {'logits': jnp.asarray(logits)}}, apply)


def predict(logits: list[np.ndarray], **options: Any) -> np.ndarray:
    network = networks.ensemble([constant(x) for x in logits], **options)
    return network.apply(network.init(jax.random.key(0), jnp.ones(())), jnp.ones(()))[0].logits


@functools.cache
def dense(features: int = 3) -> Network:
    return networks.from_linen(nn.Dense(features, name='dense'))


class Normalized(nn.Module):
    """Batch norm and dropout: a module with state and noise."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.BatchNorm(use_running_average=not train, name='norm')(x)
        return nn.Dense(3, name='head')(nn.Dropout(0.5, deterministic=not train, name='drop')(x))


@functools.cache
def mixed() -> tuple[Network, tuple[Network, ...], list[dict], jax.Array]:
    """An ensemble of a Linen network with state and an NNX one without, its members, their variables, and inputs."""
    members = (
        networks.from_linen(Normalized(), features='drop'),
        networks.from_nnx(functools.partial(nnx.Linear, 4, 3)),
    )
    inputs = jax.random.normal(jax.random.key(1), (6, 4))
    variables = [member.init(jax.random.key(i), inputs) for i, member in enumerate(members)]
    return networks.ensemble(members), members, variables, inputs


@pytest.mark.parametrize('scale', [1.0, 30.0, 1e4])
def test_mean_of_probabilities_is_that_of_float64(scale: float) -> None:
    logits = [scale * np.random.default_rng(i).standard_normal((5, 7)).astype(np.float32) for i in range(3)]
    log_p = np.stack([log_softmax(x) for x in logits])
    largest = log_p.max(0)
    wanted = largest + np.log(np.mean(np.exp(log_p - largest), axis=0))
    np.testing.assert_allclose(predict(logits), wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.exp(predict(logits)), np.exp(log_p).mean(0), atol=1e-5)
    np.testing.assert_allclose(np.exp(predict(logits, average='probabilities')).sum(-1), 1, rtol=1e-5)


def test_mean_of_logits_is_that_of_float64() -> None:
    logits = [10 * np.random.default_rng(i).standard_normal((5, 7)).astype(np.float32) for i in range(3)]
    np.testing.assert_allclose(
        predict(logits, average='logits'), np.mean(logits, axis=0, dtype=np.float64), rtol=1e-5, atol=1e-6
    )


def test_a_class_that_one_member_excludes_is_not_excluded() -> None:
    excluded = np.array([[-np.inf, 0.0, 1.0]], np.float32)
    assert predict([excluded, excluded])[0, 0] == -np.inf
    one = predict([excluded, np.zeros((1, 3), np.float32)])
    np.testing.assert_allclose(np.exp(one[0, 0]), 1 / 6, rtol=1e-6)


@pytest.mark.parametrize('average', ['probabilities', 'logits'])
def test_weights_are_shares_of_the_mean(average: str) -> None:
    logits = [5 * np.random.default_rng(i).standard_normal((4, 2, 7)).astype(np.float32) for i in range(3)]
    shares = np.array([0.5, 0.3, 0.2])
    got = predict(logits, average=average, weights=(5, 3, 2))
    if average == 'logits':
        np.testing.assert_allclose(got, np.einsum('m,mblc->blc', shares, np.stack(logits)), rtol=1e-5, atol=1e-5)
    else:
        wanted = np.einsum('m,mblc->blc', shares, np.exp([log_softmax(x) for x in logits]))
        np.testing.assert_allclose(np.exp(np.asarray(got, np.float64)), wanted, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(predict(logits, average=average, weights=[2.0] * 3), predict(logits, average=average))
    # As often as it counts.
    np.testing.assert_allclose(
        predict(logits[:2], average=average, weights=[2, 1]),
        predict([logits[0], *logits[:2]], average=average),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize('weights', [(1.0,), (1.0, 0.0), (1.0, -1.0), (1.0, np.nan), 1.0, ((1.0,), (1.0,))])
def test_weights_that_are_no_positive_number_for_each_member_are_an_error(weights: object) -> None:
    with pytest.raises(ValueError, match=r'^ensemble: weights must be a positive number for each of 2 members, got [^\n]*$'):
        networks.ensemble([dense()] * 2, weights=weights)


@pytest.mark.parametrize('average', ['probabilities', 'logits'])
def test_identical_members_are_one_member(average: str) -> None:
    logits = 5 * np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)
    got = predict([logits] * 4, average=average)
    np.testing.assert_allclose(jax.nn.log_softmax(got), log_softmax(logits), rtol=1e-6, atol=1e-6)


def test_arithmetic_is_in_float32() -> None:
    logits = [np.random.default_rng(i).standard_normal((5, 7)).astype(jnp.bfloat16) for i in range(3)]
    for average in ('probabilities', 'logits'):
        got = predict(logits, average=average)
        assert got.dtype == jnp.float32
        np.testing.assert_array_equal(got, predict([x.astype(np.float32) for x in logits], average=average))


def test_members_of_different_frameworks_mix() -> None:
    network, members, variables, inputs = mixed()
    joined = networks.ensemble_variables(variables)
    outputs, state = jax.jit(network.apply)(joined, inputs)
    alone = [member.apply(own, inputs)[0] for member, own in zip(members, variables, strict=True)]
    wanted = np.log(np.mean([np.exp(log_softmax(out.logits)) for out in alone], axis=0))
    np.testing.assert_allclose(outputs.logits, wanted, rtol=1e-5, atol=1e-6)
    assert list(outputs.features) == ['0/drop']
    np.testing.assert_allclose(outputs.features['0/drop'], alone[0].features['drop'], rtol=1e-6)
    assert state == {'batch_stats': {'0': state['batch_stats']['0']}}


def test_variables_of_members_stand_under_their_index() -> None:
    network, _, variables, inputs = mixed()
    joined = networks.ensemble_variables(variables)
    assert joined['params']['0'] is variables[0]['params']
    assert joined['params']['1'] is variables[1]['params']
    assert joined['batch_stats'] == {'0': variables[0]['batch_stats']}
    fresh = network.init(jax.random.key(2), inputs)
    assert jax.tree.structure(fresh) == jax.tree.structure(joined)
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, joined)


def test_members_start_from_different_parameters(key: jax.Array) -> None:
    variables = networks.ensemble([dense()] * 2).init(key, jnp.ones((1, 4)))
    assert not np.any(variables['params']['0']['kernel'] == variables['params']['1']['kernel'])


def test_in_training_members_draw_noise_of_their_own_and_keep_their_own_statistics(key: jax.Array) -> None:
    _, members, variables, inputs = mixed()
    shifted = {**variables[0], 'batch_stats': jax.tree.map(lambda s: s + 1, variables[0]['batch_stats'])}
    network = networks.ensemble([members[0]] * 2)
    outputs, state = network.apply(networks.ensemble_variables([variables[0], shifted]), inputs, train=True, rng=key)
    assert not np.array_equal(outputs.features['0/drop'] == 0, outputs.features['1/drop'] == 0)
    for i, own in enumerate([variables[0], shifted]):
        _, alone = members[0].apply(own, inputs, train=True, rng=key)
        np.testing.assert_allclose(
            state['batch_stats'][str(i)]['norm']['mean'], alone['batch_stats']['norm']['mean'], rtol=1e-6, atol=1e-6
        )


def test_the_mean_of_two_halves_is_the_mean_of_all() -> None:
    logits = [np.random.default_rng(i).standard_normal((5, 7)).astype(np.float32) for i in range(4)]
    for average in ('probabilities', 'logits'):
        halves = [np.asarray(predict(half, average=average)) for half in (logits[:2], logits[2:])]
        np.testing.assert_allclose(predict(halves, average=average), predict(logits, average=average), rtol=1e-5, atol=1e-6)


def test_as_a_teacher_its_variables_are_an_argument_that_stays_bitwise_the_same() -> None:
    network, _, variables, inputs = mixed()
    joined = networks.ensemble_variables(variables)
    outputs, state = network.apply(joined, inputs, train=False)
    again, _ = network.apply({**joined, **state}, inputs)
    jax.tree.map(np.testing.assert_array_equal, state, {'batch_stats': joined['batch_stats']})
    np.testing.assert_array_equal(again.logits, outputs.logits)


def body(seed: int, width: int = 2, length: int = 1) -> Network:
    """A network with one feature, 'body' [batch, length, width], which is its parameter."""
    feature = np.random.default_rng(seed).standard_normal((4, length, width)).astype(np.float32)

    def apply(variables: dict, inputs: object, *, train: bool = False, rng: object = None) -> tuple[Outputs, dict]:
        return Outputs(jnp.zeros((4, 3)), {'body': variables['params']['body']}), {}

    return Network(lambda key, inputs: {'params': {'body': jnp.asarray(feature)}}, apply)


def features_of(network: Network) -> dict[str, jax.Array]:
    return network.apply(network.init(jax.random.key(0), None), None)[0].features


@pytest.mark.parametrize('sizes, joined', [(((2, 1), (5, 1)), (4, 1, 7)), (((2, 1), (2, 4)), None)])
def test_features_of_one_size_are_also_there_side_by_side(sizes: tuple, joined: tuple | None) -> None:
    features = features_of(networks.ensemble([body(i, *size) for i, size in enumerate(sizes)]))
    for i, size in enumerate(sizes):
        np.testing.assert_array_equal(features[f'{i}/body'], features_of(body(i, *size))['body'])
    if joined is None:
        assert sorted(features) == ['0/body', '1/body']
    else:
        assert sorted(features) == ['0/body', '1/body', 'body']
        assert features['body'].shape == joined
        np.testing.assert_array_equal(features['body'], np.concatenate([features['0/body'], features['1/body']], axis=-1))


@functools.cache
def nested() -> tuple[dict[str, jax.Array], ...]:
    """The features of an ensemble of two ensembles of two, and those of each of the two."""
    halves = [networks.ensemble([body(2 * i), body(2 * i + 1)]) for i in range(2)]
    return features_of(networks.ensemble(halves)), *map(features_of, halves)


def test_features_of_ensembles_of_ensembles_have_both_indices_in_their_names() -> None:
    outer, *halves = nested()
    for i, half in enumerate(halves):
        for j in range(2):
            np.testing.assert_array_equal(outer[f'{i}/{j}/body'], half[f'{j}/body'])
    np.testing.assert_array_equal(outer['body'], np.concatenate([half['body'] for half in halves], axis=-1))


def test_a_joined_feature_of_a_member_keeps_its_name_in_an_ensemble_of_ensembles() -> None:
    outer, first, _ = nested()
    np.testing.assert_array_equal(outer['0/body'], first['body'])


def test_members_of_different_classes_are_an_error_that_shows_the_shapes(key: jax.Array) -> None:
    network = networks.ensemble([dense(3), dense(4)])
    variables = network.init(key, jnp.ones((2, 5)))
    with pytest.raises(ValueError, match=r'logits of one shape, got \[\(2, 3\), \(2, 4\)\]'):
        network.apply(variables, jnp.ones((2, 5)))


def test_no_members_and_unknown_averages_are_errors() -> None:
    with pytest.raises(ValueError, match='at least one member'):
        networks.ensemble([])
    with pytest.raises(ValueError, match="average must be 'probabilities' or 'logits', got 'mean'"):
        networks.ensemble([dense()], average='mean')


def test_preprocess_puts_a_function_in_front(key: jax.Array) -> None:
    """The network below never sees the raw inputs, not even at init, whose function runs on shapes alone."""
    inner = networks.from_linen(Normalized(), features='norm')
    function = lambda x: x.reshape(-1, 4).astype(jnp.float32) / 255  # noqa: E731
    network = networks.preprocess(inner, function)
    raw = jax.random.bits(key, (3, 2, 2), jnp.uint8)
    ready = function(raw)
    variables = network.init(key, jax.ShapeDtypeStruct((3, 2, 2), jnp.uint8))
    jax.tree.map(np.testing.assert_array_equal, variables, inner.init(key, ready))
    for train in (False, True):
        got = network.apply(variables, raw, train=train, rng=key)
        wanted = inner.apply(variables, ready, train=train, rng=key)
        assert jax.tree.structure(got) == jax.tree.structure(wanted)
        jax.tree.map(np.testing.assert_array_equal, got, wanted)


def own(variables: Mapping, inputs: dict, *, train: bool = False, rng: jax.Array | None = None) -> tuple[Outputs, dict]:
    """A network of two plain functions, whose inputs are integers and floats."""
    hidden = inputs['x'] + jnp.take(variables['params']['table'], inputs['ids'], axis=0)
    return Outputs(hidden @ variables['params']['kernel'], {'hidden': hidden}), {}


def own_init(key: jax.Array, inputs: dict) -> dict:
    width = inputs['x'].shape[-1]
    table, kernel = (
        jax.random.normal(k, shape) for k, shape in zip(jax.random.split(key), [(5, width), (width, 3)], strict=True)
    )
    return {'params': {'table': table, 'kernel': kernel}}


OWN = Network(own_init, own)
WRAPPERS = {
    'mixed_precision': networks.mixed_precision,
    'rematerialize': networks.rematerialize,
    'in_parts': lambda network: networks.in_parts(network, 2),
    'preprocess': lambda network: networks.preprocess(network, lambda inputs: {**inputs, 'ids': inputs['ids'] % 5}),
    'postprocess': lambda network: networks.postprocess(network, lambda logits: logits * 1),
    'tap_parameters': lambda network: networks.tap_parameters(network, 'kernel'),
    'tap_logits': networks.tap_logits,
    'ensemble': lambda network: networks.ensemble([network], average='logits'),
    'label_union': lambda network: networks.label_union([network], [(0, 1, 2)], average='logits'),
    'multitask': lambda network: networks.postprocess(networks.multitask([network]), lambda logits: logits[:, 0]),
}


@pytest.mark.parametrize('frozen', [False, True])
@pytest.mark.parametrize('name', WRAPPERS)
def test_two_functions_of_ones_own_and_inputs_of_any_kind_are_all_that_it_takes(
    name: str, frozen: bool, key: jax.Array
) -> None:
    network = WRAPPERS[name](OWN)
    inputs = {'ids': jnp.arange(4) % 5, 'x': jax.random.normal(key, (4, 6))}
    variables = network.init(key, jax.eval_shape(lambda: inputs))
    alone = networks.member_variables(variables, 0) if name in ('ensemble', 'label_union', 'multitask') else variables
    wanted = OWN.apply(alone, inputs)[0]
    # Variables may be of any kind of mapping.
    outputs, state = jax.jit(functools.partial(network.apply, train=True))(flax.core.freeze(variables), inputs, rng=key)
    assert state == {}
    # bfloat16 has 8 bits.
    tolerance = 0.05 if name == 'mixed_precision' else 1e-5
    np.testing.assert_allclose(outputs.logits, wanted.logits, rtol=tolerance, atol=tolerance)
    assert outputs.logits.dtype == outputs.features.get('hidden', outputs.logits).dtype == jnp.float32
