"""Which positions of features count, the weights of means, and an objective over some positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.objective_checks import features, init_error

from kdjax import objectives
from kdjax.networks import Outputs
from kdjax.objectives._positions import feature_counts, pool_positions, positions_average

RNG = np.random.default_rng(0)
PIXELS = np.zeros((2, 4, 6), bool)
PIXELS[0, :3, :1] = PIXELS[1, 0, 5] = True
TOKENS = np.array([[True, True, False, False], [False, False, False, False]])


def value(objective, student, teacher, batch):
    """The loss, and the terms' metrics."""
    state = {name: {} for name in objective.names}
    return objective.apply(state, state, student, teacher, batch, step=0)[:2]


def test_channels_are_no_positions_however_many_there_are():
    """A mask [2, 4] over a pooled feature [2, 4] says which examples count."""
    np.testing.assert_array_equal(feature_counts({'mask': TOKENS}, (2, 4)), [[True], [False]])
    np.testing.assert_array_equal(feature_counts({'mask': TOKENS}, (2, 4, 4))[..., 0], TOKENS)
    np.testing.assert_array_equal(feature_counts({'mask': TOKENS[:, 0]}, (2, 4, 4, 3)), TOKENS[:, :1].reshape(2, 1, 1, 1))
    assert feature_counts({}, (2, 4)) is None


def test_a_position_of_a_smaller_map_counts_where_any_of_its_pixels_does():
    expected = PIXELS.reshape(2, 2, 2, 3, 2).any((2, 4))
    np.testing.assert_array_equal(feature_counts({'mask': PIXELS}, (2, 2, 3, 7))[..., 0], expected)
    weights = {'weights': PIXELS.astype(np.float32), 'mask': np.array([True, False])}
    np.testing.assert_array_equal(feature_counts(weights, (2, 2, 3, 7))[..., 0], expected & [[[True]], [[False]]])


@pytest.mark.parametrize('shape', [(2, 3, 3, 5), (2, 8, 12, 5), (2, 12, 5), (1, 2, 3, 5)], ids=str)
def test_other_ratios_are_refused(shape):
    with pytest.raises(ValueError, match=r'^a mask or weights \(2, 4, 6\) do not fit a feature [^\n]+$'):
        feature_counts({'mask': PIXELS}, shape)


def test_averages_and_pools_are_over_the_positions_that_count():
    x = RNG.normal(size=(2, 4, 6, 3)).astype(np.float32)
    junk = np.where(PIXELS[..., None], x, np.float32(np.nan))
    kept = PIXELS[..., None].astype(np.float32)
    expected = (x * kept).sum((1, 2)) / kept.sum((1, 2))
    np.testing.assert_allclose(positions_average({'mask': PIXELS}, junk), expected, rtol=1e-5)
    windows = (x * kept).reshape(2, 2, 2, 3, 2, 3).sum((2, 4)), kept.reshape(2, 2, 2, 3, 2, 1).sum((2, 4))
    pooled = pool_positions({'mask': PIXELS}, junk, (2, 3))
    np.testing.assert_allclose(pooled, windows[0] / np.maximum(windows[1], 1), rtol=1e-5, atol=1e-6)


def test_means_divide_by_the_sum_of_the_weights():
    """Of examples, of positions, and where values have fewer positions than the weights."""
    logits = RNG.normal(size=(2, 4, 3)).astype(np.float32)
    weights = np.abs(RNG.normal(size=(2, 4))).astype(np.float32)
    student, teacher = Outputs(logits), Outputs(np.zeros_like(logits))
    squares = (logits.astype(np.float64) ** 2).mean(-1)
    for each in (weights, weights[:, 0]):
        loss, metrics = value(objectives.logit_mse(), student, teacher, {'weights': each})
        spread = np.broadcast_to(each.reshape(2, -1), (2, 4))
        np.testing.assert_allclose(loss, (spread * squares).sum() / spread.sum(), rtol=1e-5)
        np.testing.assert_allclose(metrics['logit_mse'].count, spread.sum(), rtol=1e-5)
    loss, _ = value(
        objectives.from_function('mean', lambda s, t, b: jnp.array([1.0, 3.0])), student, teacher, {'weights': weights}
    )
    heaviest = weights.max(1)
    np.testing.assert_allclose(loss, (heaviest[0] + 3 * heaviest[1]) / heaviest.sum(), rtol=1e-5)


