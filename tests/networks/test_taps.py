"""Taps: parameters, derivatives and class gradients as features of a network, and gradients through them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kdjax import networks
from kdjax.networks import Network, Outputs

CLASSES = 3
INPUTS = jax.random.normal(jax.random.key(0), (4, 5))
IMAGES = jax.random.normal(jax.random.key(0), (2, 3, 2, 2))


class Smooth(nn.Module):
    """Two layers with second derivatives everywhere."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(CLASSES, name='head')(nn.tanh(nn.Dense(4, name='hidden')(x)))


class Images(nn.Module):
    """A layer, noise, batch norm, and a head in which the positions differ."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Conv(3, (1, 1), name='layer')(x)
        self.sow('intermediates', 'sown', x)
        x = nn.Dropout(0.5, deterministic=not train, name='drop')(x)
        x = nn.BatchNorm(use_running_average=not train, name='norm')(x)
        return nn.Dense(CLASSES, name='head')(nn.tanh(x.reshape(x.shape[0], -1)))


class Layer(nn.Module):
    """A layer that is more than one method."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.convolve(x)

    @nn.compact
    def convolve(self, x: jax.Array) -> jax.Array:
        return nn.Conv(4, (1, 1))(x)


class Pooled(nn.Module):
    """A layer, noise and a linear head."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> Outputs:
        x = nn.Dropout(0.5, deterministic=not train, name='drop')(Layer(name='layer')(x))
        return Outputs(nn.Dense(CLASSES, name='head')(x.mean((1, 2))), {'own': x})


class Twice(nn.Module):
    """A layer that is called twice."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layer = nn.Dense(5, name='layer')
        return layer(layer(x))


@functools.cache
def smooth() -> tuple[Network, dict]:
    network = networks.from_linen(Smooth(), features='hidden')
    return network, jax.jit(network.init)(jax.random.key(1), INPUTS)


def test_parameters_become_features_beside_the_others() -> None:
    network, variables = smooth()
    tapped = networks.tap_parameters(network, ('head/kernel', 'hidden/bias'))
    assert jax.tree.structure(tapped.init(jax.random.key(1), INPUTS)) == jax.tree.structure(variables)
    outputs, state = tapped.apply(variables, INPUTS)
    plain, plain_state = network.apply(variables, INPUTS)
    np.testing.assert_array_equal(outputs.logits, plain.logits)
    assert state == plain_state == {}
    assert set(outputs.features) == {'hidden', 'head/kernel', 'hidden/bias'}
    np.testing.assert_array_equal(outputs.features['head/kernel'], variables['params']['head']['kernel'])
    np.testing.assert_array_equal(outputs.features['hidden/bias'], variables['params']['hidden']['bias'])


def test_gradients_reach_the_parameters_through_the_features() -> None:
    network, variables = smooth()
    tapped = networks.tap_parameters(network, 'head/kernel')

    def loss(variables: dict) -> jax.Array:
        return jnp.sum(tapped.apply(variables, INPUTS)[0].features['head/kernel'] ** 2)

    gradient = jax.grad(loss)(variables)['params']
    np.testing.assert_allclose(gradient['head']['kernel'], 2 * variables['params']['head']['kernel'], rtol=1e-6)
    assert not np.any(gradient['hidden']['kernel'])


def test_a_misspelt_parameter_is_an_error_that_lists_those_there_are() -> None:
    network, variables = smooth()
    with pytest.raises(ValueError, match=r"has no feature 'head/kernle'; there are: head/bias, head/kernel, hidden/bias, "):
        networks.tap_parameters(network, 'head/kernle').apply(variables, INPUTS)


def test_parameters_are_tapped_inside_and_outside_of_an_ensemble() -> None:
    network, _ = smooth()
    kernel = 'head/kernel'
    inside = networks.ensemble([networks.tap_parameters(network, kernel), network])
    outside = networks.tap_parameters(networks.ensemble([network, network]), f'0/{kernel}')
    variables = inside.init(jax.random.key(2), INPUTS)
    for tapped in (inside, outside):
        got = tapped.apply(variables, INPUTS)[0].features[f'0/{kernel}']
        np.testing.assert_array_equal(got, variables['params']['0']['head']['kernel'])


