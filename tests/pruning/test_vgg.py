"""Seed S46 on a whole VGG16: 30 % of every convolution, batch norm and dense kernel by magnitude, and rows of dense kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdjax import models, paths, pruning


@pytest.fixture(scope='module')
def weights():
    """All that has a magnitude worth comparing, by path, drawn in numpy: an initial norm is all ones."""
    module = models.VGG(classes=10)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.ones((1, 32, 32, 3)))['params']
    rng = np.random.default_rng(0)
    return paths.map_with_paths(lambda path, leaf: rng.standard_normal(leaf.shape, np.float32), shapes)


def test_thirty_percent_of_every_convolution_norm_and_dense_kernel(weights):
    optimizer = pruning.prune(optax.sgd(0.0), 0.3, leaves=['*/kernel', '*/scale'], masks=pruning.layer_masks)

    @jax.jit
    def step(params):
        state = optimizer.init(params)
        updates, state = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)
        return optax.apply_updates(params, updates), state.masks

    pruned, masks = step(weights)
    assert len(masks) == 13 + 13 + 2
    before, after = paths.leaves_with_paths(weights), paths.leaves_with_paths(pruned)
    for path, mask in masks.items():
        magnitudes = np.sort(np.abs(before[path]).ravel())
        threshold = magnitudes[round(0.3 * magnitudes.size)]
        np.testing.assert_array_equal(mask, np.abs(before[path]) >= threshold)
        np.testing.assert_array_equal(after[path], np.where(np.abs(before[path]) >= threshold, before[path], 0))
    for path in before.keys() - masks.keys():
        np.testing.assert_array_equal(after[path], before[path])


@pytest.mark.parametrize('order', [1, 2, np.inf])
def test_rows_of_dense_kernels_by_any_norm(weights, order):
    dense = paths.select(['hidden*/kernel', 'head/kernel'], weights)
    # The slices of outputs: what other frameworks, with kernels [outputs, inputs], call rows.
    masks = pruning.layer_masks(pruning.filter_norms(order)(dense, {}), 0.25)
    for path, kernel in dense.items():
        norms = np.linalg.norm(kernel.astype(np.float64), ord=order, axis=0)
        kept = norms >= np.sort(norms)[round(0.25 * norms.size)]
        assert masks[path].shape == (1, kernel.shape[1])
        np.testing.assert_array_equal(masks[path][0], kept)
        zeroed = pruning.apply_masks({path: masks[path]}, {path: kernel})
        assert not np.asarray(zeroed[path])[:, ~kept].any()
