"""`prune` on sharded arrays, vmapped over students, and saved and resumed: always the same weights go."""

import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kdjax import networks, objectives, parallel, paths, pruning, training

STEPS = 200
RISING = pruning.cubic(0.75, begin=3, end=123, every=20)
RNG = np.random.default_rng(0)


def drawn(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


PARAMS = {'hidden': {'kernel': drawn(16, 24), 'bias': drawn(24)}, 'out': {'kernel': drawn(24, 8)}}
GRADIENTS = jax.tree.map(lambda p: drawn(STEPS, *p.shape), PARAMS)
# Fully sharded: every array is cut over all devices, along one axis or another.
PARTS = {
    'hidden': {'kernel': PartitionSpec('data'), 'bias': PartitionSpec('data')},
    'out': {'kernel': PartitionSpec(None, 'data')},
}

OPTIMIZERS = {
    'global': pruning.prune(optax.adamw(0.05, weight_decay=0.1), RISING),
    'filters': pruning.prune(optax.sgd(0.05, momentum=0.9), RISING, scores=pruning.filter_norms(2), masks=pruning.erk_masks),
    'two of four': pruning.prune(optax.sgd(0.05), RISING, scores=pruning.saliency, masks=pruning.n_m_masks(2, 4)),
    'rewinding': pruning.rewinding(
        pruning.prune(optax.sgd(0.05, momentum=0.9), pruning.iterative(0.75, rounds=3, every=6, begin=8)), 4
    ),
}


def train(optimizer: optax.GradientTransformation, params: Any, gradients: Any) -> tuple[Any, Any, jax.Array]:
    """Parameters and state at the end, and whether the zeros were the pruned weights after every step."""

    def step(carry: Any, gradient: Any) -> Any:
        params, state = carry
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        named = paths.leaves_with_paths(params)
        exact = [jnp.all((named[path] == 0) == ~mask) for path, mask in masks_of(state).items()]
        return (params, state), jnp.all(jnp.stack(exact))

    with jax.numpy_dtype_promotion('standard'):
        state = optimizer.init(params)
        carry, exact = jax.jit(lambda *carry: jax.lax.scan(step, carry, gradients))(params, state)
    return *carry, exact


def masks_of(state: Any) -> pruning.Masks:
    return state.pruned.masks if isinstance(state, pruning.RewindState) else state.masks


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_fully_sharded_over_eight_devices_the_same_weights_go(name: str) -> None:
    mesh = parallel.data_parallel()
    sharded = jax.tree.map(lambda p, part: jax.device_put(p, NamedSharding(mesh, part)), PARAMS, PARTS)
    params, state, exact = train(OPTIMIZERS[name], sharded, GRADIENTS)
    assert np.all(exact)
    alone, state_alone, _ = train(OPTIMIZERS[name], jax.tree.map(jnp.asarray, PARAMS), GRADIENTS)
    jax.tree.map(np.testing.assert_array_equal, masks_of(state), masks_of(state_alone))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), params, alone)
    for path, weight in paths.leaves_with_paths(params).items():
        assert weight.sharding.shard_shape(weight.shape) != weight.shape, path
        if path in masks_of(state):
            mask = np.asarray(masks_of(state)[path])
            assert 0 < mask.sum() < mask.size


def test_masks_lie_beside_their_weights() -> None:
    mesh = parallel.data_parallel()
    sharded = jax.tree.map(lambda p, part: jax.device_put(p, NamedSharding(mesh, part)), PARAMS, PARTS)
    masks = OPTIMIZERS['global'].init(sharded).masks
    assert masks['hidden/kernel'].sharding.shard_shape((16, 24)) == (2, 24)
    assert masks['out/kernel'].sharding.shard_shape((24, 8)) == (24, 1)


def test_vmapped_over_a_traced_sparsity_every_student_loses_its_own_share() -> None:
    sparsities = jnp.array([0.0, 0.25, 0.875])

    def one(sparsity: jax.Array) -> Any:
        return train(pruning.prune(optax.sgd(0.05, momentum=0.9), sparsity), jax.tree.map(jnp.asarray, PARAMS), GRADIENTS)

    params, state, exact = jax.vmap(one)(sparsities)
    assert np.all(exact)
    pruned = sum(np.sum(~np.asarray(mask), axis=(1, 2)) for mask in state.masks.values())
    np.testing.assert_array_equal(pruned, [0, 144, 504])
    alone, _, _ = one(sparsities[1])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x[1], y, rtol=1e-5, atol=1e-6), params, alone)


BATCH = {'inputs': jnp.asarray(RNG.normal(size=(8, 4)), jnp.float32), 'labels': jnp.asarray(RNG.integers(0, 4, 8), jnp.int32)}
NETWORK = networks.from_linen(nn.Dense(4))


@pytest.mark.parametrize('rewound', [False, True])
def test_students_of_a_sweep_are_pruned_too(rewound: bool) -> None:
    def make(rate: jax.Array) -> training.Problem:
        pruned = pruning.prune(optax.sgd(rate, momentum=0.9), pruning.one_shot(0.5, 2))
        return training.distillation(
            NETWORK, None, objectives.hard_labels(), pruning.rewinding(pruned, 1) if rewound else pruned
        )

    students = training.sweep(make, jnp.array([0.1, 0.5]))
    state, kernels = jax.jit(students.init)(jax.random.key(0), BATCH), []
    for _ in range(4):
        state, _ = students.step(state, {}, BATCH)
        kernels.append(np.asarray(state.params['kernel']))
    np.testing.assert_array_equal([np.sum(kernel == 0, axis=(1, 2)) for kernel in kernels], [[0, 0], [0, 0], [8, 8], [8, 8]])
    assert np.allclose(kernels[2], np.where(kernels[2] == 0, 0, kernels[0]), atol=1e-6) == rewound


SCHEDULE = pruning.iterative(0.5, rounds=2, every=2, begin=1)
SAVED = {
    'two of four': pruning.prune(optax.adam(0.1), SCHEDULE, masks=pruning.n_m_masks(2, 4)),
    'rewinding': pruning.rewinding(pruning.prune(optax.adam(0.1), SCHEDULE, scores=pruning.filter_norms()), 1),
}


@pytest.mark.parametrize('name', SAVED)
def test_saved_and_resumed_is_as_undisturbed(name: str, tmp_path: pathlib.Path) -> None:
    """Saved between two rounds of pruning."""
    problem = training.distillation(NETWORK, None, objectives.hard_labels(), SAVED[name])
    init = jax.jit(problem.init)

    def run(state: training.TrainState, steps: int) -> training.TrainState:
        for _ in range(steps):
            state, _ = problem.step(state, {}, BATCH)
        return state

    undisturbed = run(init(jax.random.key(0), BATCH), 6)
    with training.checkpoint_manager(tmp_path) as manager:
        training.save(manager, 0, run(init(jax.random.key(0), BATCH), 2))
        manager.wait_until_finished()
        epoch, restored = training.restore_newest(manager, init(jax.random.key(1), BATCH))
    assert epoch == 0
    pruned = ~np.broadcast_to(masks_of(restored.opt_state)['kernel'], (4, 4))
    assert pruned.sum() == 4
    resumed = run(restored._replace(key=jax.random.key(2)), 4)
    assert np.sum(~np.broadcast_to(masks_of(resumed.opt_state)['kernel'], (4, 4))) == 8
    jax.tree.map(np.testing.assert_array_equal, resumed._replace(key=None), undisturbed._replace(key=None))
