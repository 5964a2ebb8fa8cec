"""`prune`: what is pruned is exactly zero and stays so, whatever the optimizer does, and nothing else is touched."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kdjax import networks, optimizers, paths, pruning

STEPS = 200
INPUTS = jax.ShapeDtypeStruct((2, 6), jnp.float32)


class NnxMlp(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.layers[1](nnx.relu(self.layers[0](x)))


def filled(shapes: Any, dtype: str = 'float32') -> Any:
    """Numbers of these shapes, none of them zero."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), dtype), shapes)


def drawn(network: networks.Network, dtype: str = 'float32') -> Any:
    return filled(jax.eval_shape(network.init, jax.random.key(0), INPUTS)['params'], dtype)


@functools.cache
def linen_params(dtype: str = 'float32') -> Any:
    """80 weights in two kernels, and two biases, which are not pruned."""
    return drawn(networks.from_linen(nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(4)])), dtype)


@functools.cache
def nnx_params() -> Any:
    return drawn(networks.from_nnx(NnxMlp))


def nnx_state() -> Any:
    """NNX's own tree of variables, as `nnx.Optimizer` sees it."""
    return filled(nnx.state(nnx.eval_shape(lambda: NnxMlp(rngs=nnx.Rngs(0))), nnx.Param))


def adam() -> optax.GradientTransformation:
    return optax.adamw(0.05, weight_decay=0.1)


def momentum() -> optax.GradientTransformation:
    return optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.05, momentum=0.95, nesterov=True))


def standard(function: Callable) -> Callable:
    """Optax promotes dtypes on its own: its counters are integers, and its constants are float32."""

    @functools.wraps(function)
    def wrapped(*args: Any, **options: Any) -> Any:
        with jax.numpy_dtype_promotion('standard'):
            return function(*args, **options)

    return wrapped


def noise(params: Any, steps: int = STEPS) -> Any:
    """Gradients of no loss at all, [steps, ...]: large, random, and not zero anywhere, at pruned weights neither."""
    rng = np.random.default_rng(7)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.5, 1.0, (steps, *leaf.shape)), leaf.dtype), params)


def at(step: int, gradients: Any) -> Any:
    return jax.tree.map(lambda g: g[step], gradients)


@standard
def train(optimizer: optax.GradientTransformation, params: Any, steps: int = STEPS) -> tuple[Any, pruning.PruneState, Any]:
    """Runs some steps in one scan; returns the last parameters and state, and weights, masks and sparsity after every step."""

    def step(carry: Any, gradient: Any) -> Any:
        params, state = carry
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        named = paths.leaves_with_paths(params)
        return (params, state), ({path: named[path] for path in state.masks}, state.masks, state.sparsity)

    run = jax.jit(lambda params, gradients: jax.lax.scan(step, (params, optimizer.init(params)), gradients))
    (params, state), history = run(params, noise(params, steps))
    return params, state, history


def flat(arrays: dict[str, jax.Array]) -> np.ndarray:
    """[steps, weights] of arrays [steps, ...]."""
    return np.concatenate([np.asarray(x).reshape(len(x), -1) for x in arrays.values()], axis=1)


def assert_zeros_are_exact_and_stay(history: Any, expected: Callable[[int], float]) -> None:
    weights, masks, sparsity = flat(history[0]), flat(history[1]), np.asarray(history[2])
    wanted = np.array([expected(t) for t in range(len(weights))])
    # Nothing was zero by itself: the zeros are the pruned weights, every one, to the last bit.
    np.testing.assert_array_equal(weights.astype(np.float64) == 0.0, ~masks)
    assert not np.any(np.signbit(weights.astype(np.float64)[~masks]))
    assert np.all(np.isfinite(weights.astype(np.float64)))
    np.testing.assert_array_equal((~masks).sum(1), np.rint(wanted * masks.shape[1]).astype(int))
    np.testing.assert_allclose(sparsity, wanted, rtol=1e-6)
    assert not np.any(masks[1:] & ~masks[:-1]), 'a pruned weight came back'


RISING = pruning.cubic(0.9, begin=20, end=120)


def rising(t: int) -> float:
    return float(RISING(t))


