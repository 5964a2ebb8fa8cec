"""Objectives on the logits of linear heads: those of the products, in values and gradients, without ever holding them."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.linear_checks import assert_close
from helpers.objective_checks import compile_quickly

from kdjax import losses, objectives
from kdjax.metrics import Average
from kdjax.networks import LinearLogits, Outputs, dense_logits

RNG = np.random.default_rng(0)
BATCH, LENGTH, CLASSES = 4, 5, 7
WIDTHS = {'student': 3, 'teacher': 4}


def draw(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def head(width, classes=CLASSES, **options):
    return LinearLogits(draw(BATCH, LENGTH, width), draw(width, classes), draw(classes), **{'chunk': 6, **options})


def labels(*shape, classes=CLASSES):
    return RNG.integers(-1, classes, shape).astype(np.int32)


def made():
    """A capped student, a teacher whose kernel is a table of embeddings, and a batch with all that objectives read."""
    student = head(WIDTHS['student'], softcap=2.0)
    teacher = head(WIDTHS['teacher'], chunk=9)
    teacher = dataclasses.replace(teacher, kernel=np.ascontiguousarray(teacher.kernel.T), transposed=True)
    mask = RNG.uniform(size=(BATCH, LENGTH)) < 0.7
    mask[0, :2] = True, False
    largest = losses.top_k_logits(dense_logits(teacher), 2)
    batch = {
        'inputs': {'ids': np.zeros((BATCH, 3, 2), np.int32)},
        'mask': mask,
        'weights': RNG.uniform(size=BATCH).astype(np.float32),
        'completion': RNG.uniform(size=(BATCH, LENGTH)) < 0.8,
        'labels': labels(BATCH, LENGTH),
        'other_labels': labels(BATCH, LENGTH),
        'share': RNG.uniform(size=(BATCH, LENGTH)).astype(np.float32),
        'several_labels': RNG.integers(-1, 2, (BATCH, LENGTH, CLASSES)).astype(np.int32),
        'numbers': draw(BATCH, LENGTH, CLASSES),
        'teacher_logits': draw(BATCH, LENGTH, CLASSES),
        **dict(zip(('top_logits', 'top_indices', 'rest'), map(np.asarray, largest), strict=True)),
    }
    return student, teacher, batch


def gap(student, teacher, batch):
    """A function of one's own."""
    del batch
    return (student.logits - teacher.logits).max(-1)


BY_POSITION = {
    'adaptive_kl': objectives.adaptive_kl(),
    'alpha_beta_divergence': objectives.alpha_beta_divergence(alpha=0.4, beta=0.3),
    'binary_soft_targets': objectives.binary_soft_targets(),
    'curriculum_of_examples': objectives.curriculum_temperature(10, variant='example', hidden=4),
    'curriculum_temperature': objectives.curriculum_temperature(10),
    'decoupled_kd': objectives.decoupled_kd(ignore=4),
    'from_recorded_logits': objectives.from_recorded_logits(objectives.soft_targets()),
    'gap': objectives.by_position(objectives.from_function('gap', gap)),
    'hard_labels': objectives.hard_labels(label_smoothing=0.1, class_weights=[1.0, 2.0, 0.5, 1.0, 3.0, 1.0, 1.0]),
    'hard_targets': objectives.hard_targets(),
    'in_stages': objectives.in_stages([objectives.logit_mse(), objectives.hard_labels()], [5]),
    'jensen_shannon': objectives.jensen_shannon(beta=0.3),
    'label_free_tuning': objectives.label_free_tuning(threshold=0.6),
    'logit_mse': objectives.logit_mse(),
    'mixed_labels': objectives.mixed_labels(),
    'normalized_kd': objectives.normalized_kd(),
    'over_positions': objectives.over_positions(objectives.soft_targets(), 'completion'),
    'reverse_kl': objectives.reverse_kl(),
    'sampled_reverse_kl': objectives.sampled_reverse_kl(),
    'skewed_kl': objectives.skewed_kl(),
    'skewed_reverse_kl': objectives.skewed_reverse_kl(),
    'soft_targets': objectives.soft_targets(temperature=lambda step: 2.0 + step),
    'standardize_logits': objectives.standardize_logits(objectives.soft_targets()),
    'subset_soft_targets': objectives.subset_soft_targets([6, 5, 4, 3, 2, 1, 0]),
    'taid': objectives.taid(interpolation=0.5),
    'top_k_jensen_shannon': objectives.top_k_jensen_shannon(),
    'top_k_reverse_kl': objectives.top_k_reverse_kl(),
    'top_k_soft_targets': objectives.top_k_soft_targets(),
    'total_variation': objectives.total_variation(),
    'universal_logit': objectives.universal_logit(),
    'weighted_soft_labels': objectives.weighted_soft_labels(),
}
OTHERS = {
    'adaptive_taid': objectives.adaptive_taid(10),
    'balance_by_magnitude': objectives.balance_by_magnitude(objectives.reverse_kl() + objectives.hard_labels(), 'reverse_kl'),
    'constraint': objectives.constraint(objectives.reverse_kl(), 0.1, multiplier=2.0),
    'dist': objectives.dist(),
    'diversity': objectives.diversity(),
    'from_function': objectives.from_function('gap', gap),
    'multi_level_logits': objectives.multi_level_logits(),
    'policy_gradient': objectives.policy_gradient(),
    'standardize_dist': objectives.standardize_logits(objectives.dist()),
}
ON_LABELS = {
    'several_labels': objectives.binary_labels(),
    'numbers': objectives.bounded_regression(margin=9.0) + objectives.regression(),
}


