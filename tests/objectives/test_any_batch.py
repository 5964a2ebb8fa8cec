"""Every objective on examples, tokens and pixels: what does not count changes nothing, whatever stands there.

All objectives are in one program per layout, whose loss is weighted by an argument: one run of it gives one term's gradients.
A small batch without mask or weights says what is right; a big one holds it between further examples and padding of NaN.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.objective_checks import abstract_init, compile_quickly, random_params

from kdjax import objectives
from kdjax.networks import Outputs

LAYOUTS = {'examples': ((), ()), 'tokens': ((3,), (5,)), 'pixels': ((2, 3), (2, 5))}
"""Sizes of the positions of the small and of the big batch."""
KEPT, BIG, CLASSES = [0, 2, 3], 5, 5
LOGITS, LAYER = ('b', 'p', CLASSES), ('b', 'p', 3)
ROLES = {
    'student': {
        'logits': LOGITS,
        's': LAYER,
        'late': LAYER,
        'jacobian': ('b', 2, 'p', 3),
        'kernel': (3, CLASSES),
        'heads': ('b', 2, 'p', 'p'),
        'values': ('b', 2, 'p', 3),
        's/class_gradients': ('b', CLASSES, 3),
        'pooled/logits': ('b', CLASSES),
        '0/logits': LOGITS,
        '1/logits': LOGITS,
    },
    'teacher': {
        'logits': LOGITS,
        't': ('b', 'p', 4),
        'wide': ('b', 'p', 4),
        't/scale': (4,),
        't/bias': (4,),
        'jacobian': ('b', 2, 'p', 3),
        'kernel': (4, CLASSES),
        'heads': ('b', 2, 'p', 'p'),
        'values': ('b', 2, 'p', 2),
        't/class_gradients': ('b', CLASSES, 4),
        'pooled/logits': ('b', CLASSES),
    },
    'batch': {
        'completion': ('b', 'p'),
        'labels': ('b', 'p'),
        'other_labels': ('b', 'p'),
        'several_labels': LOGITS,
        'numbers': LOGITS,
        'share': ('b', 'p'),
        'top_logits': ('b', 'p', 2),
        'top_indices': ('b', 'p', 2),
        'rest': ('b', 'p'),
        'teacher_logits': LOGITS,
        'teacher_labels': ('b', 'p'),
        'student_spans': ('b', 'p'),
        'teacher_spans': ('b', 'p'),
        'index': ('b',),
        'domains': ('b',),
    },
}
"""The axes of every array: `b` of examples, `p` of positions, or a size."""
# Examples 0 to 5 have one negative, so that those drawn for a batch of another size are the same.
BANK = np.array([0, 0, 0, 0, 0, 0, 1], np.int32)


class Case(NamedTuple):
    """An objective, the layouts that it is for, and what are its logits and its labels."""

    objective: objectives.Objective
    layouts: tuple[str, ...] = tuple(LAYOUTS)
    logits: str = 'logits'
    labels: str = 'labels'


def squares(params: Any, student: Outputs, teacher: Outputs, batch: Any) -> Any:
    """A function of one's own that looks at labels alone, and has a parameter."""
    del teacher, student
    return jnp.where(batch['labels'] > 0, params, 0.0) ** 2