@pytest.mark.parametrize('inner, dtype', [(adam, 'float32'), (adam, 'bfloat16'), (momentum, 'bfloat16')])
def test_one_shot_pruning_keeps_exact_zeros(inner: Callable, dtype: str) -> None:
    _, _, history = train(pruning.prune(inner(), 0.75), linen_params(dtype))
    assert {leaf.dtype for leaf in history[0].values()} == {jnp.dtype(dtype)}
    assert_zeros_are_exact_and_stay(history, lambda t: 0.75)


@functools.cache
def scheduled(inner: Callable, dtype: str) -> tuple[Any, pruning.PruneState, Any]:
    return train(pruning.prune(inner(), RISING), linen_params(dtype))


@pytest.mark.parametrize('inner, dtype', [(adam, 'float32'), (adam, 'bfloat16'), (momentum, 'float32')])
def test_scheduled_pruning_keeps_exact_zeros_and_the_exact_count_at_every_step(inner: Callable, dtype: str) -> None:
    params, state, history = scheduled(inner, dtype)
    assert_zeros_are_exact_and_stay(history, rising)
    assert int(state.step) == STEPS
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, linen_params(dtype))


@pytest.mark.parametrize('tree, inner', [(nnx_params, adam), (nnx_state, momentum)])
def test_nnx_trees_are_pruned_too(tree: Callable, inner: Callable) -> None:
    _, _, history = train(pruning.prune(inner(), RISING), tree())
    assert sorted(history[0]) == ['layers/0/kernel', 'layers/1/kernel']
    assert_zeros_are_exact_and_stay(history, rising)


def test_replicated_over_eight_devices_nothing_changes() -> None:
    mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
    replicated = jax.device_put(linen_params(), NamedSharding(mesh, PartitionSpec()))
    _, state, history = train(pruning.prune(adam(), RISING), replicated)
    assert len(state.masks['layers_0/kernel'].sharding.device_set) == 8
    assert_zeros_are_exact_and_stay(history, rising)
    _, alone, _ = scheduled(adam, 'float32')
    jax.tree.map(np.testing.assert_array_equal, state.masks, alone.masks)


def test_layer_masks_prune_every_array_alike() -> None:
    _, _, history = train(pruning.prune(optax.sgd(0.05), RISING, masks=pruning.layer_masks), linen_params())
    for path in history[0]:
        assert_zeros_are_exact_and_stay(({path: history[0][path]}, {path: history[1][path]}, history[2]), rising)


def test_a_falling_schedule_brings_nothing_back() -> None:
    schedule = lambda t: jnp.where(t < 3, 0.25, jnp.where(t < 6, 0.5, 0.1))  # noqa: E731
    _, _, history = train(pruning.prune(optax.sgd(0.05), schedule), linen_params(), 9)
    assert_zeros_are_exact_and_stay(history, lambda t: 0.25 if t < 3 else 0.5)


@pytest.mark.parametrize('inner', [optax.adam(0.05), optax.sgd(0.05, momentum=0.9)], ids=['adam', 'momentum'])
@standard
def test_masking_gradients_alone_would_revive_weights(inner: optax.GradientTransformation) -> None:
    """The reason for `prune`: momentum from before a weight was pruned moves it off zero again."""
    weights = jnp.asarray(np.random.default_rng(0).standard_normal((6, 8)), jnp.float32)

    @jax.jit
    def naive(params: jax.Array, state: Any, gradient: jax.Array, mask: jax.Array) -> tuple[jax.Array, Any]:
        updates, state = inner.update(jnp.where(mask, gradient, 0.0), state, params)
        return optax.apply_updates(params, updates), state

    params, state, mask = weights, inner.init(weights), jnp.ones((6, 8), bool)
    for t, gradient in enumerate(noise(weights, 12)):
        if t == 5:
            mask = jnp.asarray(np.abs(params) > np.median(np.abs(params)))
            params = jnp.asarray(np.where(mask, params, np.float32(0)))
        params, state = naive(params, state, gradient, mask)
    assert (~mask).sum() == 24
    assert np.all(np.asarray(params)[~mask] != 0)
    ours, state, _ = train(pruning.prune(inner, lambda t: jnp.where(t < 5, 0.0, 0.5)), {'kernel': weights}, 12)
    pruned = np.asarray(ours['kernel'])[~state.masks['kernel']]
    assert pruned.size == 24
    assert np.all(pruned == 0)


