"""The contract that all losses share: dtypes, shapes, masks, axes, transformations and errors."""

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.loss_table import (
    CASES,
    LABELS,
    LOGITS,
    LOSSES,
    OF_BATCH_STATISTICS,
    ON_LOGITS,
    ON_SIGNS,
    OTHERS,
    arguments,
    assert_refused,
    assert_same,
    call,
    compiled,
    every_loss,
    every_loss_with_an_axis,
    everything,
    inputs,
)

from kdjax import losses, testing

# Losses that take a part of their inputs as numbers: weights, a mixture's own part, attention, a constant.
WITH_STOPPED_GRADIENTS = {'adaptive_kl', 'crd', 'fbkd', 'taid', 'weighted_soft_labels'}


def test_every_public_loss_is_under_this_contract():
    assert {name for name, value in vars(losses).items() if inspect.isfunction(value)} == set(CASES) | OTHERS


@every_loss
def test_signature_is_student_teacher_labels_and_keywords(name):
    parameters = list(inspect.signature(getattr(losses, name)).parameters.values())
    positional = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    if CASES[name].call is None:
        assert positional == ['student', 'teacher', *(['labels'] if CASES[name].labelled else [])]
    keywords = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert keywords.get('axis') == (-1 if CASES[name].has_axis else None)
    assert keywords['where'] is None


@every_loss
def test_half_precision_equals_float32_of_the_inputs_upcast_first(name):
    testing.check_precision(LOSSES[name], *arguments(name))


@every_loss
def test_eager_jit_and_vmap_agree_on_values_and_gradients(name):
    testing.check_transformations(LOSSES[name], *arguments(name))


@every_loss
def test_results_are_one_value_per_example_or_a_scalar_and_a_whole_mask_changes_nothing(name):
    values, *gradients = compiled(name, *inputs(name))
    assert values.shape == CASES[name].result
    assert_same(compiled(name, *inputs(name), where=everything(name)), [values, *gradients])


@pytest.mark.parametrize('name', [name for name in CASES if name not in WITH_STOPPED_GRADIENTS])
def test_gradients_are_those_of_the_values(name):
    testing.check_gradient(LOSSES[name], *arguments(name))


@every_loss
def test_values_and_gradients_are_finite_at_extremes(name):
    testing.check_extremes(LOSSES[name], *arguments(name))


@every_loss
def test_gradients_reach_both_networks_and_go_uphill(name):
    """No loss stops the teacher's side: mutual learning needs it."""
    student, teacher = inputs(name)
    loss = functools.partial(compiled, name, where=everything(name))
    values, *gradients = loss(student, teacher)
    assert np.all(values > 0)
    for gradient in gradients:
        assert np.all(np.isfinite(gradient))
        assert np.any(np.abs(gradient) > 1e-4) or (name in ON_SIGNS and gradient is gradients[1])
    lower = [x - 1e-2 * gradient for x, gradient in zip((student, teacher), gradients, strict=True)]
    assert np.sum(loss(lower[0], teacher)[0]) < np.sum(values)
    assert np.sum(loss(student, lower[1])[0]) < np.sum(values) or name in ON_SIGNS


def random_mask(name):
    """One that keeps some of everything, and the labelled classes."""
    where = np.random.default_rng(1).random(CASES[name].mask) < 0.7
    if CASES[name].labelled:
        where[np.arange(3), LABELS] = True
    return where


@every_loss_with_an_axis
def test_axis_equals_moveaxis(name):
    """With channels in second place as in NCHW, or first where there are two axes; a mask has the layout of what it masks."""
    student, *rest = arguments(name)
    axis = 1 if student.ndim == 4 else 0
    testing.check_axis(LOSSES[name], student, *rest, axis=axis, where=random_mask(name))


