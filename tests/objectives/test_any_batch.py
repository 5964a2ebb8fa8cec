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
from objective_checks import abstract_init, compile_quickly, random_params

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
        'labels': ('b', 'p'),
        'other_labels': ('b', 'p'),
        'share': ('b', 'p'),
        'top_logits': ('b', 'p', 2),
        'top_indices': ('b', 'p', 2),
        'rest': ('b', 'p'),
        'teacher_logits': LOGITS,
        'index': ('b',),
        'domains': ('b',),
    },
}
"""The axes of every array: `b` of examples, `p` of positions, or a size."""
# Examples 0 to 5 have one negative, so that those drawn for a batch of another size are the same.
BANK = np.array([0, 0, 0, 0, 0, 0, 1], np.int32)


class Case(NamedTuple):
    """An objective, the layouts that it is for, and whether it looks at logits [batch, classes] whatever the layout."""

    objective: objectives.Objective
    layouts: tuple[str, ...] = tuple(LAYOUTS)
    pooled_logits: bool = False


def squares(params: Any, student: Outputs, teacher: Outputs, batch: Any) -> Any:
    """A function of one's own that looks at labels alone, and has a parameter."""
    del teacher, student
    return jnp.where(batch['labels'] > 2, params, 0.0) ** 2


POSITIONS, IMAGES = ('tokens', 'pixels'), ('pixels',)
CASES = {
    'activation_boundary': Case(objectives.activation_boundary('s', 't')),
    'activation_size': Case(objectives.activation_size('s')),
    'attention_distillation': Case(objectives.attention_distillation('s', 't')),
    'attention_maps': Case(objectives.attention_maps('heads', 'heads', variant='kl'), ('tokens',)),
    'attention_transfer': Case(objectives.attention_transfer('s', 't'), IMAGES),
    'channel_wise': Case(objectives.channel_wise('s', 't'), IMAGES),
    'combine': Case(objectives.combine(a=0.5 * objectives.hint('s', 't'), b=objectives.soft_targets())),
    'constraint': Case(objectives.constraint(objectives.hard_labels(), 0.3, multiplier=2.0)),
    'correlation_congruence': Case(objectives.correlation_congruence('s', 't')),
    'crd': Case(objectives.crd('s', 't', BANK, negatives=3, width=4, temperature=0.5)),
    'decoupled_kd': Case(objectives.decoupled_kd(ignore=4)),
    'dist': Case(objectives.dist()),
    'diversity': Case(objectives.diversity()),
    'domain_discrimination': Case(objectives.domain_discrimination('s', domains=3, hidden=4)),
    'factor_transfer': Case(objectives.factor_transfer('s', 't'), IMAGES),
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
    'jacobian': Case(objectives.jacobian()),
    'jensen_shannon': Case(objectives.jensen_shannon()),
    'linear_soft_targets': Case(objectives.linear_soft_targets('s', 'kernel', 't', 'kernel')),
    'logit_mse': Case(objectives.logit_mse()),
    'loss_gradient_attention': Case(objectives.loss_gradient_attention('s', 't'), IMAGES, pooled_logits=True),
    # Masks of other shapes are other draws.
    'masked_generation': Case(objectives.masked_generation('s', 't', masked=0.0), POSITIONS),
    'mixed_labels': Case(objectives.mixed_labels(ignore=4)),
    'mutual_learning': Case(objectives.mutual_learning(2)),
    'normalized_kd': Case(objectives.normalized_kd(ignore=4)),
    'nst': Case(objectives.nst('s', 't'), IMAGES),
    'of_member': Case(objectives.of_member(objectives.reverse_kl(), 1, teacher=0)),
    'over_layers': Case(objectives.over_layers(objectives.pkt, {'s': 't', 'late': 'wide'})),
    'over_positions': Case(objectives.over_positions(objectives.soft_targets(), 'completion')),
    'overhaul': Case(objectives.overhaul('s', 't')),
    'pkt': Case(objectives.pkt('s', 't')),
    'reconstruction': Case(objectives.reconstruction(None, None)),
    'reverse_kl': Case(objectives.reverse_kl()),
    'rkd_angle': Case(objectives.rkd_angle('s', 't')),
    'rkd_distance': Case(objectives.rkd_distance('s', 't')),
    'similarity_preserving': Case(objectives.similarity_preserving('s', 't')),
    'singular_vectors': Case(objectives.singular_vectors('s', 't'), IMAGES),
    'skewed_kl': Case(objectives.skewed_kl()),
    'soft_targets': Case(objectives.soft_targets()),
    'standardize_logits': Case(objectives.standardize_logits(objectives.soft_targets())),
    'subset_soft_targets': Case(objectives.subset_soft_targets([4, 3, 2, 1, 0])),
    'top_k_soft_targets': Case(objectives.top_k_soft_targets()),
    'value_relations': Case(objectives.value_relations('values', 'values'), ('tokens',)),
    'vid': Case(objectives.vid('s', 't')),
    'weighted_soft_labels': Case(objectives.weighted_soft_labels(ignore=4)),
    'with_check': Case(objectives.with_check(objectives.logit_mse(), lambda student, teacher, batch: None)),
    'with_parameters': Case(objectives.with_parameters('own', lambda *_: jnp.ones(()), squares)),
}
NO_OBJECTIVES = {'Batch', 'Objective', 'Term', 'batch_mean', 'uniform_layers'}


