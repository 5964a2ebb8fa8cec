"""`rewinding`: after every round of pruning, survivors go back and the optimizer starts anew."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdjax import pruning

RNG = np.random.default_rng(0)
PARAMS = {'kernel': RNG.standard_normal((4, 5)), 'bias': RNG.standard_normal(5)}
TARGET = {'kernel': RNG.standard_normal((4, 5)), 'bias': RNG.standard_normal(5)}
RATE, MOMENTUM, STEPS = 0.1, 0.9, 14
ROUNDS = pruning.iterative(0.75, rounds=2, every=4, begin=5)


def gradients(params: Any) -> Any:
    """Of half the squared distance to the target."""
    return jax.tree.map(lambda p, t: p - jnp.asarray(t, p.dtype), params, TARGET)


def train(optimizer: optax.GradientTransformation, dtype: str = 'float32') -> tuple[Any, pruning.RewindState]:
    """Parameters and state after every step, stacked."""

    def step(carry: Any, _: None) -> Any:
        params, state = carry
        updates, state = optimizer.update(gradients(params), state, params)
        carry = optax.apply_updates(params, updates), state
        return carry, carry

    params = jax.tree.map(lambda p: jnp.asarray(p, dtype), PARAMS)
    with jax.numpy_dtype_promotion('standard'):
        return jax.jit(lambda: jax.lax.scan(step, (params, optimizer.init(params)), length=STEPS)[1])()


def by_hand(remembered_at: int) -> list[dict[str, np.ndarray]]:
    """Momentum with pruning of the kernel and rewinding, in double precision."""
    params, trace = dict(PARAMS), {path: np.zeros_like(p) for path, p in PARAMS.items()}
    mask, sparsity, history, remembered = np.ones((4, 5), bool), 0.0, [], {}
    for t in range(STEPS):
        if t == remembered_at:
            remembered = dict(params)
        gradient = {path: p - TARGET[path] for path, p in params.items()}
        gradient['kernel'] = gradient['kernel'] * mask
        trace = {path: MOMENTUM * m + gradient[path] for path, m in trace.items()}
        params = {path: p - RATE * trace[path] for path, p in params.items()}
        wanted = 0.75 if t >= 9 else 0.5 if t >= 5 else 0.0
        if wanted > sparsity:
            ranked = np.where(mask, np.abs(params['kernel']), -1)
            mask = ranked >= np.sort(ranked.ravel())[round(wanted * 20)]
            sparsity = wanted
            if t >= remembered_at:
                params = dict(remembered)
                trace = {path: np.zeros_like(p) for path, p in params.items()}
        params['kernel'] = params['kernel'] * mask
        history.append(params)
    return history


@pytest.mark.parametrize('step', [0, 3, 5, 7])
def test_weights_follow_the_algorithm_by_hand(step: int) -> None:
    """From 7 on, the first round of pruning comes too early to rewind, and the second does."""
    inner = optax.sgd(RATE, momentum=MOMENTUM)
    history, state = train(pruning.rewinding(pruning.prune(inner, ROUNDS, leaves='kernel'), step))
    for t, wanted in enumerate(by_hand(step)):
        for path, weight in wanted.items():
            np.testing.assert_allclose(history[path][t], weight, atol=1e-5)
            np.testing.assert_array_equal(history[path][t] == 0, weight == 0)
    np.testing.assert_array_equal(state.pruned.sparsity, [0.0] * 5 + [0.5] * 4 + [0.75] * 5)
    before = PARAMS['kernel'] if step == 0 else by_hand(step)[step - 1]['kernel']
    np.testing.assert_allclose(state.weights['kernel'][-1], before, atol=1e-5)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_adam_starts_anew_and_the_rest_goes_on(dtype: str) -> None:
    optimizer = pruning.rewinding(pruning.prune(optax.adamw(0.05, weight_decay=0.1), ROUNDS), 2)
    history, state = train(optimizer, dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(history)} == {jnp.dtype(dtype)}
    adam = state.pruned.inner[0]
    np.testing.assert_array_equal(adam.count, [1, 2, 3, 4, 5, 0, 1, 2, 3, 0, 1, 2, 3, 4])
    np.testing.assert_array_equal(state.pruned.step, np.arange(1, STEPS + 1))
    for t in (5, 9):
        assert all(not np.any(leaf[t]) for leaf in jax.tree.leaves((adam.mu, adam.nu)))
        mask, eps = np.asarray(state.pruned.masks['kernel'][t]), float(jnp.finfo(dtype).eps)
        for path, kept in (('kernel', mask), ('bias', True)):
            # What was remembered is what training left after two steps, to the bit; and rewinding rounds once.
            np.testing.assert_array_equal(state.weights[path][t], history[path][1])
            left = np.asarray(history[path][t - 1], np.float64)
            wanted = np.where(kept, np.asarray(history[path][1], np.float64), 0)
            scale = np.maximum(np.abs(left), np.abs(wanted)).max()
            np.testing.assert_allclose(np.asarray(history[path][t], np.float64), wanted, rtol=0, atol=2 * eps * scale)
    pruned = ~np.asarray(state.pruned.masks['kernel'])
    np.testing.assert_array_equal(pruned.sum((1, 2)), [0] * 5 + [10] * 4 + [15] * 5)
    np.testing.assert_array_equal(np.asarray(history['kernel'], np.float32) == 0, pruned)


def test_whole_filters_rewind_too() -> None:
    pruned = pruning.prune(optax.sgd(RATE), ROUNDS, leaves='kernel', scores=pruning.filter_norms())
    history, state = train(pruning.rewinding(pruned, 0))
    assert state.pruned.masks['kernel'].shape == (STEPS, 1, 5)
    np.testing.assert_allclose(history['kernel'][5], np.where(state.pruned.masks['kernel'][5], PARAMS['kernel'], 0), atol=1e-6)


def test_parameters_and_state_can_be_donated_together() -> None:
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), PARAMS)
    optimizer = pruning.rewinding(pruning.prune(optax.sgd(RATE), ROUNDS), 0)
    state = optimizer.init(params)
    jax.jit(lambda params, state: optimizer.update(params, state, params), donate_argnums=(0, 1))(params, state)


def test_what_cannot_be_rewound_is_an_error() -> None:
    pruned = pruning.prune(optax.sgd(RATE), ROUNDS)
    params = {'kernel': jnp.ones((2, 2))}
    with pytest.raises(ValueError, match='rewinding: step must not be negative, got -1'):
        pruning.rewinding(pruned, -1)
    with pytest.raises(ValueError, match=r'rewinding: needs prune\(...\) itself, got a transformation with a tuple'):
        pruning.rewinding(optax.chain(pruned, optax.scale(1.0)), 0).init(params)
    optimizer = pruning.rewinding(pruned, 0)
    with pytest.raises(ValueError, match='rewinding: update needs params'):
        optimizer.update(params, optimizer.init(params))
