"""One test for every bug that was found after the code that had it: none of them may come back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import losses, objectives
from kdjax.networks import Outputs

INF = float('inf')


@pytest.mark.parametrize('ratio', [1e-12, 1e-13, 1e-16, 1e-19, 1e-25])
def test_sp_gradients_are_finite_where_one_example_is_much_smaller_than_the_rest(ratio):
    student = np.array([[1, 2], [ratio, -ratio], [-1, 1.5]], np.float32)
    teacher = np.array([[1, 0.3], [0.2, 0.5], [0.5, 0.6]], np.float32)
    value, gradients = jax.value_and_grad(losses.similarity_preserving, argnums=(0, 1))(student, teacher)
    np.testing.assert_allclose(value, 0.4444534, rtol=1e-4)  # that of ratio 1e-12: scale of an example does not matter
    assert all(np.all(np.isfinite(g)) for g in gradients)


@pytest.mark.parametrize('ratio', [1e-6, 1e-7, 1e-8, 1e-10, 1e-15])
def test_at_masked_maps_equal_sliced_ones_where_the_large_positions_are_masked(ratio):
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 1, 4, 4, 3)).astype(np.float32)
    student = student * np.float32(ratio)
    student[:, :, 0] = 1
    where = (np.arange(4) > 0)[:, None]

    def loss(student, teacher, where=None):
        return losses.attention_transfer(student, teacher, where=where).sum()

    value, gradient = jax.value_and_grad(loss)(student, teacher, where)
    expected, sliced = jax.value_and_grad(loss)(student[:, :, 1:], teacher[:, :, 1:])
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient[:, :, 1:] * ratio, sliced * ratio, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('temperature', [0.5, 1.0, 4.0])
@pytest.mark.parametrize('name', ['soft_targets', 'decoupled_kd'])
def test_where_equals_slicing_where_all_kept_classes_are_ruled_out(name, temperature):
    student, teacher = np.array([[-INF, -INF, 3, 1]], np.float32), np.array([[1, 2, 3, 1]], np.float32)
    where = np.array([True, True, False, False])
    labels = [np.array([0])] if name == 'decoupled_kd' else []
    loss = getattr(losses, name)
    masked = loss(student, teacher, *labels, temperature=temperature, where=where)
    sliced = loss(student[:, :2], teacher[:, :2], *labels, temperature=temperature)
    np.testing.assert_allclose(masked, sliced, rtol=1e-5)


@pytest.mark.parametrize('temperature', [0.5, 1.0, 2.0])
def test_dkd_row_of_minus_infinity_is_uniform_among_the_others(temperature):
    student, teacher = np.full((1, 3), -INF, np.float32), np.array([[1, 2, 3]], np.float32)
    value = losses.decoupled_kd(student, teacher, np.array([0]), alpha=0.0, beta=1.0, temperature=temperature)
    expected = losses.soft_targets(np.zeros((1, 2), np.float32), teacher[:, 1:], temperature=temperature)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_sp_names_both_shapes():
    with pytest.raises(ValueError, match=r'^similarity_preserving: .*\(4, 3\).*\(5, 3\)'):
        losses.similarity_preserving(np.ones((4, 3), np.float32), np.ones((5, 3), np.float32))


def test_sp_names_an_axis_that_is_not_there():
    x = np.ones((4, 3), np.float32)
    with pytest.raises(ValueError, match=r'^similarity_preserving: axis 3'):
        losses.similarity_preserving(x, x, axis=3)


def test_an_axis_that_is_not_there_is_named_with_a_mask_too():
    x = np.ones((4, 3), np.float32)
    with pytest.raises(ValueError, match='axis 3'):
        losses.soft_targets(x, x, axis=3, where=np.ones((4, 3), bool))


@pytest.mark.parametrize('make', [jnp.float32, lambda t: np.array(t, np.float32)])
def test_concrete_temperatures_must_be_positive_whatever_their_type(make):
    x = np.ones((4, 3), np.float32)
    with pytest.raises(ValueError, match='temperature must be positive'):
        losses.soft_targets(x, x, temperature=make(-1.0))


def test_numpy_scalar_arrays_are_weights():
    assert isinstance(np.array(0.5) * objectives.logit_mse(), objectives.Objective)
    assert isinstance(objectives.logit_mse() * np.array(0.5), objectives.Objective)


def test_a_term_named_loss_does_not_hide_the_loss():
    try:
        objective = objectives.combine(loss=0.5 * objectives.logit_mse())
    except ValueError:
        return  # as good
    student, teacher = Outputs(jnp.full((4, 3), 2.0)), Outputs(jnp.ones((4, 3)))
    loss, metrics, _ = objective.apply({'loss': {}}, {'loss': {}}, student, teacher, {}, step=0)
    np.testing.assert_allclose(metrics['loss'].total / metrics['loss'].count, loss)


def test_numbers_of_names_do_not_depend_on_brackets():
    a = objectives.logit_mse()
    assert ((a + a) + (a + a)).names == (a + a + a + a).names


def hard(logits, labels, mask=None, **options):
    objective, batch = (
        objectives.hard_labels(**options),
        {'labels': np.array(labels)} | ({} if mask is None else {'mask': mask}),
    )
    empty = {'hard_labels': {}}
    return jax.value_and_grad(lambda z: objective.apply(empty, empty, Outputs(z), Outputs(None), batch, step=0)[0])(logits)


@pytest.mark.parametrize('labels, mask', [([-1, 1], None), ([0, 1], np.array([False, True]))])
def test_hard_labels_gradient_is_finite_where_an_uncounted_row_is_all_minus_infinity(labels, mask):
    _, gradient = hard(jnp.array([[-INF, -INF], [0.0, 1.0]]), labels, mask)
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize('labels, options', [([0, 1], {}), ([1, 1], {'label_smoothing': 0.1})])
def test_hard_labels_are_finite_for_logits_of_minus_infinity(labels, options):
    value, gradient = hard(jnp.array([[-INF, 0.0], [0.0, 1.0]]), labels, **options)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))


def test_hint_with_batch_norm_sees_only_the_examples_that_count():
    rng = np.random.default_rng(0)
    student = Outputs(None, {'s': rng.normal(size=(4, 2, 2, 3)).astype(np.float32)})
    teacher = Outputs(None, {'t': rng.normal(size=(4, 2, 2, 3)).astype(np.float32)})
    objective, mask = objectives.hint('s', 't', normalize=True), np.array([True, True, False, True])
    params, state = objective.init(jax.random.key(0), student, teacher, {})
    masked, *_ = objective.apply(params, state, student, teacher, {'mask': jnp.asarray(mask)}, step=0)
    sliced, *_ = objective.apply(params, state, *jax.tree.map(lambda x: x[mask], (student, teacher)), {}, step=0)
    np.testing.assert_allclose(masked, sliced, rtol=1e-5)


@pytest.mark.parametrize('mask', [np.ones(1, bool), np.ones(3, bool), np.ones(2, np.int32)])
def test_masks_of_another_batch_or_dtype_are_one_line_value_errors(mask):
    with pytest.raises(ValueError, match='mask'):
        hard(jnp.zeros((2, 3)), [0, 1], mask)