@pytest.mark.parametrize('inner', [adam, momentum])
@standard
def test_poisonous_gradients_of_pruned_weights_do_no_harm(inner: Callable) -> None:
    """Neither to the weight nor, through the optimizer's state, to any other, a global norm included."""
    optimizer = pruning.prune(optax.chain(optax.clip_by_global_norm(1.0), inner()), 0.5)
    update = jax.jit(optimizer.update)
    gradients = noise(linen_params(), 4)

    def run(poison: float) -> tuple[Any, Any]:
        params, state = linen_params(), optimizer.init(linen_params())
        for t in range(4):
            poisoned = lambda path, g: jnp.where(state.masks[path], g, poison) if path in state.masks else g  # noqa: B023, E731
            gradient = paths.map_with_paths(poisoned, at(t, gradients)) if t else at(t, gradients)
            updates, state = update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    clean = run(0.0)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(clean))
    for poison in (np.nan, np.inf, -np.inf):
        jax.tree.map(np.testing.assert_array_equal, run(poison), clean)


@pytest.mark.parametrize('sparsity', [0.0, 0.5])
@standard
def test_one_update_is_that_of_the_inner_optimizer_but_for_the_pruned_weights(sparsity: float) -> None:
    """By hand: the smallest weights, as the inner step leaves them, go to zero; other updates are bitwise the inner ones."""
    params = linen_params()
    gradient = at(0, noise(params, 1))
    inner = momentum()
    plain, inner_state = inner.update(gradient, inner.init(params), params)
    optimizer = pruning.prune(inner, sparsity)
    ours, state = optimizer.update(gradient, optimizer.init(params), params)
    moved = paths.leaves_with_paths(optax.apply_updates(params, plain))
    weights = np.concatenate([np.abs(moved[path]).ravel() for path in state.masks])
    threshold = np.sort(weights)[int(80 * sparsity)]
    jax.tree.map(np.testing.assert_array_equal, state.inner, inner_state)
    plain, ours, before = map(paths.leaves_with_paths, (plain, ours, params))
    assert sorted(state.masks) == ['layers_0/kernel', 'layers_2/kernel']
    for path, update in ours.items():
        if path in state.masks:
            np.testing.assert_array_equal(state.masks[path], np.abs(moved[path]) >= threshold)
            np.testing.assert_array_equal(update, np.where(state.masks[path], plain[path], -before[path]))
        else:
            np.testing.assert_array_equal(update, plain[path])


def test_scores_decide_who_goes() -> None:
    """Scores the other way round prune the largest; a pruned weight ranks last whatever its score."""
    largest_first = lambda weights, gradients: {path: -jnp.abs(w) for path, w in weights.items()}  # noqa: E731
    params = {'kernel': jnp.array([[4.0, 3.0], [2.0, 1.0]])}
    optimizer = pruning.prune(optax.sgd(0.0), lambda t: (t + 1) / 4, scores=largest_first)
    state, left = optimizer.init(params), []
    for _ in range(4):
        updates, state = optimizer.update(params, state, params)
        params = optax.apply_updates(params, updates)
        left.append(np.asarray(params['kernel']).ravel().tolist())
    assert left == [[0, 3, 2, 1], [0, 0, 2, 1], [0, 0, 0, 1], [0, 0, 0, 0]]


@pytest.mark.parametrize(
    'leaves, chosen',
    [
        ('layers_0/*', ['layers_0/bias', 'layers_0/kernel']),
        ('*/kernel', ['layers_0/kernel', 'layers_2/kernel']),
        (('layers_2/kernel', '*/bias'), ['layers_0/bias', 'layers_2/bias', 'layers_2/kernel']),
        (lambda path, leaf: leaf.size > 32, ['layers_0/kernel']),
        (lambda path, leaf: path.startswith('layers_2'), ['layers_2/bias', 'layers_2/kernel']),
    ],
)
def test_patterns_and_predicates_say_what_is_pruned(leaves: Any, chosen: list[str]) -> None:
    optimizer = pruning.prune(optax.sgd(0.1), 1.0, leaves=leaves)
    assert sorted(optimizer.init(linen_params()).masks) == chosen


