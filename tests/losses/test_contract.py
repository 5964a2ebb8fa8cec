"""The contract that all losses share: dtypes, shapes, masks, axes, transformations and errors."""

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdjax import losses

LABELS = np.array([0, 4, 2], np.int32)
LOGITS = (3, 5)


class Case(NamedTuple):
    """Shapes that a loss takes and returns, that of a mask over everything, and what a sliced mask means.

    `call(student, teacher, **options)` adapts a loss that takes more arrays than two; `labelled` says that a third are labels.
    """

    student: tuple[int, ...]
    teacher: tuple[int, ...]
    result: tuple[int, ...]
    mask: tuple[int, ...]
    sliced_axis: int
    labelled: bool = False
    call: Callable[..., jax.Array] | None = None


CASES = {
    'soft_targets': Case(LOGITS, LOGITS, (3,), (3, 5), 1),
    'logit_mse': Case(LOGITS, LOGITS, (3,), (3, 5), 1),
    'decoupled_kd': Case(LOGITS, LOGITS, (3,), (3, 5), 1, labelled=True),
    'reverse_kl': Case(LOGITS, LOGITS, (3,), (3, 5), 1),
    'jensen_shannon': Case(LOGITS, LOGITS, (3,), (3, 5), 1),
    'skewed_kl': Case(LOGITS, LOGITS, (3,), (3, 5), 1),
    'hint': Case((3, 2, 4, 3), (3, 2, 4, 3), (3,), (3, 2, 4, 3), 2),
    'attention_transfer': Case((3, 2, 4, 3), (3, 5, 4, 2), (3,), (3, 2, 4, 1), 2),
    'similarity_preserving': Case((4, 3), (4, 3), (), (4,), 0),
}
# Public functions of kdjax.losses that are not losses of a student and a teacher; they have tests of their own.
OTHERS: set[str] = set()
ON_LOGITS = [name for name, case in CASES.items() if case.student == LOGITS]
every_loss = pytest.mark.parametrize('name', list(CASES))


def call(name, student, teacher, labels=LABELS, **options):
    """Calls a loss, with labels if it takes any."""
    case = CASES[name]
    return (case.call or getattr(losses, name))(student, teacher, *([labels] if case.labelled else []), **options)


def value_and_gradients(name, student, teacher, labels=LABELS, where=None, axis=-1):
    """The values, and the gradients of their sum with respect to student and teacher."""
    values, pullback = jax.vjp(lambda s, t: call(name, s, t, labels, where=where, axis=axis), student, teacher)
    return values, *pullback(jnp.ones_like(values))


jitted = jax.jit(value_and_gradients, static_argnames=('name', 'axis'))


def compiled(name, student, teacher, labels=LABELS, where=None, axis=-1):
    """`value_and_gradients` under jit, where labels are traced, as numpy arrays."""
    return jax.device_get(jitted(name, student, teacher, labels, where, axis=axis))


def everything(name):
    """The mask that keeps all."""
    return np.ones(CASES[name].mask, bool)


def inputs(name, *, seed=0, leading=()):
    """Random student and teacher, float32."""
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(size=(*leading, *shape)).astype(np.float32) for shape in CASES[name][:2])


def assert_same(first, second):
    """Compares values and gradients up to the rounding that another order of summation brings."""
    for x, y in zip(first, second, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-6, atol=1e-6)


def assert_refused(name, student, teacher, *parts, **options):
    """The loss raises a ValueError of one line that begins with its name and holds every part, when traced too."""
    with pytest.raises(ValueError, match=f'^{name}: [^\n]+$') as error:
        call(name, student, teacher, **options)
    for part in parts:
        assert str(part) in str(error.value)
    arrays = {key: options.pop(key) for key in ('labels', 'where') if key in options}
    with pytest.raises(ValueError, match=f'^{name}: '):
        jax.eval_shape(lambda s, t, rest: call(name, s, t, **rest, **options), student, teacher, arrays)


def test_every_public_loss_is_under_this_contract():
    assert {name for name, value in vars(losses).items() if inspect.isfunction(value)} == set(CASES) | OTHERS


@every_loss
def test_signature_is_student_teacher_labels_and_keywords(name):
    parameters = list(inspect.signature(getattr(losses, name)).parameters.values())
    positional = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    if CASES[name].call is None:
        assert positional == ['student', 'teacher', *(['labels'] if CASES[name].labelled else [])]
    keywords = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert keywords['axis'] == -1
    assert keywords['where'] is None