def hidden(name, x, where):
    """The elements of student or teacher that a mask leaves out; of examples alone where pooling or attention mixes them."""
    if CASES[name].mask_axis is None and where.ndim < x.ndim:
        where = where.reshape(*where.shape, *(1,) * (x.ndim - where.ndim))
    fits = (
        all(size in (1, length) for size, length in zip(where.shape, x.shape, strict=True)) if where.ndim == x.ndim else False
    )
    return ~np.broadcast_to(where, x.shape) if fits else np.arange(len(x)).reshape(-1, *(1,) * (x.ndim - 1)) == 1


@every_loss
def test_what_is_masked_has_no_influence_and_no_gradient(name):
    """All of the second example and some of the others, whatever it is."""
    where = random_mask(name)
    where[1] = False
    sides = inputs(name)
    expected = compiled(name, *sides, where=where)
    masks = [np.broadcast_to(hidden(name, x, where), x.shape) for x in sides]
    for fill in (1e15, -1e15, -np.inf, np.inf, np.nan):
        filled = [np.where(mask, np.float32(fill), x) for x, mask in zip(sides, masks, strict=True)]
        values, *gradients = compiled(name, *filled, where=where)
        np.testing.assert_array_equal(values, expected[0], err_msg=f'filled with {fill}')
        for gradient, reference, mask in zip(gradients, expected[1:], masks, strict=True):
            np.testing.assert_array_equal(gradient, reference, err_msg=f'filled with {fill}')
            np.testing.assert_array_equal(gradient[mask], 0.0, err_msg=f'filled with {fill}')


@pytest.mark.parametrize('name', [name for name, case in CASES.items() if case.teacher[1:2] == (5,) and len(case.teacher) == 4])
def test_what_pooling_takes_to_masked_positions_alone_has_no_influence(name):
    """The windows of two rows out of five are the first three and the last three."""
    student, teacher = inputs(name)
    where = everything(name)
    where[:, 1] = False
    expected = compiled(name, student, teacher, where=where)
    student[:, 1] = teacher[:, 3:] = np.nan
    for result, reference in zip(compiled(name, student, teacher, where=where), expected, strict=True):
        np.testing.assert_array_equal(result, reference)


@functools.partial(jax.jit, static_argnames='name')
def jitted_values(name, student, teacher, labels, where):
    return call(name, student, teacher, labels, where=where)


@every_loss
def test_nan_and_infinity_that_are_kept_come_out_as_nan(name):
    """Of the example that has them, or of the batch; -inf too, but for logits and scores, where it rules out."""
    infinities = [np.inf] if CASES[name].student == LOGITS or name == 'attention_maps' else [np.inf, -np.inf]
    for where in (None, everything(name)):
        expected = np.array(jitted_values(name, *inputs(name), LABELS, where))
        for side, fill in itertools.product(range(2), [np.nan, *infinities]):
            arrays = inputs(name)
            arrays[side][(1,) + (0,) * (arrays[side].ndim - 1)] = fill
            values = np.array(jitted_values(name, *arrays, LABELS, where))
            if values.ndim == 0 or name in OF_BATCH_STATISTICS:
                assert np.all(np.isnan(values)), (side, fill, where)
            else:
                np.testing.assert_array_equal(values, np.where(np.arange(len(values)) == 1, np.nan, expected))


@every_loss
def test_an_empty_batch_gives_an_empty_result_or_zero(name):
    """A loss on relations is 0; the gradients of both are as empty as the batch."""
    student, teacher = (x[:0] for x in inputs(name))
    for where in (None, everything(name)[:0]):
        values, *gradients = compiled(name, student, teacher, LABELS[:0], where=where)
        np.testing.assert_array_equal(values, np.zeros((0, *CASES[name].result[1:]) if CASES[name].result else ()))
        assert [x.shape for x in gradients] == [student.shape, teacher.shape]


ON_POSITIONS = [
    'similarity_preserving',
    'pkt',
    'rkd_distance',
    'rkd_angle',
    'correlation_congruence',
    'info_nce',
    'instance_graph',
]