def test_only_what_the_pattern_picks_is_pruned() -> None:
    params = linen_params()
    optimizer = pruning.prune(optax.sgd(0.1), 1.0, leaves='layers_0/*')
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    for path, weight in paths.leaves_with_paths(optax.apply_updates(params, updates)).items():
        assert np.all(weight == 0) if path.startswith('layers_0/') else np.all(weight != 0), path


def test_what_picks_nothing_is_an_error_that_lists_the_paths() -> None:
    listed = 'there are: layers_0/bias, layers_0/kernel, layers_2/bias, layers_2/kernel'
    for leaves, message in (
        ('*/kernels', f"the pattern '\\*/kernels' matches no path; {listed}"),
        (('*/kernel', 'head/*'), f"the pattern 'head/\\*' matches no path; {listed}"),
        (lambda path, leaf: False, f'the predicate picks no array; {listed}'),
    ):
        with pytest.raises(ValueError, match=message):
            pruning.prune(optax.sgd(0.1), 0.5, leaves=leaves).init(linen_params())


@pytest.mark.parametrize('sparsity', [-0.1, 1.5, float('nan')])
def test_sparsity_out_of_range_is_an_error(sparsity: float) -> None:
    with pytest.raises(ValueError, match=f'prune: sparsity must be between 0 and 1, got {sparsity}'):
        pruning.prune(optax.sgd(0.1), sparsity)


def test_update_without_params_is_an_error() -> None:
    optimizer = pruning.prune(optax.sgd(0.1), 0.5)
    with pytest.raises(ValueError, match='prune: update needs params'):
        optimizer.update(linen_params(), optimizer.init(linen_params()))


PRUNED = pruning.prune(optax.adam(0.1), 0.5)
OUTERMOST = {
    'alone': PRUNED,
    'of a chain': pruning.prune(optax.chain(optax.clip(1.0), optax.scale(-0.1)), 0.5),
    'last in a chain': optax.chain(optax.clip(1.0), PRUNED),
    'last by name': optax.named_chain(('b', optax.clip(1.0)), ('a', PRUNED)),
    'last in the last chain': optax.chain(optax.clip(1.0), optax.chain(optax.clip(1.0), PRUNED)),
    'in prune': pruning.prune(PRUNED, 0.5, leaves='layers_0/*'),
    'averaged': optimizers.average_parameters(PRUNED),
    'accumulated': optax.MultiSteps(PRUNED, 2),
    'some trained': optimizers.train_only(pruning.prune(optax.adam(0.1), 0.5), 'layers_0/*'),
    'if finite': optax.apply_if_finite(PRUNED, 3),
    'injected': optax.inject_hyperparams(lambda rate: pruning.prune(optax.adam(rate), 0.5))(0.1),
    'rewinding': pruning.rewinding(pruning.prune(optax.adam(0.1), pruning.one_shot(0.5, 2)), 1),
    'nothing': optax.adamw(0.1),
    'side by side': optax.partition({'a': PRUNED, 'b': PRUNED}, {'layers_0': 'a', 'layers_2': 'b'}),
}
COVERED = {
    'before a scale': optax.chain(PRUNED, optax.scale(0.5)),
    'before, by name': optax.named_chain(('b', PRUNED), ('a', optax.scale(0.5))),
    'in a chain before a scale': optax.chain(optax.chain(optax.clip(1.0), PRUNED), optax.scale(0.5)),
    'wrapped before a scale': optax.chain(optimizers.average_parameters(PRUNED), optax.scale(0.5)),
    'in wrappers': optax.MultiSteps(optimizers.average_parameters(optax.chain(PRUNED, optax.scale(0.5))), 2),
    'some trained': optimizers.train_only(optax.chain(PRUNED, optax.scale(0.5)), 'layers_0/*'),
    'injected': optax.inject_hyperparams(lambda rate: optax.chain(PRUNED, optax.scale(rate)))(0.1),
    'in prune': pruning.prune(optax.chain(PRUNED, optax.scale(0.5)), 0.5),
}


@pytest.mark.parametrize('name', OUTERMOST)
def test_prune_is_outermost(name: str) -> None:
    pruning.check_outermost(OUTERMOST[name].init(linen_params()))
    pruning.check_outermost(jax.eval_shape(OUTERMOST[name].init, linen_params()))


