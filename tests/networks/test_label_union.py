"""The union of networks that know different classes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.oracles import softmax

from kdjax import networks
from kdjax.networks import Network, Outputs


def constant(logits: np.ndarray | None) -> Network:
    """A network whose variables are its logits."""

    def apply(variables: dict, inputs: object, *, train: bool = False, rng: object = None) -> tuple[Outputs, dict]:
        return Outputs(variables['params']['logits'], {'shape': jnp.asarray(inputs)}), {}

    return Network(lambda key, inputs: {'params': {'logits': logits}}, apply)


def predict(logits: list[np.ndarray], classes: list, average: str) -> np.ndarray:
    network = networks.label_union([constant(x) for x in logits], classes, average=average)
    return np.asarray(jax.jit(network.apply)(network.init(jax.random.key(0), jnp.ones(())), jnp.ones(()))[0].logits)


def draw(*sizes: int) -> list[np.ndarray]:
    return [5 * np.random.default_rng(i).standard_normal((4, size)).astype(np.float32) for i, size in enumerate(sizes)]


OVERLAPPING = [[2, 0, 1], [3, 2], [4, 0, 3, 1]]


def test_probabilities_are_the_mean_of_those_of_the_members() -> None:
    logits = draw(3, 2, 4)
    wanted = np.zeros((4, 5))
    for x, own in zip(logits, OVERLAPPING, strict=True):
        wanted[:, own] += softmax(x) / 3
    got = predict(logits, OVERLAPPING, 'probabilities')
    np.testing.assert_allclose(np.exp(np.asarray(got, np.float64)), wanted, rtol=1e-5, atol=1e-7)


def test_logits_are_the_mean_over_the_members_that_know_the_class() -> None:
    logits = draw(3, 2, 4)
    wanted, counts = np.zeros((4, 5)), np.zeros(5)
    for x, own in zip(logits, OVERLAPPING, strict=True):
        wanted[:, own] += x
        counts[own] += 1
    np.testing.assert_allclose(predict(logits, OVERLAPPING, 'logits'), wanted / counts, rtol=1e-5, atol=1e-6)


def test_logits_of_members_that_share_no_class_stand_side_by_side() -> None:
    logits = draw(3, 2)
    np.testing.assert_array_equal(predict(logits, [[0, 1, 2], [3, 4]], 'logits'), np.concatenate(logits, axis=-1))


@pytest.mark.parametrize('average', ['probabilities', 'logits'])
def test_members_that_know_all_classes_are_an_ensemble(average: str) -> None:
    logits = draw(3, 3)
    ensemble = networks.ensemble([constant(x) for x in logits], average=average)
    wanted = ensemble.apply(ensemble.init(jax.random.key(0), None), jnp.ones(()))[0].logits
    np.testing.assert_allclose(predict(logits, [[0, 1, 2]] * 2, average), wanted, rtol=1e-6)


@pytest.mark.parametrize('average', ['probabilities', 'logits'])
def test_variables_and_features_are_those_of_an_ensemble_and_gradients_are_finite(average: str) -> None:
    members = [constant(x) for x in draw(3, 2)]
    network = networks.label_union(members, [[0, 1, 2], [2, 3]], average=average)
    variables = network.init(jax.random.key(0), None)
    assert sorted(variables['params']) == ['0', '1']
    outputs, _ = network.apply(variables, jnp.ones(()))
    assert {'0/shape', '1/shape'} <= outputs.features.keys()
    assert outputs.logits.dtype == jnp.float32
    gradient = jax.grad(lambda v: jax.nn.log_softmax(network.apply(v, jnp.ones(()))[0].logits)[:, 3].sum())(variables)
    assert all(np.isfinite(x).all() and np.any(x != 0) for x in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    'classes,message',
    [
        ([[0, 1, 2]], 'give the classes of every member; got 1 for 2 members'),
        ([[0, 1, 1], [2, 3]], r'the classes of member 0 must differ from each other, got \(0, 1, 1\)'),
        ([[0, 1, 2], [4, 5]], r'must be 0, 1, ... without gaps, got \[0, 1, 2, 4, 5\]'),
        ([[0, 1], [2, 3]], r'member 0 gives logits \(4, 3\) and has 2 classes'),
    ],
)
def test_classes_that_do_not_fit_are_errors(classes: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predict(draw(3, 2), classes, 'probabilities')


def test_no_members_unknown_averages_and_members_without_logits_are_errors() -> None:
    with pytest.raises(ValueError, match='at least one member'):
        networks.label_union([], [])
    with pytest.raises(ValueError, match="average must be 'probabilities' or 'logits', got 'mean'"):
        predict(draw(3, 2), [[0, 1, 2], [3, 4]], 'mean')
    with pytest.raises(ValueError, match='member 0 gives no logits'):
        predict([None], [[0]], 'probabilities')