@pytest.mark.parametrize('name', ON_POSITIONS)
def test_relations_are_those_of_the_kept_positions(name):
    """Padding of any content, and more of it, changes nothing; an example of which no position is kept is not there."""
    sides = np.random.default_rng(0).normal(size=(2, 4, 3, 2)).astype(np.float32)
    where = np.array([[True, True, False], [False, False, False], [True, True, True], [True, False, False]])
    kept = where[:, :, None]
    expected = compiled(name, *sides, where=where)
    assert expected[0] > 0
    wider = np.pad(np.where(kept, sides, np.nan), ((0, 0), (0, 0), (0, 2), (0, 0)), constant_values=np.inf)
    values, *gradients = compiled(name, *wider.astype(np.float32), where=np.pad(where, ((0, 0), (0, 2))))
    assert_same([values, *(x[:, :3] for x in gradients)], expected)
    for gradient in gradients:
        np.testing.assert_array_equal(gradient[:, 3:], 0.0)
        np.testing.assert_array_equal(np.where(kept, 0.0, gradient[:, :3]), 0.0)
    if name != 'instance_graph':  # whose logits are a mean over positions
        values, *gradients = compiled(name, *np.where(kept, sides, 0).astype(np.float32), where=np.any(where, axis=1))
        assert_same([values, *(np.where(kept, x, 0.0) for x in gradients)], expected)
    assert_refused(name, *sides, (4, 2), where=where[:, :2])


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
@pytest.mark.parametrize('name', ON_LOGITS)
def test_classes_that_one_network_rules_out_have_finite_gradients_in_half_precision(name, dtype):
    student, teacher = inputs(name)
    teacher[0, 1] = student[1, 3] = student[2, 0] = teacher[2, 0] = -np.inf
    values, *gradients = compiled(name, jnp.asarray(student, dtype), jnp.asarray(teacher, dtype))
    assert np.all(np.isfinite(values))
    for gradient in gradients:
        assert np.all(np.isfinite(gradient.astype(np.float32)))


@every_loss
@pytest.mark.parametrize('seed', range(3))
def test_where_equals_slicing(name, seed):
    """Of classes for logits, of rows for images, of examples for relations, of tokens for sequences; values and gradients."""
    case = CASES[name]
    masked = {'axis': case.sliced_axis, 'where_shape': case.mask, 'where_axis': case.mask_axis}
    testing.check_where(LOSSES[name], *arguments(name, seed=seed), seed=seed, **masked)


@every_loss
def test_only_floating_point_is_taken(name):
    """Integers are class indices or raw pixels, never logits or features."""
    student, teacher = inputs(name)
    for dtype in ('int32', 'uint8', 'bool', 'complex64'):
        assert_refused(name, student.astype(dtype), teacher, 'student must be floating point', dtype)
        assert_refused(name, student, teacher.astype(dtype), 'teacher must be floating point', dtype)