def test_taps_go_through_preprocess() -> None:
    """The derivative outside of it is that with respect to what the network gets."""
    network, variables = smooth()
    raw = jax.random.bits(jax.random.key(3), INPUTS.shape, jnp.uint8)
    ready = lambda x: x.astype(jnp.float32) / 255  # noqa: E731
    tapped = networks.preprocess(networks.tap_parameters(networks.tap_jacobian(network), 'head/kernel'), ready)
    features = tapped.apply(variables, raw)[0].features
    wanted = networks.tap_jacobian(network).apply(variables, ready(raw))[0].features['jacobian']
    np.testing.assert_array_equal(features['jacobian'], wanted)
    np.testing.assert_array_equal(features['head/kernel'], variables['params']['head']['kernel'])


def test_parameters_of_nnx_networks_are_tapped_alike() -> None:
    network = networks.from_nnx(functools.partial(nnx.Linear, 5, CLASSES))
    variables = network.init(jax.random.key(0), INPUTS)
    outputs, _ = networks.tap_parameters(networks.tap_jacobian(network), 'kernel').apply(variables, INPUTS)
    np.testing.assert_array_equal(outputs.features['kernel'], variables['params']['kernel'])
    for jacobian in outputs.features['jacobian']:
        np.testing.assert_allclose(jacobian, variables['params']['kernel'].T, rtol=1e-6)


def test_the_jacobian_is_that_of_each_example_alone() -> None:
    """And by hand: Wᵀ diag(1 - tanh²) Vᵀ in float64."""
    network, variables = smooth()
    outputs, _ = jax.jit(networks.tap_jacobian(network).apply)(variables, INPUTS)
    alone = jax.jit(jax.vmap(jax.jacrev(lambda x: network.apply(variables, x[None])[0].logits[0])))(INPUTS)
    np.testing.assert_allclose(outputs.features['jacobian'], alone, rtol=1e-5, atol=1e-6)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), variables['params'])
    hidden = np.tanh(np.asarray(INPUTS, np.float64) @ params['hidden']['kernel'] + params['hidden']['bias'])
    wanted = np.einsum('hk,bh,ih->bki', params['head']['kernel'], 1 - hidden**2, params['hidden']['kernel'])
    np.testing.assert_allclose(outputs.features['jacobian'], wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(outputs.logits, network.apply(variables, INPUTS)[0].logits, rtol=1e-6, atol=1e-6)
    assert set(outputs.features) == {'hidden', 'jacobian'}


def test_directions_are_combinations_of_the_classes() -> None:
    network, variables = smooth()
    directions = jnp.array([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]])
    full = networks.tap_jacobian(network).apply(variables, INPUTS)[0].features['jacobian']
    some = networks.tap_jacobian(network, directions).apply(variables, INPUTS)[0].features['jacobian']
    np.testing.assert_allclose(some, np.einsum('dk,bki->bdi', directions, full), rtol=1e-5, atol=1e-6)


def test_the_jacobian_has_a_gradient_with_respect_to_the_parameters() -> None:
    """By central differences."""
    network, variables = smooth()
    tapped = networks.tap_jacobian(network)

    @jax.jit
    @jax.value_and_grad
    def loss(variables: dict) -> jax.Array:
        return jnp.sum(tapped.apply(variables, INPUTS)[0].features['jacobian'] ** 2)

    _, gradient = loss(variables)
    direction = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), variables)
    ends = [loss(jax.tree.map(lambda x, d, step=step: x + step * d, variables, direction))[0] for step in (1e-2, -1e-2)]
    slope = sum(jnp.sum(g * d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True))
    np.testing.assert_allclose((ends[0] - ends[1]) / 2e-2, slope, rtol=1e-2)
    assert np.all(np.any(gradient['params']['hidden']['kernel'] != 0, axis=0))
    assert not np.any(gradient['params']['head']['bias'])


@pytest.mark.parametrize('inputs, found', [(INPUTS.astype(jnp.uint8), 'uint8'), ({'x': INPUTS}, 'dict'), ((INPUTS,), 'tuple')])
def test_the_jacobian_of_other_than_one_floating_array_is_an_error(inputs: object, found: str) -> None:
    network, variables = smooth()
    message = f'^tap_jacobian: inputs must be one floating-point array, got {found}: put preprocess outside of it$'
    with pytest.raises(ValueError, match=message):
        networks.tap_jacobian(network).apply(variables, inputs)


def head(params: dict, features: np.ndarray) -> np.ndarray:
    """What `Images` makes of its layer in evaluation with fresh statistics, in float64."""
    normal = features / np.sqrt(1 + 1e-5)
    return np.tanh(normal.reshape(len(features), -1)) @ params['head']['kernel'] + params['head']['bias']