def as_dense(logits):
    return dense_logits(jax.tree.map(jnp.asarray, logits))


def computed(cases, student, teacher, batch, *, dense=('student', 'teacher')):
    """Values and metrics of all terms of objectives, and the gradients of their sum for what the student's logits are made of.

    Objectives come with the entry of the batch that is their labels.
    """

    def loss(student, teacher, batch):
        pair = [Outputs(as_dense(x) if side in dense else x) for side, x in zip(WIDTHS, (student, teacher), strict=True)]
        found = {}
        for entry, objective in cases.items():
            own = {**batch, 'labels': batch[entry]}
            params, state = objective.init(jax.random.key(0), *pair, own)
            value, metrics, _ = objective.apply(params, state, *pair, own, step=1)
            found[entry] = value, {key: x.total / x.count for key, x in metrics.items()}
        return sum(value for value, _ in found.values()), found

    (_, found), gradients = compile_quickly(jax.value_and_grad(loss, has_aux=True))(student, teacher, batch)
    return found, gradients


def some(*names):
    """Some of those by position, in one objective."""
    return {'labels': objectives.combine(**{name: BY_POSITION[name] for name in names})}


ALL = {'labels': objectives.combine(**BY_POSITION, **OTHERS), **ON_LABELS}


def test_every_objective_is_that_of_the_products():
    """With positions that the chunks do not divide."""
    arguments = made()
    expected = computed(ALL, *arguments)
    assert_close(computed(ALL, *arguments, dense=()), expected)
    terms = [(name, value) for _, metrics in expected[0].values() for name, value in metrics.items() if '/' not in name]
    assert all(value != 0 for _, value in terms)


@pytest.mark.parametrize('dense', ['student', 'teacher'])
def test_one_of_the_two_may_be_an_array(dense):
    arguments, cases = made(), some('hard_labels', 'soft_targets', 'decoupled_kd', 'top_k_soft_targets', 'universal_logit')
    assert_close(computed(cases, *arguments, dense=(dense,)), computed(cases, *arguments))


