"""mixup: blends and their labels, the loss on both labels, and training steps that blend their batch."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdjax import networks, objectives, training
from kdjax.data import augment

INPUTS = np.random.default_rng(0).integers(0, 256, (64, 3, 2, 1)).astype(np.uint8)
BATCH = {'inputs': jnp.asarray(INPUTS), 'labels': jnp.arange(64), 'index': jnp.arange(64) + 100}
KEY = jax.random.key(1)


def test_blends_are_those_of_the_labels_and_shares() -> None:
    """Labels are indices here, so they tell which examples were blended."""
    mixed = jax.jit(augment.mixup(alpha=1.0))(KEY, BATCH)
    share = np.asarray(mixed['share'], np.float64)
    assert 0.5 <= share.min() < 0.6 < 0.9 < share.max() <= 1
    np.testing.assert_array_equal(mixed['labels'], BATCH['labels'])
    np.testing.assert_array_equal(mixed['index'], BATCH['index'])
    assert sorted(mixed['other_labels'].tolist()) == list(range(64))
    assert mixed['inputs'].dtype == jnp.uint8
    weight = share[:, None, None, None]
    blend = weight * INPUTS + (1 - weight) * INPUTS[np.asarray(mixed['other_labels'])]
    np.testing.assert_allclose(np.asarray(mixed['inputs'], np.float64), blend, atol=0.5 + 1e-3)
    exact = augment.mixup(alpha=1.0)(KEY, {**BATCH, 'inputs': jnp.asarray(INPUTS, jnp.float32)})
    np.testing.assert_allclose(exact['inputs'], blend, rtol=1e-5, atol=1e-3)


def test_alpha_zero_blends_nothing_and_small_alpha_little() -> None:
    nothing = augment.mixup(alpha=0)(KEY, BATCH)
    np.testing.assert_array_equal(nothing['inputs'], INPUTS)
    np.testing.assert_array_equal(nothing['share'], 1.0)
    share = augment.mixup(alpha=0.05)(KEY, BATCH)['share']
    assert np.median(share) > 0.99


def test_masks_leave_out_what_is_blended_with_what_they_leave_out() -> None:
    mask = jnp.arange(64) % 4 != 0
    mixed = augment.mixup(alpha=1.0)(KEY, {**BATCH, 'mask': mask})
    np.testing.assert_array_equal(mixed['mask'], mask & mask[mixed['other_labels']])
    unlabelled = augment.mixup(alpha=1.0)(KEY, {'inputs': BATCH['inputs']})
    assert sorted(unlabelled) == ['inputs', 'share']


def test_what_mixup_does_not_know_and_negative_alpha_are_errors() -> None:
    with pytest.raises(ValueError, match=r"mixup: a batch must hold no more than .* got \['teacher_logits'\]"):
        augment.mixup(alpha=1.0)(KEY, {**BATCH, 'teacher_logits': jnp.ones((64, 3))})
    with pytest.raises(ValueError, match='mixup: alpha must not be negative, got -1'):
        augment.mixup(alpha=-1)


def loss_of(logits: jax.Array, batch: dict) -> float:
    student = networks.Outputs(logits)
    params, state = objectives.mixed_labels().init(KEY, student, student, batch)
    return float(objectives.mixed_labels().apply(params, state, student, student, batch, step=0)[0])


def test_loss_is_the_shared_cross_entropy_of_examples_with_both_labels() -> None:
    rng = np.random.default_rng(0)
    logits, share = rng.standard_normal((6, 4)), rng.uniform(0.5, 1, 6)
    labels, other = np.array([0, 1, -1, 3, 2, 2]), np.array([1, 1, 0, -1, 0, 3])
    batch = {'labels': labels, 'other_labels': other, 'share': share.astype(np.float32)}
    batch = {name: jnp.asarray(array) for name, array in batch.items()}
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    each = -share * log_p[np.arange(6), labels] - (1 - share) * log_p[np.arange(6), other]
    kept = (labels >= 0) & (other >= 0)
    np.testing.assert_allclose(loss_of(jnp.asarray(logits, jnp.float32), batch), each[kept].mean(), rtol=1e-5)
    mask = np.array([True, False, True, True, True, False])
    masked = {**batch, 'mask': jnp.asarray(mask)}
    np.testing.assert_allclose(loss_of(jnp.asarray(logits, jnp.float32), masked), each[kept & mask].mean(), rtol=1e-5)


def test_loss_needs_both_labels_in_the_shape_of_the_logits() -> None:
    with pytest.raises(ValueError, match=r"mixed_labels needs batch\['other_labels'\]"):
        loss_of(jnp.ones((2, 3)), {'labels': jnp.zeros(2, jnp.int32)})
    batch = {'labels': jnp.zeros(2, jnp.int32), 'other_labels': jnp.zeros(3, jnp.int32), 'share': jnp.ones(2)}
    with pytest.raises(ValueError, match=r'mixed_labels: other_labels \(3,\) do not fit logits \(2, 3\)'):
        loss_of(jnp.ones((2, 3)), batch)


def test_steps_blend_their_batch_with_a_key_of_their_own() -> None:
    """A step on a batch is the plain step on the blend, which differs from step to step; teacher and student see the same."""
    network = networks.preprocess(
        networks.from_linen(nn.Dense(64)), lambda x: x.reshape(x.shape[0], -1).astype(jnp.float32) / 255
    )
    seen = []

    def mix(key: jax.Array, batch: dict) -> dict:
        mixed = augment.mixup(alpha=1.0)(key, batch)
        jax.debug.callback(lambda inputs: seen.append(np.asarray(inputs)), mixed['inputs'])
        return mixed

    objective = objectives.mixed_labels() + objectives.soft_targets()
    plain = training.distillation(network, network, objective, optax.sgd(0.1))
    mixing = training.transform_batches(plain, mix)
    taught_by = network.init(jax.random.key(7), BATCH['inputs'])
    state = mixing.init(KEY, BATCH)
    before = jax.tree.map(np.asarray, state.params)
    after, _ = mixing.step(state, taught_by, BATCH)
    first = jax.tree.map(np.asarray, after.params)
    mixing.step(after, taught_by, BATCH)
    jax.effects_barrier()
    assert len(seen) >= 2
    assert not np.array_equal(seen[-2], seen[-1])
    again = mixing.init(KEY, BATCH)
    key = jax.random.fold_in(jax.random.fold_in(again.key, 2**32 - 3), 0)
    by_hand, _ = plain.step(again, taught_by, augment.mixup(alpha=1.0)(key, BATCH))
    assert not np.array_equal(before['kernel'], first['kernel'])
    np.testing.assert_allclose(by_hand.params['kernel'], first['kernel'], rtol=1e-6, atol=1e-7)


def test_a_function_with_defaults_of_its_own_gets_key_and_batch_alone() -> None:
    """Of any number, as in lambdas that keep what a loop has made; four that are needed get the networks' variables too."""
    network = networks.from_linen(nn.Dense(3))
    plain = training.distillation(network, network, objectives.soft_targets(), optax.sgd(0.1))
    batch = {**BATCH, 'inputs': jnp.asarray(BATCH['inputs'], jnp.float32)}
    taught_by = network.init(jax.random.key(7), batch['inputs'])

    def loss(transform) -> float:
        problem = training.transform_batches(plain, transform)
        return float(problem.step(problem.init(KEY, batch), taught_by, batch)[1]['loss'].compute())

    def doubled(key, batch, by=2.0, shift=0.0):
        return {**batch, 'inputs': by * batch['inputs'] + shift}

    def marked(key, batch, student_variables, teacher_variables):
        return doubled(key, batch, 1.0 + jnp.mean(teacher_variables['params']['bias']))

    assert loss(doubled) != loss(lambda key, batch: batch)
    assert loss(marked) == loss(lambda key, batch: batch)  # biases begin at zero


def test_mixed_batches_go_through_fit_which_checks_what_the_steps_see() -> None:
    network = networks.from_linen(nn.Dense(3))
    problem = training.distillation(network, None, objectives.mixed_labels(), optax.sgd(0.1))
    problem = training.transform_batches(problem, augment.mixup(alpha=0.2))
    data = {'inputs': np.ones((8, 5), np.float32), 'labels': np.arange(8, dtype=np.int32) % 3}
    arguments = {'key': jax.random.key(0), 'batch_size': 4, 'epochs': 1, 'progress': False}
    assert training.fit(problem, data, **arguments).best_step == 2
    with pytest.raises(ValueError, match=r"mixed_labels: batch\['labels'\] must be below 3, .* got 3"):
        training.fit(problem, {**data, 'labels': data['labels'] + 3}, **arguments)
