"""`prune` with every score and every mask: whole filters, patterns, blocks; and what does not fit is an error at once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdjax import paths, pruning

STEPS = 40
RISING = pruning.cubic(0.75, begin=5, end=30)
RNG = np.random.default_rng(0)


def drawn(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


PARAMS = {'conv': {'kernel': drawn(3, 3, 4, 8), 'bias': drawn(8)}, 'dense': {'kernel': drawn(8, 12)}}
GRADIENTS = jax.tree.map(lambda p: drawn(STEPS, *p.shape), PARAMS)
SIZES = {'conv/kernel': 288, 'dense/kernel': 96}


def train(optimizer: optax.GradientTransformation) -> tuple[Any, pruning.PruneState]:
    """Weights and state after every step, stacked; optax's Adam promotes dtypes."""

    def step(carry: Any, gradient: Any) -> Any:
        params, state = carry
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (paths.leaves_with_paths(params), state)

    with jax.numpy_dtype_promotion('standard'):
        return jax.jit(lambda params: jax.lax.scan(step, (params, optimizer.init(params)), GRADIENTS)[1])(PARAMS)


def layers(numbers: dict[str, int]) -> Callable[[dict[str, np.ndarray], float], None]:
    def check(pruned: dict[str, np.ndarray], sparsity: float) -> None:
        for path, number in numbers.items():
            assert pruned[path].sum() == round(sparsity * number)

    return check


def together(number: int) -> Callable[[dict[str, np.ndarray], float], None]:
    def check(pruned: dict[str, np.ndarray], sparsity: float) -> None:
        assert sum(mask.sum() for mask in pruned.values()) == round(sparsity * number)

    return check


def two_of_four(pruned: dict[str, np.ndarray], sparsity: float) -> None:
    for mask in pruned.values():
        groups = np.moveaxis(mask, -2, -1).reshape(-1, 4)
        np.testing.assert_array_equal(groups.sum(1), min(round(sparsity * 4), 2))