def test_those_by_position_never_make_an_array_of_all_logits():
    student, teacher, batch = made()

    def loss(objective, student, teacher, batch):
        pair = Outputs(student), Outputs(teacher)
        params, state = objective.init(jax.random.key(0), *pair, batch)
        return objective.apply(params, state, *pair, batch, step=1)[0]

    def whole(objective, batch):
        program = jax.make_jaxpr(functools.partial(loss, objective))(student, teacher, batch)
        return re.search(rf'f32\[({BATCH},{LENGTH}|{BATCH * LENGTH}),{CLASSES}\]', str(program)) is not None

    batch = {name: x for name, x in batch.items() if name not in ('several_labels', 'numbers', 'teacher_logits')}
    without = {name: x for name, x in BY_POSITION.items() if name != 'from_recorded_logits'}
    assert not whole(objectives.combine(**without), batch)
    assert not whole(OTHERS['adaptive_taid'] + OTHERS['constraint'], batch)
    assert whole(objectives.dist(), batch)


def test_all_terms_share_one_pass():
    """As many products as one divergence needs: two forward, the same again, and two for the student's gradient."""
    student, teacher, batch = made()
    objective = objectives.hard_labels() + objectives.soft_targets() + objectives.reverse_kl() + objectives.jensen_shannon()
    nothing = {key: {} for key in objective.names}

    def loss(student):
        return objective.apply(nothing, nothing, Outputs(student), Outputs(teacher), batch, step=0)[0]

    assert jax.jit(jax.value_and_grad(loss)).lower(student).compile().as_text().count(' dot(') == 6


@pytest.mark.parametrize('fill', [np.nan, np.inf])
def test_hidden_states_that_do_not_count_are_never_multiplied(fill):
    student, teacher, batch = made()
    cases = some('hard_labels', 'soft_targets', 'jensen_shannon')
    expected = computed(cases, student, teacher, batch, dense=())
    kept = batch['mask'][..., None]
    filled = [dataclasses.replace(x, hidden=np.where(kept, x.hidden, np.float32(fill))) for x in (student, teacher)]
    assert_close(computed(cases, *filled, batch, dense=()), expected, 0)


@pytest.mark.parametrize('chunk', [1, 20, 100])
def test_chunks_change_nothing(chunk):
    student, teacher, batch = made()
    cases = some('hard_labels', 'reverse_kl')
    other = [dataclasses.replace(x, chunk=chunk) for x in (student, teacher)]
    assert_close(computed(cases, *other, batch, dense=())[0], computed(cases, student, teacher, batch)[0])


def test_vocabularies_of_other_sizes():
    """Those that the objective compares as they are, and a table that is padded to more rows than there are classes."""
    student, teacher, batch = made()
    wide = head(WIDTHS['teacher'], CLASSES + 3)
    cases = some('universal_logit')
    assert_close(computed(cases, student, wide, batch, dense=()), computed(cases, student, wide, batch))
    cases = some('soft_targets')
    assert_close(computed(cases, student, wide[..., :CLASSES], batch, dense=()), computed(cases, student, wide[..., :7], batch))
    with pytest.raises(ValueError, match='must have the same shape'):
        computed(cases, student, wide, batch, dense=())
    table = dataclasses.replace(teacher, hidden=wide.hidden)[..., 2:5]
    # Sums that cancel are rounded by the size of their terms.
    expected = as_dense(dataclasses.replace(teacher, hidden=wide.hidden))[..., 2:5]
    np.testing.assert_allclose(as_dense(table), expected, rtol=1e-6, atol=1e-6)


def test_halves_are_summed_in_float32():
    """Over positions too: the gradient of the kernel is rounded once, not after every chunk."""
    cases = some('hard_labels', 'soft_targets')
    student, teacher, batch = made()
    halves = [jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), dataclasses.replace(x, chunk=1)) for x in (student, teacher)]
    found, gradients = computed(cases, *halves, batch, dense=())
    upcast = [jax.tree.map(lambda x: x.astype(jnp.float32), x) for x in halves]
    expected, wanted = computed(cases, *upcast, batch)
    assert_close(found, expected)
    for x, y in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
        assert x.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(x), y, rtol=float(jnp.finfo(jnp.bfloat16).eps), atol=1e-5)