def test_class_gradients_are_finite_differences_of_the_logits_by_the_layer(key: jax.Array) -> None:
    network = networks.from_linen(Images(), features=('layer', 'norm'), class_gradients='layer')
    variables = jax.jit(network.init)(key, IMAGES)
    outputs, _ = jax.jit(network.apply)(variables, IMAGES)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), variables['params'])
    layer = np.asarray(outputs.features['layer'], np.float64)
    np.testing.assert_allclose(outputs.logits, head(params, layer), rtol=1e-5, atol=1e-6)
    gradients = np.zeros((2, CLASSES, 3, 2, 3))
    for position in np.ndindex(3, 2, 3):
        change = np.zeros(layer.shape)
        change[:, *position] = 1e-5
        gradients[:, :, *position] = (head(params, layer + change) - head(params, layer - change)) / 2e-5
    np.testing.assert_allclose(outputs.features['layer/class_gradients'], gradients.mean((2, 3)), rtol=1e-5, atol=1e-6)
    assert set(outputs.features) == {'layer', 'norm', 'layer/class_gradients'}


def test_taps_leave_everything_else_as_it_is(key: jax.Array) -> None:
    """Logits, features, noise and batch statistics, all taps together."""
    plain, tapped = (
        networks.from_linen(Images(), features=('layer', 'sown'), class_gradients=paths) for paths in ((), ('layer',))
    )
    tapped = networks.tap_parameters(networks.tap_jacobian(tapped), 'head/kernel')
    variables = jax.jit(plain.init)(key, IMAGES)
    (wanted, wanted_state), (outputs, state) = (
        jax.jit(functools.partial(network.apply, train=True))(variables, IMAGES, rng=key) for network in (plain, tapped)
    )
    assert set(outputs.features) == {'layer', 'sown', 'layer/class_gradients', 'jacobian', 'head/kernel'}
    features = {path: outputs.features[path] for path in wanted.features}
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
        (outputs.logits, features, state),
        (wanted.logits, wanted.features, wanted_state),
    )


def test_in_training_class_gradients_are_those_of_the_same_noise(key: jax.Array) -> None:
    """Of a network that returns `Outputs` of its own."""
    network = networks.from_linen(Pooled(), features=('layer', 'drop'), class_gradients='layer')
    variables = jax.jit(network.init)(key, IMAGES)
    outputs, _ = jax.jit(functools.partial(network.apply, train=True))(variables, IMAGES, rng=key)
    kept = 2.0 * (np.asarray(outputs.features['drop']) != 0)
    assert 0 < kept.mean() < 2
    wanted = np.einsum('bhwc,ck->bkc', kept, variables['params']['head']['kernel']) / 6 / 6
    np.testing.assert_allclose(outputs.features['layer/class_gradients'], wanted, rtol=1e-5, atol=1e-6)
    assert set(outputs.features) == {'own', 'layer', 'drop', 'layer/class_gradients'}


def test_class_gradients_of_vectors_are_the_jacobian_of_the_rest() -> None:
    network = networks.from_linen(Smooth(), features='hidden', class_gradients='hidden')
    _, variables = smooth()
    outputs, _ = network.apply(variables, INPUTS)
    slope = 1 - np.square(np.tanh(outputs.features['hidden']))
    wanted = slope[:, None] * variables['params']['head']['kernel'].T[None]
    np.testing.assert_allclose(outputs.features['hidden/class_gradients'], wanted, rtol=1e-5, atol=1e-6)


def test_class_gradients_have_gradients_with_respect_to_the_parameters_below_and_above() -> None:
    network = networks.from_linen(Smooth(), features='hidden', class_gradients='hidden')
    _, variables = smooth()

    @jax.jit
    @jax.grad
    def gradient(variables: dict) -> jax.Array:
        return jnp.sum(network.apply(variables, INPUTS)[0].features['hidden/class_gradients'] ** 2)

    params = gradient(variables)['params']
    assert np.all(np.any(params['hidden']['kernel'] != 0, axis=0))
    assert np.all(params['head']['kernel'] != 0)


def test_class_gradients_of_what_is_not_tapped_are_an_error() -> None:
    message = "^from_linen: class_gradients of 'layre' need that path in features too$"
    with pytest.raises(ValueError, match=message):
        networks.from_linen(Images(), features='layer', class_gradients='layre')