POSITIONS, IMAGES = ('tokens', 'pixels'), ('pixels',)
CASES = {
    'activation_boundary': Case(objectives.activation_boundary('s', 't')),
    'activation_size': Case(objectives.activation_size('s')),
    'adaptive_kl': Case(objectives.adaptive_kl()),
    'adaptive_taid': Case(objectives.adaptive_taid(10)),
    'alpha_beta_divergence': Case(objectives.alpha_beta_divergence(alpha=0.4, beta=0.3)),
    'approximate_likelihood_matching': Case(objectives.approximate_likelihood_matching(), ('tokens',)),
    'attention_distillation': Case(objectives.attention_distillation('s', 't')),
    'attention_maps': Case(objectives.attention_maps('heads', 'heads', variant='kl'), ('tokens',)),
    'attention_transfer': Case(objectives.attention_transfer('s', 't'), IMAGES),
    'balance_by_magnitude': Case(
        objectives.balance_by_magnitude(objectives.combine(a=0.5 * objectives.hint('s', 't'), b=objectives.soft_targets()), 'b')
    ),
    'binary_labels': Case(objectives.binary_labels(class_weights=[1.0, 2.0, 0.0, 0.5, 1.0]), labels='several_labels'),
    'binary_soft_targets': Case(objectives.binary_soft_targets()),
    'bounded_regression': Case(objectives.bounded_regression(margin=9.0), labels='numbers'),
    'by_position': Case(objectives.by_position(objectives.from_function('top', lambda s, t, b: (s.logits - t.logits).max(-1)))),
    # Windows of more positions would be those of the padded image.
    'cat_kd': Case(objectives.cat_kd('s', 't', 'kernel', 'kernel', resolution=1), IMAGES),
    'channel_wise': Case(objectives.channel_wise('s', 't'), IMAGES),
    'combine': Case(objectives.combine(a=0.5 * objectives.hint('s', 't'), b=objectives.soft_targets())),
    'constraint': Case(objectives.constraint(objectives.hard_labels(), 0.3, multiplier=2.0)),
    'correlation_congruence': Case(objectives.correlation_congruence('s', 't')),
    'crd': Case(objectives.crd('s', 't', BANK, negatives=3, width=4, temperature=0.5)),
    'curriculum_temperature': Case(objectives.curriculum_temperature(10, variant='example', hidden=4)),
    'decoupled_kd': Case(objectives.decoupled_kd(ignore=4)),
    'dist': Case(objectives.dist()),
    'dist_plus': Case(objectives.dist_plus('s', 't')),
    'diversity': Case(objectives.diversity()),
    'domain_discrimination': Case(objectives.domain_discrimination('s', domains=3, hidden=4)),
    'factor_transfer': Case(objectives.factor_transfer('s', 't'), IMAGES),
    'fbkd': Case(objectives.fbkd('s', 't', guided=0.3, attention=0.4, non_local=0.5), IMAGES),
    'from_function': Case(objectives.from_function('share', lambda s, t, b: b['share'] ** 2)),
    'from_recorded_logits': Case(objectives.from_recorded_logits(objectives.soft_targets())),
    'fsp': Case(objectives.fsp(('s', 'late'), ('t', 'wide')), IMAGES),
    'hard_labels': Case(objectives.hard_labels(label_smoothing=0.1, class_weights=[1.0, 2.0, 0.5, 1.0, 3.0], ignore=3)),
    'hard_targets': Case(objectives.hard_targets()),
    'hidden_cosine': Case(objectives.hidden_cosine('s', 't'), ('tokens',)),
    'hierarchical_context': Case(objectives.hierarchical_context(['s', 'late'], ['t', 'wide']), IMAGES),
    'hint': Case(objectives.hint('s', 't', normalize=True)),
    'in_stages': Case(objectives.in_stages([objectives.logit_mse(), objectives.hard_labels()], [5])),
    'info_nce': Case(objectives.info_nce('s', 't', width=4)),
    'instance_graph': Case(objectives.instance_graph(['s', 'late'], ['t', 'wide'])),
    'inter_channel': Case(objectives.inter_channel('s', 't', variant='normalized'), IMAGES),
    'jacobian': Case(objectives.jacobian()),
    'jensen_shannon': Case(objectives.jensen_shannon()),
    'label_free_tuning': Case(objectives.label_free_tuning(ignore=4)),
    'logit_mse': Case(objectives.logit_mse()),
    'loss_gradient_attention': Case(objectives.loss_gradient_attention('s', 't'), IMAGES, 'pooled/logits'),
    # Masks of other shapes are other draws.
    'masked_generation': Case(objectives.masked_generation('s', 't', share=0.0), POSITIONS),
    'mixed_labels': Case(objectives.mixed_labels(ignore=4)),
    'multi_level_logits': Case(objectives.multi_level_logits()),
    'mutual_learning': Case(objectives.mutual_learning(2)),
    'normalized_kd': Case(objectives.normalized_kd(ignore=4)),
    'nst': Case(objectives.nst('s', 't'), IMAGES),
    'of_member': Case(objectives.of_member(objectives.reverse_kl(), 1, teacher=0)),
    'over_layers': Case(objectives.over_layers(objectives.pkt, {'s': 't', 'late': 'wide'})),
    'over_positions': Case(objectives.over_positions(objectives.soft_targets(), 'completion')),
    'overhaul': Case(objectives.overhaul('s', 't')),
    'pearson_features': Case(objectives.pearson_features('s', 't')),
    'pkt': Case(objectives.pkt('s', 't')),
    'policy_gradient': Case(objectives.policy_gradient(), ('tokens',)),
    'reconstruction': Case(objectives.reconstruction(None, None)),
    'regression': Case(objectives.regression(delta=0.5), labels='numbers'),
    'reverse_kl': Case(objectives.reverse_kl()),
    'rkd_angle': Case(objectives.rkd_angle('s', 't')),
    'rkd_distance': Case(objectives.rkd_distance('s', 't')),
    'sampled_reverse_kl': Case(objectives.sampled_reverse_kl(ignore=4)),
    'semckd': Case(objectives.semckd(['s', 'late'], ['t', 'wide']), POSITIONS),
    'simkd': Case(objectives.simkd('s', 't'), POSITIONS),
    'similarity_preserving': Case(objectives.similarity_preserving('s', 't')),
    'singular_vectors': Case(objectives.singular_vectors('s', 't'), IMAGES),
    'skewed_kl': Case(objectives.skewed_kl()),
    'skewed_reverse_kl': Case(objectives.skewed_reverse_kl()),
    'soft_targets': Case(objectives.soft_targets()),
    'span_universal_logit': Case(objectives.span_universal_logit(), ('tokens',)),
    'srd': Case(objectives.srd('s', 't')),
    'standardize_logits': Case(objectives.standardize_logits(objectives.soft_targets())),
    'subset_soft_targets': Case(objectives.subset_soft_targets([4, 3, 2, 1, 0])),
    'taid': Case(objectives.taid(interpolation=0.5)),
    'top_k_jensen_shannon': Case(objectives.top_k_jensen_shannon()),
    'top_k_reverse_kl': Case(objectives.top_k_reverse_kl()),
    'top_k_soft_targets': Case(objectives.top_k_soft_targets()),
    'total_variation': Case(objectives.total_variation()),
    'universal_logit': Case(objectives.universal_logit()),
    'value_relations': Case(objectives.value_relations('values', 'values'), ('tokens',)),
    'vid': Case(objectives.vid('s', 't')),
    'weighted_soft_labels': Case(objectives.weighted_soft_labels(ignore=4)),
    'with_check': Case(objectives.with_check(objectives.logit_mse(), lambda student, teacher, batch: None)),
    'with_parameters': Case(objectives.with_parameters('own', lambda *_: jnp.ones(()), squares)),
}
NO_OBJECTIVES = {'Batch', 'Objective', 'Term', 'batch_mean', 'simkd_logits', 'uniform_layers'}


