"""Every check of `kdjax.testing` passes what keeps its promise and fails what breaks it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import losses, testing

STUDENT, TEACHER = np.random.default_rng(0).normal(size=(2, 4, 3))
LABELS = np.array([0, 2, 1, 2], np.int32)


def distance(student, teacher, *, axis=-1, where=None):
    """Σ (z_s - z_t)², which keeps every promise."""
    student, teacher = (x.astype(jnp.float32) for x in (student, teacher))
    if where is not None:
        student, teacher = (jnp.where(where, x, 0.0) for x in (student, teacher))
    return jnp.sum(jnp.square(student - teacher), axis=axis)


def in_half_precision(student, teacher):
    return jnp.sum(jnp.square(student.astype(jnp.bfloat16) - teacher.astype(jnp.bfloat16)), axis=-1)


CALLS = []


def impure(student, teacher):
    """Which is another function at every call."""
    CALLS.append(1)
    return distance(student, teacher) * float(len(CALLS))


def stopped(student, teacher):
    student, teacher = (x.astype(jnp.float32) for x in (student, teacher))
    return jnp.sum(jax.lax.stop_gradient(student) * student + teacher, axis=-1)


def logarithm(student, teacher):
    student, teacher = (x.astype(jnp.float32) for x in (student, teacher))
    return jnp.sum(jnp.log(jnp.square(student) + jnp.square(teacher)), axis=-1)


def last_axis(student, teacher, *, axis=-1):
    return distance(student, teacher)


def mean_of_all(student, teacher, *, where=None):
    return distance(student, teacher, where=where) / student.shape[-1]


def masked_late(student, teacher, *, where=None):
    difference = jnp.square(student.astype(jnp.float32) - teacher.astype(jnp.float32))
    return jnp.sum(difference if where is None else jnp.where(where, difference, 0.0), axis=-1)


BROKEN = [
    (testing.check_precision, in_half_precision, {}),
    (testing.check_transformations, impure, {}),
    (testing.check_gradient, stopped, {}),
    (testing.check_extremes, logarithm, {}),
    (testing.check_axis, last_axis, {'axis': 0}),
    (testing.check_where, mean_of_all, {}),
    (testing.check_where, masked_late, {}),
]


@pytest.mark.parametrize('check, loss, options', BROKEN)
def test_a_check_tells_a_broken_promise_from_a_kept_one(check, loss, options):
    check(distance, STUDENT, TEACHER, **options)
    with pytest.raises(AssertionError):
        check(loss, STUDENT, TEACHER, **options)


@pytest.mark.parametrize('loss', [in_half_precision, stopped, logarithm, last_axis, mean_of_all, masked_late])
def test_check_loss_finds_each_of_them(loss):
    with pytest.raises((AssertionError, ValueError)):  # strict promotion refuses two dtypes before a check can
        testing.check_loss(loss, STUDENT, TEACHER)


def test_losses_of_all_kinds_pass():
    testing.check_loss(losses.soft_targets, STUDENT, TEACHER)
    testing.check_loss(losses.decoupled_kd, STUDENT, TEACHER, LABELS)
    testing.check_loss(losses.pkt, STUDENT, TEACHER[:, :2], where_shape=(4,))