@pytest.mark.parametrize(
    'module, path, message',
    [
        (Images(), 'layre', "Images has no feature 'layre'; there are: .*layer.*sown"),
        (Images(), 'sown', "^from_linen: class_gradients of 'sown' need a submodule that is called once, not 0 times"),
        (Twice(), 'layer', "^from_linen: class_gradients of 'layer' need a submodule that is called once, not 2 times"),
    ],
)
def test_class_gradients_of_what_is_no_submodule_called_once_are_an_error(module: nn.Module, path: str, message: str) -> None:
    """A gradient of zeros, or one of all calls, would be wrong and look right."""
    network = networks.from_linen(module, features=path, class_gradients=path)
    inputs = INPUTS if isinstance(module, Twice) else IMAGES
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: network.apply(network.init(jax.random.key(0), inputs), inputs))


class NnxImages(nnx.Module):
    """Convolutions in a list, one after the other, and a head that is not linear and draws noise."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([nnx.Conv(3, 4, (2, 2), rngs=rngs), nnx.Conv(4, 4, (2, 2), rngs=rngs)])
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.out = nnx.Linear(4, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        assert self.layers[1].out_features == 4
        for layer in self.layers:
            x = layer(x)
        self.sow(nnx.Intermediate, 'sown', x)
        return self.head(x)

    def head(self, x: jax.Array) -> jax.Array:
        return self.out(self.drop(jnp.tanh(self.norm(x)).mean((1, 2))))


def test_class_gradients_of_an_nnx_module_are_those_of_its_head(key: jax.Array) -> None:
    """The derivative by what a layer in a list returned, and nothing else is changed by asking for it."""
    plain, network = (networks.from_nnx(NnxImages, features='layers/1', class_gradients=paths) for paths in ((), ('layers/1',)))
    inputs = jax.random.normal(key, (2, 4, 5, 3))
    variables = network.init(key, inputs)
    outputs, state = jax.jit(network.apply)(variables, inputs)
    expected, unchanged = jax.jit(plain.apply)(variables, inputs)
    jax.tree.map(np.testing.assert_array_equal, (outputs.logits, state), (expected.logits, unchanged))

    def logits(activation: jax.Array) -> jax.Array:
        scale = variables['params']['norm']['scale'] / jnp.sqrt(1.0 + 1e-5)
        hidden = jnp.tanh(activation * scale[None, None]).mean((0, 1))
        return hidden @ variables['params']['out']['kernel']

    wanted = jax.vmap(jax.jacrev(logits))(outputs.features['layers/1']).mean((2, 3))
    np.testing.assert_allclose(outputs.features['layers/1/class_gradients'], wanted, rtol=1e-4, atol=1e-6)
    assert set(outputs.features) == {'layers/1', 'layers/1/class_gradients'}


def test_in_training_class_gradients_of_an_nnx_module_are_those_of_the_same_noise(key: jax.Array) -> None:
    """What dropout drops has no part in them; statistics are renewed once."""
    network = networks.from_nnx(NnxImages, features=('layers/1', 'drop'), class_gradients=('layers/1', 'drop'))
    inputs = jax.random.normal(key, (2, 4, 5, 3))
    variables = network.init(key, inputs)
    outputs, state = jax.jit(functools.partial(network.apply, train=True))(variables, inputs, rng=key)
    wanted = jnp.broadcast_to(variables['params']['out']['kernel'].T, (2, CLASSES, 4))
    np.testing.assert_allclose(outputs.features['drop/class_gradients'], wanted, rtol=1e-6)
    assert np.isfinite(outputs.features['layers/1/class_gradients']).all()
    mean = outputs.features['layers/1'].mean((0, 1, 2))
    np.testing.assert_allclose(state['batch_stats']['norm']['mean'], 0.01 * mean, rtol=1e-4, atol=1e-6)

    def total(variables: dict) -> jax.Array:
        outputs, _ = network.apply(variables, inputs, train=True, rng=key)
        return jnp.sum(outputs.features['layers/1/class_gradients'] ** 2)

    gradients = jax.jit(jax.grad(total, allow_int=True))(variables)['params']
    assert np.any(gradients['layers']['0']['kernel'] != 0)
    assert np.any(gradients['out']['kernel'] != 0)


def test_class_gradients_of_an_nnx_module_by_what_is_no_submodule_are_an_error(key: jax.Array) -> None:
    with pytest.raises(ValueError, match=r"^from_nnx: class_gradients of 'layre' need that path in features too$"):
        networks.from_nnx(NnxImages, features='norm', class_gradients='layre')
    inputs = jnp.ones((2, 4, 5, 3))
    for path in ('sown', 'head'):
        network = networks.from_nnx(NnxImages, features=path, class_gradients=path)
        message = f"^from_nnx: class_gradients of '{path}' need a submodule that is called once, not 0 times$"
        with pytest.raises(ValueError, match=message):
            network.apply(network.init(key, inputs), inputs)