@every_loss
@pytest.mark.parametrize('dtypes', [('bfloat16', 'bfloat16'), ('float32', 'float16')])
def test_half_precision_equals_float32_of_the_inputs_upcast_first(name, dtypes):
    """Exactly: it costs what rounding the inputs costs, and no more. The two networks may differ in precision."""
    rounded = [jnp.asarray(x, dtype) for x, dtype in zip(inputs(name), dtypes, strict=True)]
    # Without jit, since that may add up in another order when it fuses the casts.
    values, *gradients = jax.device_get(value_and_gradients(name, *rounded))
    upcast = [jnp.asarray(np.float32(x)) for x in rounded]
    expected, *expected_gradients = jax.device_get(value_and_gradients(name, *upcast))
    assert values.dtype == expected.dtype == jnp.float32
    assert values.shape == expected.shape == CASES[name].result
    np.testing.assert_array_equal(values, expected)
    for gradient, reference, x in zip(gradients, expected_gradients, rounded, strict=True):
        assert gradient.dtype == x.dtype
        np.testing.assert_array_equal(gradient, reference.astype(x.dtype))


@every_loss
def test_eager_jit_and_vmap_agree_on_values_and_gradients(name):
    """A mask that keeps everything changes nothing either."""
    student, teacher = inputs(name, leading=(2,))
    mapped = jax.device_get(jax.jit(jax.vmap(functools.partial(value_and_gradients, name)))(student, teacher))
    for i in range(2):
        eager = jax.device_get(value_and_gradients(name, jnp.asarray(student[i]), jnp.asarray(teacher[i])))
        assert_same([x[i] for x in mapped], eager)
        assert_same(compiled(name, student[i], teacher[i], where=everything(name)), eager)


@every_loss
def test_gradients_reach_both_networks_and_go_uphill(name):
    """No loss stops the teacher's side: mutual learning needs it."""
    student, teacher = inputs(name)
    loss = functools.partial(compiled, name, where=everything(name))
    values, *gradients = loss(student, teacher)
    assert np.all(values > 0)
    for gradient in gradients:
        assert np.all(np.isfinite(gradient))
        assert np.any(np.abs(gradient) > 1e-4)
    lower = [x - 1e-2 * gradient for x, gradient in zip((student, teacher), gradients, strict=True)]
    assert np.sum(loss(lower[0], teacher)[0]) < np.sum(values)
    assert np.sum(loss(student, lower[1])[0]) < np.sum(values)


def random_mask(name):
    """One that keeps some of everything, and the labelled classes."""
    where = np.random.default_rng(1).random(CASES[name].mask) < 0.7
    if CASES[name].labelled:
        where[np.arange(3), LABELS] = True
    return where


@every_loss
def test_axis_equals_moveaxis(name):
    """With channels in second place as in NCHW, or first where there are two axes; a mask has the layout of what it masks."""
    student, teacher = inputs(name)
    where = random_mask(name)
    axis = 1 if student.ndim == 4 else 0
    moved_where = np.moveaxis(where, -1, axis) if where.ndim == student.ndim else where
    moved = [np.moveaxis(x, -1, axis) for x in (student, teacher)]
    values, *gradients = compiled(name, *moved, where=moved_where, axis=axis)
    assert_same([values, *(np.moveaxis(x, axis, -1) for x in gradients)], compiled(name, student, teacher, where=where))


@every_loss
def test_a_mask_that_keeps_nothing_gives_zero_and_zero_gradients(name):
    for result in compiled(name, *inputs(name), where=~everything(name)):
        np.testing.assert_array_equal(result, np.zeros(result.shape))


@every_loss
@pytest.mark.parametrize('fill', [1e15, -np.inf])
def test_what_is_masked_has_no_influence_and_no_gradient(name, fill):
    """Here the second example, however large its numbers, -inf among logits."""
    if fill == -np.inf and CASES[name].student != LOGITS:
        fill = -1e15
    where = everything(name)
    where[1] = False
    student, teacher = inputs(name)
    expected = compiled(name, student, teacher, where=where)
    student[1] = teacher[1] = fill
    for result, reference in zip(compiled(name, student, teacher, where=where), expected, strict=True):
        np.testing.assert_array_equal(result, reference)
        if result.ndim > 1:
            np.testing.assert_array_equal(result[1], np.zeros(result[1].shape))