def test_weights_that_weigh_nothing_are_refused_where_they_are_at_hand():
    student = Outputs(np.zeros((2, 3), np.float32))
    for bad in (np.nan, -1.0, np.inf):
        batch = {'weights': np.array([bad, 1.0], np.float32)}
        with pytest.raises(ValueError, match=r"^batch\['weights'\] must be finite and not negative, got [^\n]+$"):
            objectives.logit_mse().check(student, student, batch)
        objectives.logit_mse().check(student, student, {**batch, 'mask': np.array([False, True])})
    metric = objectives.batch_mean(jnp.ones(2), {'weights': np.array([np.nan, 1.0], np.float32)})
    assert np.isnan(metric.total)


def test_an_objective_over_positions_has_them_for_its_mask():
    """On top of the batch's own, at any place in a sum, and with its check."""
    logits = RNG.normal(size=(2, 4, 3)).astype(np.float32)
    student, teacher = Outputs(logits), Outputs(np.zeros_like(logits))
    completion = np.array([[False, True, True, True], [True, True, False, True]])
    soft, mse = objectives.soft_targets(), objectives.logit_mse()
    objective = 2.0 * objectives.over_positions(mse + soft, 'completion') + mse
    assert objective.names == ('logit_mse_over_completion', 'soft_targets_over_completion', 'logit_mse')
    squares = (logits**2).mean(-1)
    for mask in (TOKENS, np.array([True, False])):
        kept = np.broadcast_to(mask.reshape(2, -1), (2, 4))
        _, metrics = value(objective, student, teacher, {'completion': completion, 'mask': mask})
        for name, where in (('logit_mse_over_completion', kept & completion), ('logit_mse', kept)):
            np.testing.assert_allclose(metrics[name].compute(), squares[where].mean(), rtol=1e-5)
        assert float(metrics['soft_targets_over_completion'].count) == (kept & completion).sum()
    hard = objectives.over_positions(objectives.hard_labels(), 'completion')
    labels = np.where(completion, 1, 77)
    hard.check(student, teacher, {'completion': completion, 'labels': labels})
    with pytest.raises(ValueError, match='must be below 3'):
        hard.check(student, teacher, {'completion': ~completion, 'labels': labels})


@pytest.mark.parametrize(
    'batch, told',
    [
        ({'inputs': np.zeros(2)}, "over_positions needs batch['completion']; the batch has inputs"),
        (
            {'completion': np.ones((2, 4), np.int32)},
            "over_positions: batch['completion'] must be boolean, and fit the mask, got int32 (2, 4)",
        ),
        (
            {'completion': np.ones((2, 3), bool), 'mask': TOKENS},
            "over_positions: batch['completion'] must be boolean, and fit the mask, got bool (2, 3) and a mask bool (2, 4)",
        ),
    ],
)
def test_positions_that_are_not_there_or_do_not_fit_are_named(batch, told):
    outputs = Outputs(np.zeros((2, 4, 3), np.float32))
    assert init_error(objectives.over_positions(objectives.logit_mse(), 'completion'), outputs, outputs, batch) == told


def test_vid_predicts_tokens_and_embeddings_too():
    for shape in ((2, 4), (2,)):
        student, teacher = (features(x=RNG.normal(size=(*shape, n)).astype(np.float32)) for n in (3, 5))
        params, state = jax.jit(objectives.vid('x', 'x').init)(jax.random.key(0), student, teacher, {})
        assert np.isfinite(objectives.vid('x', 'x').apply(params, state, student, teacher, {}, step=0)[0])