def test_every_objective_is_in_the_table():
    public = {name for name, value in vars(objectives).items() if not name.startswith('_') and callable(value)}
    assert public - NO_OBJECTIVES == set(CASES)


def named(layout: str) -> dict[str, Case]:
    """The cases of a layout."""
    return {name: case for name, case in CASES.items() if layout in case.layouts}


def axes(roles: tuple, examples: Any, positions: Any) -> list[Any]:
    """One entry for every axis: what stands for examples, for each axis of positions, or the size."""
    parts = {'b': [examples], 'p': positions}
    return [entry for role in roles for entry in parts.get(role, [role])]


@functools.cache
def drawn(layout: str) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of the big batch."""
    rng, positions = np.random.default_rng(0), LAYOUTS[layout][1]
    arrays = {
        side: {name: rng.normal(size=axes(roles, BIG, positions)).astype(np.float32) for name, roles in each.items()}
        for side, each in ROLES.items()
    }
    batch = arrays['batch']
    for name, low, high in (
        ('labels', -1, CLASSES),
        ('other_labels', 0, CLASSES),
        ('several_labels', -1, 2),
        ('domains', -1, 3),
        ('teacher_labels', 0, CLASSES),
    ):
        batch[name] = rng.integers(low, high, batch[name].shape).astype(np.int32)
    batch['labels'].flat[:2] = 1, 4
    batch['domains'][0] = 2
    batch['index'] = np.array([4, 1, 0, 3, 2], np.int32)
    for name, spans in (('student_spans', [0, 0, 1, 2, 2]), ('teacher_spans', [0, 1, 1, 2, 3])):
        batch[name] = np.broadcast_to(np.resize(np.int32(spans), batch[name].shape[1:]), batch[name].shape)
    batch['share'] = rng.uniform(size=batch['share'].shape).astype(np.float32)
    batch['top_indices'] = np.broadcast_to(np.array([3, 0], np.int32), batch['top_indices'].shape)
    batch['completion'] = rng.uniform(size=batch['labels'].shape) < 0.7
    return arrays


def taken(layout: str, side: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The part of big arrays in which the small ones lie."""
    columns = [range(n) for n in LAYOUTS[layout][0]]
    indices = {name: axes(ROLES[side][name], KEPT, columns) for name in arrays}
    return {name: x[np.ix_(*(range(i) if isinstance(i, int) else i for i in indices[name]))] for name, x in arrays.items()}