def test_every_objective_is_in_the_table():
    public = {name for name, value in vars(objectives).items() if not name.startswith('_') and callable(value)}
    assert public - NO_OBJECTIVES - {'Batch'} == set(CASES)


def named(layout: str) -> dict[str, Case]:
    """The cases of a layout."""
    return {name: case for name, case in CASES.items() if layout in case.layouts}


def sizes(roles: tuple, examples: int, positions: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that roles stand for."""
    parts = {'b': (examples,), 'p': positions}
    return tuple(size for role in roles for size in parts.get(role, (role,)))


@functools.cache
def small(layout: str) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of a batch of which all counts."""
    rng, positions = np.random.default_rng(0), LAYOUTS[layout][0]
    drawn = {
        side: {name: rng.normal(size=sizes(roles, len(KEPT), positions)).astype(np.float32) for name, roles in arrays.items()}
        for side, arrays in ROLES.items()
    }
    batch = drawn['batch']
    for name, low, high in (('labels', -1, CLASSES), ('other_labels', 0, CLASSES), ('domains', -1, 3)):
        batch[name] = rng.integers(low, high, batch[name].shape).astype(np.int32)
    batch['labels'].flat[:2] = 1, -1
    batch['domains'][0] = 2
    batch['index'] = np.array([4, 0, 3], np.int32)
    batch['share'] = rng.uniform(size=batch['share'].shape).astype(np.float32)
    batch['top_indices'] = np.broadcast_to(np.array([3, 0], np.int32), batch['top_indices'].shape)
    batch['completion'] = np.ones(batch['labels'].shape, bool)
    batch['completion'].flat[0] = False
    return drawn


def big(layout: str, fill: float) -> dict[str, dict[str, np.ndarray]]:
    """The same between further examples and columns, which hold `fill`, or integers that are no class and no index."""
    positions = LAYOUTS[layout][1]
    roles = {**ROLES, 'batch': {**ROLES['batch'], 'completion': ('b', 'p')}}

    def embed(roles: tuple, array: np.ndarray) -> np.ndarray:
        whole = np.full(sizes(roles, BIG, positions), {'f': fill, 'i': 77, 'b': True}[array.dtype.kind], array.dtype)
        index = [range(n) for n in array.shape]
        whole[np.ix_(*(KEPT if roles[0] == 'b' and i == 0 else axis for i, axis in enumerate(index)))] = array
        return whole

    return {side: {name: embed(roles[side][name], x) for name, x in arrays.items()} for side, arrays in small(layout).items()}


def counted(layout: str) -> np.ndarray:
    """Where the big batch holds the small one, [batch, positions]."""
    where = np.zeros((BIG, *LAYOUTS[layout][1]), bool)
    where[np.ix_(KEPT, *(range(n) for n in LAYOUTS[layout][0]))] = True
    return where


def outputs(arrays: dict[str, Any], pooled: bool = False) -> Outputs:
    """Outputs of a network."""
    features = {name: x for name, x in arrays.items() if name != 'logits'}
    return Outputs(arrays['pooled/logits' if pooled else 'logits'], features)


@functools.cache
def parameters(layout: str) -> tuple[dict, dict]:
    """Parameters and state of every case; they are the same for any batch and length."""
    params, states = {}, {}
    for name, case in named(layout).items():
        shapes = [
            (outputs(a['student'], case.pooled_logits), outputs(a['teacher'], case.pooled_logits), a['batch'])
            for a in (small(layout), {**big(layout, 0.0)})
        ]
        params[name] = random_params(case.objective, *shapes[0])
        one, other = (jax.tree.map(np.shape, abstract_init(case.objective, *each)) for each in shapes)
        assert one == other, name
        state = abstract_init(case.objective, *shapes[0])[1]
        if jax.tree.leaves(state):
            state = jax.jit(lambda key, o=case.objective, s=shapes[0]: o.init(key, *s)[1])(jax.random.key(1))
        states[name] = state
    return params, states


@functools.cache
def program(layout: str) -> Callable[..., Any]:
    """Values of all terms, and the gradients of their sum by `weights`, for parameters and the student."""

    def run(weights: dict, params: dict, states: dict, arrays: dict) -> Any:
        def loss(params: dict, student: dict) -> Any:
            values = {}
            for name, case in named(layout).items():
                sides = (outputs(x, case.pooled_logits) for x in (student, arrays['teacher']))
                values[name], _, _ = case.objective.apply(params[name], states[name], *sides, arrays['batch'], step=0)
            return sum(weights[name] * value for name, value in values.items()), values

        (_, values), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, arrays['student'])
        return values, gradients

    return compile_quickly(run)


