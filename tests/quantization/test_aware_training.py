"""Quantization-aware distillation: better than rounding a trained network, and resumed as if never stopped."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.model_checks import filled

from kdjax import losses, models, networks, objectives, quantization, training
from kdjax.quantization import Rule

RNG = np.random.default_rng(0)
BATCH = {'inputs': jnp.asarray(RNG.standard_normal((512, 8)), jnp.float32)}
TEST = jnp.asarray(RNG.standard_normal((512, 8)), jnp.float32)
MODULE = models.MLP((16,), classes=4)
TEACHER = networks.from_linen(MODULE)
RULE = Rule(4, 8, decay=0.9, freeze=150)
STUDENT = quantization.fake_quantize_network(TEACHER, RULE)
OPTIMIZER = optax.adam(optax.cosine_decay_schedule(1e-2, 200))
PROBLEM = training.distillation(STUDENT, TEACHER, objectives.soft_targets(temperature=2.0), OPTIMIZER)


@pytest.fixture(scope='module')
def teacher() -> dict:
    """Also the student in floating point: it has nothing to learn but to be rounded."""
    return filled(MODULE, TEST)


@pytest.fixture(scope='module')
def rounded(teacher: dict) -> dict:
    """The same after post-training quantization."""
    return quantization.calibrate(TEACHER, RULE, teacher, [BATCH['inputs']])


def divergence(variables: dict, teacher: dict) -> float:
    wanted, got = (network.apply(v, TEST)[0].logits for network, v in ((TEACHER, teacher), (STUDENT, variables)))
    return float(jnp.mean(losses.soft_targets(got, wanted, temperature=1.0)))


def test_training_improves_on_rounding_afterwards(teacher: dict, rounded: dict) -> None:
    state = PROBLEM.init(jax.random.key(0), BATCH, student_variables=rounded)
    for _ in range(200):
        state, _ = PROBLEM.step(state, teacher, BATCH)
    before, after = divergence(rounded, teacher), divergence(state.variables, teacher)
    assert 0 < after < 0.65 * before
    # What it learned is worth as much in integers.
    integers = quantization.quantize_variables(TEACHER, RULE, state.variables, TEST)
    served = quantization.quantize_network(TEACHER, RULE).apply(integers, TEST)[0].logits
    logits = STUDENT.apply(state.variables, TEST)[0].logits
    assert np.mean(np.abs(served - logits) <= 1e-4 * np.max(np.abs(logits))) > 0.99
    assert state.model_state['quantization']['steps'] == 200


def test_a_resumed_run_equals_an_undisturbed_one(teacher: dict, tmp_path: pathlib.Path) -> None:
    """From ranges that nothing has filled; they are part of the state."""
    state = PROBLEM.init(jax.random.key(0), BATCH)
    for step in range(6):
        if step == 3:
            with training.checkpoint_manager(tmp_path) as manager:
                training.save(manager, 3, state)
        state, _ = PROBLEM.step(state, teacher, BATCH)
    with training.checkpoint_manager(tmp_path) as manager:
        epoch, resumed = training.restore_newest(manager, PROBLEM.init(jax.random.key(1), BATCH))
    assert epoch == 3
    assert resumed.model_state['quantization']['steps'] == 3
    for _ in range(3):
        resumed, _ = PROBLEM.step(resumed, teacher, BATCH)
    jax.tree.map(np.testing.assert_array_equal, resumed._replace(key=0), state._replace(key=0))
    assert np.all(np.isfinite(jax.tree.leaves(jax.tree.map(jnp.sum, resumed.model_state))))


def test_a_student_with_static_ranges_goes_through_fit_from_calibrated_variables(teacher: dict) -> None:
    rule = Rule(4, 8, ranges='static')
    calibrated = quantization.calibrate(TEACHER, rule, teacher, [BATCH['inputs']])
    student = quantization.fake_quantize_network(TEACHER, rule)
    problem = training.distillation(student, TEACHER, objectives.soft_targets(temperature=2.0), optax.sgd(0.1))
    fit = functools.partial(
        training.fit, problem, BATCH, teacher, key=jax.random.key(0), batch_size=256, epochs=1, progress=False
    )
    ranges = fit(student_variables=calibrated).variables['quantization']['ranges']
    jax.tree.map(np.testing.assert_array_equal, ranges, calibrated['quantization']['ranges'])
    with pytest.raises(ValueError, match='has no range; use the variables that `calibrate` returns'):
        fit()