MISMATCHES = [
    *[(name, LOGITS, (3, 6)) for name in ON_LOGITS],
    *[(name, LOGITS, (4, 5)) for name in ON_LOGITS],
    *[(name, LOGITS, (1, 3, 5)) for name in ON_LOGITS],
    *[('linear_soft_targets', (4, 3), shape) for shape in [(5, 3), (4, 5), (2, 4, 3)]],
    ('hint', (3, 2, 4, 3), (3, 2, 4, 5)),
    ('hint', (3, 2, 4, 3), (3, 4, 2, 3)),
    ('hint', (3, 4, 3), (3, 2, 4, 3)),
    ('attention_transfer', (3, 2, 4, 3), (2, 2, 4, 3)),
    ('attention_transfer', (3, 2, 4, 3), (3, 4, 3)),
    ('attention_transfer', (3, 4, 3), (3, 4, 5)),
    ('hidden_cosine', (3, 5, 4), (3, 5, 6)),
    ('hidden_cosine', (3, 5, 4), (3, 1, 4)),
    ('attention_maps', (3, 2, 5, 5), (3, 4, 5, 5)),
    ('attention_maps', (3, 2, 5, 5), (3, 2, 4, 4)),
    ('value_relations', (3, 2, 5, 4), (3, 4, 5, 4)),
    ('value_relations', (3, 2, 5, 4), (3, 2, 6, 4)),
    ('value_relations', (3, 5, 4), (3, 5, 4)),
    ('reconstruction', (3, 4), (3, 5)),
    ('attention_distillation', (3, 2, 4, 3), (3, 2, 4, 5)),
    *[
        (name, (3, 2, 4, 3), shape)
        for name in (
            'masked_generation',
            'hierarchical_context',
            'channel_wise',
            'vid',
            'activation_boundary',
            'overhaul',
            'fbkd',
        )
        for shape in ((3, 2, 4, 5), (3, 4, 2, 3))
    ],
    *[(name, (3, 2, 4, 3), shape) for name in ('pearson_features', 'srd') for shape in ((3, 2, 4, 5), (3, 4, 2, 3))],
    *[
        (name, student, teacher)
        for name in ('fsp', 'nst', 'singular_vectors', 'factor_transfer')
        for student, teacher in (((3, 2, 4, 3), (2, 2, 4, 3)), ((3, 2, 4, 3), (3, 4, 3)), ((3, 4, 3), (3, 4, 5)))
    ],
    ('inter_channel', (3, 2, 4, 3), (3, 2, 4, 5)),
    ('inter_channel', (3, 2, 4, 3), (2, 2, 4, 3)),
    ('inter_channel', (3, 4, 3), (3, 4, 3)),
    ('fsp', (3, 2, 4, 3), (3, 2, 4, 5)),
    ('factor_transfer', (3, 2, 4, 3), (3, 2, 4, 5)),
    ('similarity_preserving', (4, 3), (5, 3)),
    ('similarity_preserving', (4, 3), (5, 2, 2, 3)),
    *[(name, (4, 3), (5, 3)) for name in ('pkt', 'rkd_distance', 'rkd_angle', 'correlation_congruence')],
    *[(name, (4, 3), shape) for name in ('instance_graph', 'info_nce', 'crd') for shape in [(5, 3), (4, 4)]],
]


def test_shapes_that_do_not_fit_are_both_named():
    for name, student, teacher in MISMATCHES:
        assert_refused(name, np.ones(student, np.float32), np.ones(teacher, np.float32), student, teacher)


@pytest.mark.parametrize('name, shape', [('hint', (3,)), ('similarity_preserving', (3,)), ('soft_targets', ())])
def test_too_few_axes_are_refused(name, shape):
    assert_refused(name, np.ones(shape, np.float32), np.ones(shape, np.float32), shape)


@every_loss_with_an_axis
def test_an_axis_that_is_not_there_is_named(name):
    rank = len(CASES[name].student)
    for axis, where in itertools.product((rank, -rank - 1), ({}, {'where': everything(name)})):
        assert_refused(name, *inputs(name), f'axis {axis}', CASES[name].student, axis=axis, **where)


@every_loss
def test_masks_must_be_boolean(name):
    """A mask of weights would be a silent mistake."""
    for dtype in ('int32', 'float32'):
        where = np.ones(CASES[name].mask, dtype)
        assert_refused(name, *inputs(name), 'where must be boolean', dtype, where=where)


@pytest.mark.parametrize('name, shape', [('soft_targets', (5,)), ('attention_transfer', (4, 1))])
def test_masks_broadcast(name, shape):
    student, teacher = inputs(name)
    where = np.arange(shape[0]).reshape(shape) % 2 == 0
    whole = np.broadcast_to(where, CASES[name].mask)
    assert_same(compiled(name, student, teacher, where=where), compiled(name, student, teacher, where=whole))