def computed(layout: str, arrays: dict, weights: dict | None = None) -> Any:
    """Values, and gradients of a sum of all terms, or of the one with a weight."""
    weights = dict.fromkeys(named(layout), 1.0) if weights is None else {**dict.fromkeys(named(layout), 0.0), **weights}
    return jax.device_get(program(layout)({k: np.float32(w) for k, w in weights.items()}, *parameters(layout), arrays))


def with_entries(arrays: dict, **entries: np.ndarray) -> dict:
    """Arrays with further entries of the batch."""
    return {**arrays, 'batch': {**arrays['batch'], **entries}}


@functools.cache
def masked(layout: str) -> dict:
    """The big batch with NaN in all that does not count, by a mask; weights of 1."""
    where = counted(layout)
    return with_entries(big(layout, np.nan), mask=where, weights=np.ones(where.shape, np.float32))


def check_close(name: str, one: Any, other: Any) -> None:
    """To a few units in the last place of the largest number of the tree."""
    pairs = list(zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))
    largest = max((np.abs(y).max() for _, y in pairs), default=0.0)
    for x, y in pairs:
        np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5 * largest + 1e-9, err_msg=name)


def taken(layout: str, side: str, arrays: dict) -> dict:
    """The part of big arrays in which the small ones lie."""
    return {
        name: x[np.ix_(*(KEPT if ROLES[side][name][0] == 'b' and i == 0 else range(n) for i, n in enumerate(small_.shape)))]
        for (name, x), small_ in ((item, small(layout)[side][item[0]]) for item in arrays.items())
    }


@pytest.mark.parametrize('layout', LAYOUTS)
def test_further_examples_and_padding_of_nan_change_neither_value_nor_gradient(layout):
    """A mask is slicing: parameters and student get the gradients of the batch without what is masked, and zeros there."""
    values, _ = computed(layout, small(layout))
    padded_values, _ = computed(layout, masked(layout))
    for name in named(layout):
        np.testing.assert_allclose(padded_values[name], values[name], rtol=1e-4, atol=1e-6, err_msg=name)
    for name in named(layout):
        _, (params, student) = computed(layout, small(layout), {name: 1.0})
        _, (padded_params, padded_student) = computed(layout, masked(layout), {name: 1.0})
        check_close(name, padded_params, params)
        check_close(name, taken(layout, 'student', padded_student), student)
        inside = taken(layout, 'student', padded_student)
        for path, gradient in padded_student.items():
            # All that is not zero is where the small batch lies.
            np.testing.assert_array_equal(np.count_nonzero(gradient), np.count_nonzero(inside[path]), err_msg=f'{name} {path}')