@pytest.mark.parametrize('name', COVERED)
def test_prune_before_something_else_in_a_chain_is_an_error(name: str) -> None:
    state = COVERED[name].init(linen_params())
    for found in (state, jax.eval_shape(COVERED[name].init, linen_params()), jax.jit(lambda x: x)(state)):
        with pytest.raises(
            ValueError, match=r'^prune must be the last of a chain, or .* optax.chain\(\.\.\., prune\(\.\.\.\)\)$'
        ):
            pruning.check_outermost(found)


def test_prune_runs_without_jit() -> None:
    params = {'kernel': jnp.array([[3.0, -1.0], [0.5, 2.0]])}
    optimizer = pruning.prune(optax.sgd(0.0), pruning.cubic(0.5, begin=0, end=1))
    with jax.disable_jit():
        updates, state = optimizer.update(params, optimizer.init(params)._replace(step=jnp.int32(1)), params)
    np.testing.assert_array_equal(optax.apply_updates(params, updates)['kernel'], [[3, 0], [0, 2]])
    assert state.sparsity == 0.5


def test_extra_arguments_reach_the_inner_optimizer() -> None:
    def update(updates: Any, state: Any, params: Any = None, *, factor: float, **extra: Any) -> Any:
        del params, extra
        return jax.tree.map(lambda u: factor * u, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    params = {'kernel': jnp.ones((2, 2))}
    optimizer = pruning.prune(inner, 0.0)
    updates, _ = optimizer.update(params, optimizer.init(params), params, factor=3.0)
    np.testing.assert_array_equal(updates['kernel'], 3.0)


def test_state_is_a_tree_of_arrays_and_training_goes_on_from_its_leaves() -> None:
    optimizer = pruning.prune(optax.sgd(0.05, momentum=0.9), pruning.cubic(0.8, begin=2, end=8))
    update = jax.jit(optimizer.update)

    def run(saved: bool) -> tuple[Any, Any]:
        params, state = linen_params(), optimizer.init(linen_params())
        gradients = noise(params, 10)
        for t in range(10):
            updates, state = update(at(t, gradients), state, params)
            params = optax.apply_updates(params, updates)
            if saved:
                leaves, structure = jax.tree.flatten(state)
                state = structure.unflatten([jnp.asarray(np.array(leaf)) for leaf in leaves])
        return params, state

    through, saved = run(False), run(True)
    assert jax.tree.structure(saved) == jax.tree.structure(through)
    jax.tree.map(np.testing.assert_array_equal, saved, through)
    state = through[1]
    assert isinstance(state, pruning.PruneState)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    # Every step gives a state of the same shapes and dtypes, as scan and checkpoints need.
    fresh = optimizer.init(linen_params())
    assert jax.tree.map(lambda x: (x.shape, x.dtype), fresh) == jax.tree.map(lambda x: (x.shape, x.dtype), state)


@standard
def test_updates_of_lower_precision_than_the_weights_still_give_exact_zeros() -> None:
    lower = optax.stateless(lambda updates, params: jax.tree.map(lambda u: u.astype(jnp.bfloat16), updates))
    params = {'kernel': jax.random.normal(jax.random.key(0), (4, 4))}
    optimizer = pruning.prune(optax.chain(optax.sgd(0.1), lower), 0.5)
    updates, state = optimizer.update(params, optimizer.init(params), params)
    pruned = np.asarray(optax.apply_updates(params, updates)['kernel'])[~state.masks['kernel']]
    assert pruned.size == 8
    np.testing.assert_array_equal(pruned, 0)


def test_apply_masks_sets_what_is_pruned_to_zero_and_leaves_the_rest() -> None:
    params = {'a': {'kernel': jnp.array([[1.0, -2.0], [jnp.nan, jnp.inf]], jnp.bfloat16), 'bias': jnp.ones(2)}}
    got = pruning.apply_masks({'a/kernel': jnp.array([[True, False], [False, False]])}, params)
    np.testing.assert_array_equal(got['a']['kernel'], [[1, 0], [0, 0]])
    assert got['a']['kernel'].dtype == jnp.bfloat16
    assert got['a']['bias'] is params['a']['bias']