@every_loss
@settings(max_examples=5, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_where_equals_slicing(name, data):
    """Of classes for logits, of rows of the image for features, of examples for relations; values and gradients."""
    case = CASES[name]
    axis, size = case.sliced_axis, case.student[case.sliced_axis]
    keep = np.isin(np.arange(size), data.draw(st.permutations(range(size)))[:3])
    where = np.broadcast_to(keep.reshape([size if i == axis else 1 for i in range(len(case.mask))]), case.mask)
    student, teacher = inputs(name, seed=data.draw(st.integers(0, 2**32 - 1)))
    masked = compiled(name, student, teacher, np.flatnonzero(keep).astype(np.int32), where=where)
    sliced = compiled(name, np.compress(keep, student, axis), np.compress(keep, teacher, axis), np.arange(3, dtype=np.int32))
    assert_same([masked[0], *(np.compress(keep, x, axis) for x in masked[1:])], sliced)
    for gradient in masked[1:]:
        dropped = np.compress(~keep, gradient, axis)
        np.testing.assert_array_equal(dropped, np.zeros(dropped.shape))


@every_loss
@pytest.mark.parametrize('dtype', ['int32', 'uint8', 'bool', 'complex64'])
def test_only_floating_point_is_taken(name, dtype):
    """Integers are class indices or raw pixels, never logits or features."""
    student, teacher = inputs(name)
    assert_refused(name, student.astype(dtype), teacher, 'student must be floating point', dtype)
    assert_refused(name, student, teacher.astype(dtype), 'teacher must be floating point', dtype)


MISMATCHES = [
    *[(name, LOGITS, (3, 6)) for name in ON_LOGITS],
    *[(name, LOGITS, (4, 5)) for name in ON_LOGITS],
    *[(name, LOGITS, (1, 3, 5)) for name in ON_LOGITS],
    ('hint', (3, 2, 4, 3), (3, 2, 4, 5)),
    ('hint', (3, 2, 4, 3), (3, 4, 2, 3)),
    ('hint', (3, 4, 3), (3, 2, 4, 3)),
    ('attention_transfer', (3, 2, 4, 3), (2, 2, 4, 3)),
    ('attention_transfer', (3, 2, 4, 3), (3, 4, 3)),
    ('attention_transfer', (3, 4, 3), (3, 4, 5)),
    ('similarity_preserving', (4, 3), (5, 3)),
    ('similarity_preserving', (4, 3), (5, 2, 2, 3)),
]


@pytest.mark.parametrize('name, student, teacher', MISMATCHES, ids=str)
def test_shapes_that_do_not_fit_are_both_named(name, student, teacher):
    assert_refused(name, np.ones(student, np.float32), np.ones(teacher, np.float32), student, teacher)


@pytest.mark.parametrize('name, shape', [('hint', (3,)), ('similarity_preserving', (3,)), ('soft_targets', ())])
def test_too_few_axes_are_refused(name, shape):
    assert_refused(name, np.ones(shape, np.float32), np.ones(shape, np.float32), shape)


@every_loss
@pytest.mark.parametrize('masked', [False, True])
def test_an_axis_that_is_not_there_is_named(name, masked):
    where = {'where': everything(name)} if masked else {}
    rank = len(CASES[name].student)
    for axis in (rank, -rank - 1):
        assert_refused(name, *inputs(name), f'axis {axis}', CASES[name].student, axis=axis, **where)


@every_loss
@pytest.mark.parametrize('dtype', ['int32', 'float32'])
def test_masks_must_be_boolean(name, dtype):
    """A mask of weights would be a silent mistake."""
    where = np.ones(CASES[name].mask, dtype)
    assert_refused(name, *inputs(name), 'where must be boolean', dtype, where=where)


@pytest.mark.parametrize('name, shape', [('soft_targets', (5,)), ('attention_transfer', (4, 1))])
def test_masks_broadcast(name, shape):
    student, teacher = inputs(name)
    where = np.arange(shape[0]).reshape(shape) % 2 == 0
    whole = np.broadcast_to(where, CASES[name].mask)
    assert_same(compiled(name, student, teacher, where=where), compiled(name, student, teacher, where=whole))


@every_loss
def test_masks_that_do_not_broadcast_are_named(name):
    where = np.ones((7, *CASES[name].mask[1:]), bool)
    assert_refused(name, *inputs(name), where.shape, CASES[name].mask, where=where)


@pytest.mark.parametrize('name', [name for name in ON_LOGITS if name != 'logit_mse'])
@pytest.mark.parametrize('temperature', [0, 0.0, -1.0, float('nan'), np.float32(-2), np.array(-1.0), jnp.float32(-1)])
def test_temperatures_must_be_positive(name, temperature):
    assert_refused(name, *inputs(name), 'temperature must be positive', temperature=temperature)


@pytest.mark.parametrize('labels, part', [(LABELS[:2], '(2,)'), (LABELS[None], '(1, 3)'), (np.ones(3, np.float32), 'float32')])
def test_labels_must_be_integers_one_for_each_example(labels, part):
    expected = 'integer' if labels.dtype == np.float32 else '(3,)'
    assert_refused('decoupled_kd', *inputs('decoupled_kd'), 'labels', part, expected, labels=labels)