def test_outside_of_jit_a_wrong_label_is_an_error():
    student, teacher, batch = made()
    batch['labels'][0, 0] = CLASSES
    objective = objectives.hard_labels()
    nothing = {'hard_labels': {}}
    arguments = nothing, nothing, Outputs(student), Outputs(teacher)
    for function in (objective.apply, jax.value_and_grad(lambda *x, step: objective.apply(*x, step=step)[0], 2)):
        with pytest.raises(ValueError, match=r"^hard_labels: batch\['labels'\] must be below 7, .* got 7 \(1 such\)"):
            function(*arguments, batch, step=0)
    assert np.isnan(jax.jit(objective.apply)(*arguments, batch, step=0)[0])
    with pytest.raises(ValueError, match=r'^hard_labels: labels \(4, 4\) do not fit logits \(4, 5, 7\)'):
        objective.apply(*arguments, {'labels': batch['labels'][:, :4]}, step=0)


MEASURED = {
    'cross_entropy': objectives.hard_labels(),
    'soft_targets': objectives.soft_targets(),
    'reverse_kl': objectives.reverse_kl(),
    'jensen_shannon': objectives.jensen_shannon(),
}


@pytest.mark.parametrize('name', MEASURED)
def test_temporary_memory_is_an_eighth(name):
    """Of 1024 tokens over 32,768 classes, in chunks of 64, with the gradients of the student's hidden states and kernel."""
    objective = MEASURED[name]
    nothing = {key: {} for key in objective.names}
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(8, 128, 16), (16, 32768)] * 2]

    def temporary(linear):
        def loss(student, kernel, teacher, teacher_kernel, labels):
            pair = LinearLogits(student, kernel, chunk=64), LinearLogits(teacher, teacher_kernel, chunk=64)
            pair = [Outputs(x if linear else dense_logits(x)) for x in pair]
            return objective.apply(nothing, nothing, *pair, {'labels': labels}, step=0)[0]

        program = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*shapes, jax.ShapeDtypeStruct((8, 128), jnp.int32))
        return program.compile().memory_analysis().temp_size_in_bytes

    assert temporary(True) <= temporary(False) / 8


def test_a_sweep_over_temperatures():
    student, teacher, batch = made()

    def value(temperature, dense):
        objective = objectives.soft_targets(temperature=temperature)
        pair = [Outputs(as_dense(x) if dense else x) for x in (student, teacher)]
        return objective.apply({'soft_targets': {}}, {'soft_targets': {}}, *pair, batch, step=0)[0]

    for dense in (False, True):
        values = jax.jit(jax.vmap(jax.value_and_grad(functools.partial(value, dense=dense))))(jnp.array([1.0, 3.0]))
        assert_close(values, jax.vmap(jax.value_and_grad(functools.partial(value, dense=True)))(jnp.array([1.0, 3.0])))


def test_members_of_an_ensemble_that_learn_from_each_other():
    heads = {f'{i}/logits': head(WIDTHS['student']) for i in range(2)}
    batch = {'labels': labels(BATCH, LENGTH)}
    objective = objectives.mutual_learning(2)

    def loss(features, dense):
        features = jax.tree.map(jnp.asarray, features)
        if dense:
            features = {name: dense_logits(x) for name, x in features.items()}
        params, state = objective.init(jax.random.key(0), Outputs(None, features), Outputs(None), batch)
        return objective.apply(params, state, Outputs(None, features), Outputs(None), batch, step=0)[0]

    ours, naive = (jax.jit(jax.value_and_grad(functools.partial(loss, dense=dense)))(heads) for dense in (False, True))
    assert_close(ours, naive)


def test_a_function_by_position_may_return_an_average():
    student, teacher, batch = made()

    def total(student, teacher, batch):
        del teacher
        return Average(jnp.sum(jnp.where(batch['mask'][..., None], student.logits, 0.0)), jnp.sum(batch['mask']))

    objective = objectives.by_position(objectives.from_function('total', total))
    nothing = {'total': {}}
    for own in (student, as_dense(student)):
        value = objective.apply(nothing, nothing, Outputs(own), Outputs(teacher), batch, step=0)[0]
        np.testing.assert_allclose(value, as_dense(student)[batch['mask']].sum(-1).mean(), rtol=1e-5)