def blocks_of_two_by_four(pruned: dict[str, np.ndarray], sparsity: float) -> None:
    sums = [m.reshape(*m.shape[:-2], m.shape[-2] // 2, 2, m.shape[-1] // 4, 4).sum((-3, -1)) for m in pruned.values()]
    assert set(np.concatenate([s.ravel() for s in sums])) <= {0, 8}
    assert sum(s.sum() for s in sums) == 8 * round(sparsity * 48)


@pytest.mark.parametrize(
    'scores, masks, check',
    [
        (pruning.filter_norms(2), pruning.layer_masks, layers({'conv/kernel': 8, 'dense/kernel': 12})),
        (pruning.channel_norms(), pruning.layer_masks, layers({'conv/kernel': 4, 'dense/kernel': 8})),
        (pruning.filter_norms(), pruning.global_masks, together(20)),
        (pruning.saliency, pruning.layer_masks, layers(SIZES)),
        (pruning.saliency, pruning.erk_masks, together(384)),
        (pruning.random_scores(jax.random.key(0)), pruning.global_masks, together(384)),
        (pruning.magnitude, pruning.n_m_masks(2, 4), two_of_four),
        (pruning.saliency, pruning.block_masks((2, 4)), blocks_of_two_by_four),
    ],
    ids=['filters', 'channels', 'filters of all', 'saliency', 'erk', 'random', 'two of four', 'blocks'],
)
def test_zeros_are_whole_exact_and_stay(scores: Any, masks: Any, check: Any) -> None:
    optimizer = pruning.prune(optax.adamw(0.05, weight_decay=0.1), RISING, scores=scores, masks=masks)
    weights, state = train(optimizer)
    found = {path: np.asarray(mask) for path, mask in state.masks.items()}
    assert sorted(found) == sorted(SIZES)
    for path, mask in found.items():
        # The zeros are the pruned weights, to the last one.
        np.testing.assert_array_equal(np.asarray(weights[path]) == 0, ~np.broadcast_to(mask, weights[path].shape))
        assert not np.any(mask[1:] & ~mask[:-1]), 'a pruned weight came back'
    for t in range(STEPS):
        check({path: ~mask[t] for path, mask in found.items()}, float(RISING(t)))
    assert np.all(np.asarray(weights['conv/bias']) != 0)


def test_masks_of_filters_take_a_number_per_filter() -> None:
    state = pruning.prune(optax.sgd(0.1), 0.5, scores=pruning.filter_norms()).init(PARAMS)
    assert {path: mask.shape for path, mask in state.masks.items()} == {'conv/kernel': (1, 1, 1, 8), 'dense/kernel': (1, 12)}


def test_saliency_takes_the_gradients_of_the_step() -> None:
    params = {'kernel': jnp.array([[1.0, 2.0], [3.0, 4.0]])}
    gradients = {'kernel': jnp.array([[8.0, 1.0], [2.0, -1.0]])}
    optimizer = pruning.prune(optax.sgd(0.0), 0.5, scores=pruning.saliency)
    _, state = optimizer.update(gradients, optimizer.init(params), params)
    np.testing.assert_array_equal(state.masks['kernel'], [[True, False], [True, False]])


@pytest.mark.parametrize('worst', [-np.inf, np.inf, np.nan, -np.nan])
def test_no_score_brings_a_pruned_weight_back(worst: float) -> None:
    """The first weight goes first; then the other scores become as bad as can be."""
    params = {'kernel': jnp.array([[1.0], [2.0], [3.0], [4.0]])}
    scores = lambda weights, gradients: {'kernel': jnp.where(weights['kernel'] == 1, -1.0, gradients['kernel'])}  # noqa: E731
    optimizer = pruning.prune(optax.sgd(0.0), lambda t: (t + 1) / 4, scores=scores)
    update = jax.jit(optimizer.update)
    updates, state = update(params, optimizer.init(params), params)
    np.testing.assert_array_equal(state.masks['kernel'].ravel(), [False, True, True, True])
    params = optax.apply_updates(params, updates)
    _, state = update({'kernel': jnp.full((4, 1), worst)}, state, params)
    assert not state.masks['kernel'][0, 0]
    assert state.masks['kernel'].sum() == 2


# Numbers of 30 % in PyTorch, int(round(0.3 * n)) with halves to even, for every weight of a network like VGG.

SCALE = [0.5, -2.0, 3.0, 0.25, 1.0]  # 1.5 of 5 are 2
CONV = [[9, -1, 8, 2, -7], [-3, 6, 4, -5, 10], [15, -14, 13, -12, 11]]  # 4.5 of 15 are 4
DENSE = [[1, -4, 2, 0.5], [-1, 3, 2, 3], [1, 0, -3, 3.5]]


def test_thirty_percent_of_every_kernel_and_scale_go() -> None:
    """`l1_unstructured(amount=0.3)` of convolutions, batch norm and dense layers, each of its own; biases stay."""
    params = {
        'conv': {'kernel': jnp.array(CONV, jnp.float32).reshape(1, 1, 3, 5), 'bias': jnp.zeros(5)},
        'norm': {'scale': jnp.array(SCALE), 'bias': jnp.zeros(5)},
        'dense': {'kernel': jnp.array(DENSE), 'bias': jnp.zeros(4)},
    }
    optimizer = pruning.prune(optax.sgd(0.0), 0.3, leaves=['*/kernel', '*/scale'], masks=pruning.layer_masks)
    updates, state = optimizer.update(params, optimizer.init(params), params)
    assert sorted(state.masks) == ['conv/kernel', 'dense/kernel', 'norm/scale']
    got = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(got['norm']['scale'], [0, -2, 3, 0, 1])
    np.testing.assert_array_equal(got['conv']['kernel'][0, 0], [[9, 0, 8, 0, -7], [0, 6, 0, -5, 10], CONV[2]])
    # The third of the equal ones is the one more to go: 3.6 of 12 are 4, and the later goes.
    np.testing.assert_array_equal(got['dense']['kernel'], [[1, -4, 2, 0], [0, 3, 2, 3], [0, 0, -3, 3.5]])


@pytest.mark.parametrize('order, kept', [(1, [0, 1, 0, 1]), (2, [0, 1, 1, 0]), (np.inf, [0, 0, 1, 1])])
def test_rows_of_dense_layers_go_whole(order: float, kept: list[int]) -> None:
    """`ln_structured(amount=0.5, dim=0)`: PyTorch's rows are the outputs, which are columns here.

    Norms of order 1 are 3, 10.5, 6, 8; of order 2 they are √3, √36.75, √36, √32; and of order ∞ 1, 3.5, 6, 4.
    """
    params = {'kernel': jnp.array([[1.0, 3.5, -6.0, 4.0], [-1.0, -3.5, 0.0, -4.0], [1.0, 3.5, 0.0, 0.0]])}
    optimizer = pruning.prune(optax.sgd(0.0), 0.5, scores=pruning.filter_norms(order), masks=pruning.layer_masks)
    updates, state = optimizer.update(params, optimizer.init(params), params)
    np.testing.assert_array_equal(state.masks['kernel'], [kept])
    np.testing.assert_array_equal(
        optax.apply_updates(params, updates)['kernel'], params['kernel'] * np.array([kept], np.float32)
    )


@pytest.mark.parametrize(
    'options, message',
    [
        ({'masks': pruning.n_m_masks(2, 3)}, 'n_m_masks: 2 of 3 is a sparsity of 0.333333, got 0.5'),
        ({'masks': pruning.n_m_masks(4, 8)}, r'n_m_masks: conv/kernel has scores of shape \(3, 3, 4, 8\), whose axis -2'),
        ({'masks': pruning.block_masks((8, 8))}, 'block_masks: conv/kernel has scores of shape'),
        ({'scores': pruning.channel_norms(), 'leaves': '*/bias'}, r'slice_norms: conv/bias of shape \(8,\) has no axis -2'),
        ({'scores': lambda weights, gradients: {}}, 'prune: scores returned nothing for conv/kernel'),
        ({'masks': lambda scores, sparsity: {}}, 'prune: masks returned nothing for conv/kernel'),
        (
            {'scores': lambda weights, gradients: {path: jnp.sum(w) for path, w in weights.items()}},
            r'prune: conv/kernel has shape \(3, 3, 4, 8\), its scores \(\) and its mask \(\); scores need that shape, or 1',
        ),
        ({'masks': lambda scores, sparsity: {path: jnp.any(s) for path, s in scores.items()}}, r'and its mask \(\)'),
    ],
)
def test_what_does_not_fit_is_an_error_before_training(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pruning.prune(optax.sgd(0.1), 0.5, **options).init(PARAMS)