# The mask of dist_plus in the table is one of examples, and that of the loss one of logits.
@pytest.mark.parametrize('name', [name for name in CASES if name != 'dist_plus'])
def test_masks_that_do_not_broadcast_are_named(name):
    where = np.ones((7, *CASES[name].mask[1:]), bool)
    assert_refused(name, *inputs(name), where.shape, CASES[name].mask, where=where)


OF_NO_TEMPERATURE = ('logit_mse', 'hard_targets', 'multi_level_logits')


@pytest.mark.parametrize('name', [name for name in ON_LOGITS if name not in OF_NO_TEMPERATURE])
def test_temperatures_must_be_positive(name):
    for temperature in (0, 0.0, -1.0, float('nan'), np.float32(-2), np.array(-1.0), jnp.float32(-1)):
        assert_refused(name, *inputs(name), 'temperature must be positive', temperature=temperature)


SCALARS = [
    (name, parameter.name)
    for name in sorted(set(CASES) | OTHERS)
    for parameter in inspect.signature(getattr(losses, name)).parameters.values()
    if parameter.kind is parameter.KEYWORD_ONLY and (isinstance(parameter.default, float) or parameter.name == 'power')
]


def test_hyperparameters_are_scalars():
    """One for each example would be broadcast against the classes, or the examples."""
    for (name, hyperparameter), shape in itertools.product(SCALARS, [(3,), (3, 1)]):
        function = getattr(losses, name)
        required = [p.name for p in inspect.signature(function).parameters.values() if p.default is p.empty]
        arguments = {
            parameter: 2
            if parameter in ('examples', 'steps', 'k')
            else 0.5
            if parameter in ('alpha', 'beta', 'interpolation')
            else np.ones((3, 3), np.float32)
            for parameter in required
        }
        message = rf'^{name}: {hyperparameter} must be a number, the same for all examples, got an array \({shape[0]}'
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(
                functools.partial(function, **arguments), **{hyperparameter: jax.ShapeDtypeStruct(shape, jnp.float32)}
            )


LABELLED = [name for name, case in CASES.items() if case.labelled]


@pytest.mark.parametrize('name', LABELLED)
def test_no_label_costs_exactly_nothing_whatever_the_logits(name):
    student, teacher = inputs(name)
    labels = np.array([0, -1, 2], np.int32)
    expected = compiled(name, student, teacher, labels)
    student[1] = teacher[1] = np.nan
    for result, reference in zip(compiled(name, student, teacher, labels), expected, strict=True):
        np.testing.assert_array_equal(result, reference)
        np.testing.assert_array_equal(result[1], np.zeros(result[1].shape))


@pytest.mark.parametrize('name', LABELLED)
@pytest.mark.parametrize('dtype', ['int32', 'uint8'])
def test_labels_beyond_the_classes_are_refused_and_nan_where_traced(name, dtype):
    labels = np.array([0, 5, 2], dtype)
    for known in (labels, jnp.asarray(labels)):
        with pytest.raises(ValueError, match=rf'^{name}: labels must be below the number of classes, 5, got 5; [^\n]+$'):
            call(name, *inputs(name), known)
    values, *gradients = compiled(name, *inputs(name), labels)
    np.testing.assert_array_equal(np.isnan(values), [False, True, False])
    for gradient in gradients:  # so that the example may be masked in a mean
        assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize('name', [name for name in ON_LOGITS if name not in ('logit_mse', 'binary_soft_targets')])
def test_a_single_logit_has_nothing_to_be_compared_with(name):
    one = np.ones((3, 1), np.float32)
    assert_refused(name, one, one, '(3, 1)', 'two classes or more', 'binary_labels', labels=np.zeros(3, np.int32))


@pytest.mark.parametrize('name', LABELLED)
def test_labels_must_be_integers_one_for_each_example(name):
    for labels, part in ((LABELS[:2], '(2,)'), (LABELS[None], '(1, 3)'), (np.ones(3, np.float32), 'float32')):
        expected = 'integer' if labels.dtype == np.float32 else '(3,)'
        assert_refused(name, *inputs(name), 'labels', part, expected, labels=labels)