@functools.cache
def small(layout: str) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of a batch of which all counts."""
    return {side: taken(layout, side, arrays) for side, arrays in drawn(layout).items()}


def hidden(layout: str, where: np.ndarray, fill: float) -> dict[str, dict[str, np.ndarray]]:
    """The big batch with `fill` outside `where`, or with integers that are no class and no index."""
    positions = where.ndim - 1

    def hide(roles: tuple, x: np.ndarray) -> np.ndarray:
        starts = [i for i, axis in enumerate(axes(roles, 'b', ['p', *['more'] * (positions - 1)][:positions])) if axis == 'p']
        keep = np.full(x.shape, roles[0] != 'b')
        if roles[0] == 'b':
            keep |= where.reshape(BIG, -1).any(1).reshape(BIG, *(1,) * (x.ndim - 1))
        for start in starts:
            keep &= where.reshape(BIG, *(1,) * (start - 1), *where.shape[1:], *(1,) * (x.ndim - start - positions))
        return np.where(keep, x, np.asarray({'f': fill, 'i': 77, 'b': True}[x.dtype.kind], x.dtype))

    return {side: {name: hide(ROLES[side][name], x) for name, x in arrays.items()} for side, arrays in drawn(layout).items()}


def counted(layout: str) -> np.ndarray:
    """Where the small batch lies in the big one, [batch, positions]."""
    where = np.zeros((BIG, *LAYOUTS[layout][1]), bool)
    where[np.ix_(KEPT, *(range(n) for n in LAYOUTS[layout][0]))] = True
    return where


def arguments(case: Case, arrays: dict[str, Any]) -> tuple[Outputs, Outputs, dict[str, Any]]:
    """The outputs of both networks, and the batch."""
    student, teacher = (Outputs(arrays[side][case.logits], arrays[side]) for side in ('student', 'teacher'))
    return student, teacher, {**arrays['batch'], 'labels': arrays['batch'][case.labels]}


@functools.cache
def parameters(layout: str) -> tuple[dict, dict]:
    """Parameters and state of every case; they are the same for any batch and length."""
    params, states = {}, {}
    for name, case in named(layout).items():
        own = arguments(case, small(layout))
        params[name], states[name] = random_params(case.objective, *own), abstract_init(case.objective, *own)[1]
        if jax.tree.leaves(states[name]):
            init = jax.jit(lambda key, init=case.objective.init, own=own: init(key, *own)[1])
            states[name] = init(jax.random.key(1))
    return params, states


@functools.cache
def program(layout: str) -> Callable[..., Any]:
    """Values of all terms, and the gradients of their sum by `weights`, for parameters and the student."""

    def run(weights: dict, params: dict, states: dict, arrays: dict) -> Any:
        def loss(params: dict, student: dict) -> Any:
            values = {}
            for name, case in named(layout).items():
                own = arguments(case, {**arrays, 'student': student})
                values[name], _, _ = case.objective.apply(params[name], states[name], *own, step=0)
            return sum(weights[name] * value for name, value in values.items()), values

        (_, values), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, arrays['student'])
        return values, gradients

    return compile_quickly(run)


def computed(layout: str, arrays: dict, weights: dict | None = None) -> Any:
    """Values, and gradients of a sum of all terms, or of the one with a weight."""
    weights = dict.fromkeys(named(layout), 1.0) if weights is None else {**dict.fromkeys(named(layout), 0.0), **weights}
    # What the networks get does not matter here.
    arrays = {**arrays, 'batch': {**arrays['batch'], 'inputs': {'ids': np.zeros((2, 1)), 'types': np.zeros(2, np.int32)}}}
    return jax.device_get(program(layout)({k: np.float32(w) for k, w in weights.items()}, *parameters(layout), arrays))


def masked(
    layout: str, where: np.ndarray, weights: float | np.ndarray = 1.0, *, mask: Any = None, fill: float = np.nan
) -> dict:
    """The big batch with NaN, or `fill`, in all that does not count, by `mask` or, if not given, `where`."""
    arrays = hidden(layout, where, fill)
    weights = np.broadcast_to(np.float32(weights), where.shape)
    return {**arrays, 'batch': {**arrays['batch'], 'mask': where if mask is None else mask, 'weights': weights}}


def check_close(name: str, one: Any, other: Any) -> None:
    """To a few units in the last place of the largest number of the tree."""
    pairs = list(zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))
    largest = max((np.abs(y).max() for _, y in pairs), default=0.0)
    for x, y in pairs:
        np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5 * largest + 1e-9, err_msg=name)


every_layout = pytest.mark.parametrize('layout', LAYOUTS)


@every_layout
def test_further_examples_and_padding_of_nan_change_neither_value_nor_gradient(layout):
    """A mask is slicing: parameters and student get the gradients of the batch without what is masked, and zeros there."""
    padded = masked(layout, counted(layout))
    values, _ = computed(layout, small(layout))
    padded_values, _ = computed(layout, padded)
    for name in named(layout):
        np.testing.assert_allclose(padded_values[name], values[name], rtol=1e-4, atol=1e-6, err_msg=name)
        assert values[name] != 0, name
        _, (params, student) = computed(layout, small(layout), {name: 1.0})
        _, (padded_params, padded_student) = computed(layout, padded, {name: 1.0})
        inside = taken(layout, 'student', padded_student)
        check_close(name, (padded_params, inside), (params, student))
        for path, gradient in padded_student.items():
            # All that is not zero is where the small batch lies.
            assert np.count_nonzero(gradient) == np.count_nonzero(inside[path]), f'{name} {path}'


@every_layout
def test_weights_of_zero_are_a_mask_and_equal_weights_are_none(layout):
    where = counted(layout)
    expected = computed(layout, masked(layout, where))
    # Of what does not count, every other position is left out by the mask alone, and the rest by its weight.
    others = (np.arange(where.size).reshape(where.shape) % 2).astype(bool)
    for arrays in (
        masked(layout, where, where, mask=np.ones_like(where)),
        masked(layout, where, np.where(where, 2.5, np.nan)),
        masked(layout, where, where | others, mask=where | ~others),
    ):
        values, gradients = computed(layout, arrays)
        for name in named(layout):
            np.testing.assert_allclose(values[name], expected[0][name], rtol=1e-5, atol=1e-6, err_msg=name)
        check_close('gradients', gradients, expected[1])


@pytest.mark.parametrize('layout', POSITIONS)
def test_what_stands_in_ragged_padding_is_never_seen(layout):
    where = counted(layout)
    where[0, ..., :1], where[2, ..., -1:] = False, True
    one, other = (computed(layout, masked(layout, where, fill=fill)) for fill in (np.nan, 1e3))
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.all(np.isfinite(x))
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize('layout', ['examples', 'tokens'])
def test_a_mesh_with_explicit_axes_changes_nothing(layout):
    """As `jax.make_mesh` makes it, where the type of an array says how it is split."""
    mesh = jax.make_mesh((BIG,), ('data',), axis_types=(jax.sharding.AxisType.Explicit,), devices=jax.devices()[:BIG])
    arrays = masked(layout, counted(layout), fill=0.0)

    def place(roles: tuple, x: np.ndarray) -> jax.Array:
        spec = jax.P('data') if roles[0] == 'b' else jax.P()
        return jax.device_put(x, jax.NamedSharding(mesh, spec))

    placed = {
        side: {name: place(ROLES[side].get(name, ('b',)), x) for name, x in each.items()} for side, each in arrays.items()
    }
    expected, (_, gradient) = computed(layout, arrays)
    with jax.set_mesh(mesh):
        values, (_, placed_gradient) = computed(layout, placed)
    for name in named(layout):
        np.testing.assert_allclose(values[name], expected[name], rtol=1e-4, atol=1e-6, err_msg=name)
    check_close('gradients', placed_gradient, gradient)
