"""Random masks, connectors only where they are needed, stages in time, and mappings between layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.objective_checks import abstract_init, arrays, compile_quickly, convolution, features, random_params

from kdjax import objectives

IMAGE = (8, 10, 10, 2)


@functools.partial(compile_quickly, static_argnames='objective')
def masked_generation(objective, params, key, image, step):
    """Value and gradient of the student's image, for a teacher of zeros."""

    def loss(image):
        teacher = features(t=jnp.zeros_like(image))
        state = {'masked_generation': {'key': key}}
        return objective.apply(params, state, features(s=image), teacher, {}, step=step)[0]

    return jax.value_and_grad(loss)(image)


def kept_positions(objective, step, seed=0):
    """Where the gradient of a generator that gives back what it gets is not zero, for an image of ones."""
    kernel = np.zeros((3, 3, 2, 2), np.float32)
    kernel[1, 1] = np.eye(2)
    generator = {f'Conv_{i}': {'kernel': kernel, 'bias': np.zeros(2, np.float32)} for i in range(2)}
    params = {'masked_generation': {'generator': generator}}
    value, gradient = masked_generation(objective, params, jax.random.key(seed), np.ones(IMAGE, np.float32), step)
    np.testing.assert_allclose(value, np.mean(gradient != 0), rtol=1e-6)
    kept = np.asarray(gradient[..., 0] != 0)
    # All channels of a position are masked or none.
    np.testing.assert_array_equal(gradient[..., 1] != 0, kept)
    return kept


def test_every_step_masks_other_positions_and_the_same_ones_when_it_is_repeated():
    objective = objectives.masked_generation('s', 't', share=0.3)
    masks = [kept_positions(objective, step) for step in range(4)]
    for i, mask in enumerate(masks):
        # 800 positions; four standard deviations.
        assert abs(mask.mean() - 0.7) < 4 * np.sqrt(0.3 * 0.7 / mask.size)
        np.testing.assert_array_equal(kept_positions(objective, i), mask)
        # Two independent masks agree at 0.58 of the positions, as do those of two examples.
        for other in [*masks[:i], kept_positions(objective, i, seed=1), np.roll(mask, 1, axis=0)]:
            assert 0.5 < np.mean(mask == other) < 0.66


def test_a_share_of_zero_masks_nothing():
    image = arrays({'image': IMAGE})['image']
    objective = objectives.masked_generation('s', 't', share=0.0)
    params = random_params(objective, features(s=image), features(t=image), {})
    value, _ = masked_generation(objective, params, jax.random.key(0), image, 0)
    first, second = (params['masked_generation']['generator'][f'Conv_{i}'] for i in range(2))
    generated = convolution(second, jnp.maximum(convolution(first, image), 0.0))
    np.testing.assert_allclose(value, jnp.mean(generated**2), rtol=1e-5)


def test_channels_are_masked_at_all_positions_and_fewer_of_them():
    """Of a hundred channels of each example a share of 0.15, unless another is asked for."""
    rng, wide = np.random.default_rng(0), (IMAGE[0], 4, 4, 100)
    image = rng.uniform(1, 2, wide).astype(np.float32)
    eye = np.zeros((3, 3, 100, 100), np.float32)
    eye[1, 1] = np.eye(100)
    generator = {f'Conv_{i}': {'kernel': eye, 'bias': np.zeros(100, np.float32)} for i in range(2)}
    params = {'masked_generation': {'generator': generator}}
    for share, options in ((0.15, {}), (0.6, {'share': 0.6})):
        objective = objectives.masked_generation('s', 't', masked='channels', **options)
        _, gradient = masked_generation(objective, params, jax.random.key(3), image, 0)
        kept = np.asarray(gradient != 0)
        assert np.all(kept == kept[:, :1, :1])
        of_channels = kept[:, 0, 0]
        assert abs(of_channels.mean() - (1 - share)) < 4 * np.sqrt(share * (1 - share) / of_channels.size)
        assert len({row.tobytes() for row in of_channels}) == IMAGE[0]


@pytest.mark.parametrize('share', [-0.1, 1, 1.5])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match=rf'^masked_generation: share must be at least 0 and below 1, got {share}$'):
        objectives.masked_generation('s', 't', share=share)
    with pytest.raises(ValueError, match="masked must be 'positions' or 'channels', got 'pixels'"):
        objectives.masked_generation('s', 't', masked='pixels')


@pytest.mark.parametrize('begin, end, trained', [(3, 5, set()), (2, 5, {'begin'}), (3, 4, {'end'}), (2, 4, {'begin', 'end'})])
def test_fsp_has_connectors_where_channels_differ(begin, end, trained):
    """Sizes may differ all the same."""
    student = features(**arrays({'begin': (2, 4, 4, begin), 'end': (2, 2, 2, end)}))
    teacher = features(**arrays({'begin': (2, 8, 8, 3), 'end': (2, 2, 2, 5)}))
    params, _ = abstract_init(objectives.fsp(('begin', 'end'), ('begin', 'end')), student, teacher, {})
    kernels = {name: connector['Conv_0']['kernel'].shape for name, connector in params['fsp'].items()}
    widths = {'begin': (1, 1, begin, 3), 'end': (1, 1, end, 5)}
    assert kernels == {name: widths[name] for name in trained}


@pytest.mark.parametrize('make', [objectives.channel_wise, objectives.masked_generation, objectives.hidden_cosine])
def test_layers_of_one_shape_get_no_connector_of_shapes(make):
    shape = (2, 4, 3) if make is objectives.hidden_cosine else (2, 4, 4, 3)
    teacher = features(t=np.ones((*shape[:-1], 5), np.float32), same=np.ones(shape, np.float32))
    student = features(s=np.ones(shape, np.float32))
    for path, connected in (('same', False), ('t', True)):
        params, _ = abstract_init(make('s', path), student, teacher, {})
        widths = {
            leaf.shape[-2:] for leaf in jax.tree.leaves(params) if len(leaf.shape) > 1 and leaf.shape[0] != leaf.shape[-1]
        }
        assert ((3, 5) in widths) == connected


def test_hints_come_first_and_the_task_from_its_boundary_on():
    """FitNets' two stages: loss, weights and gradients switch between two steps, to the bit, in one program."""
    drawn = arrays({'s': (4, 3), 't': (4, 5)})
    task = objectives.from_function('task', lambda student, teacher, batch: jnp.sum(student.features['s'] ** 2, axis=1))
    objective = objectives.in_stages([objectives.hint('s', 't'), task], [7])
    student, teacher = features(s=drawn['s']), features(t=drawn['t'])
    params = random_params(objective, student, teacher, {})

    @compile_quickly
    def run(step):
        def loss(params, student):
            value, metrics, _ = objective.apply(params, {'hint': {}, 'task': {}}, student, teacher, {}, step=step)
            return value, metrics

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, student)

    kernel = params['hint']['Dense_0']
    difference = drawn['s'] @ kernel['kernel'] + kernel['bias'] - drawn['t']
    for step in (0, 6, 7, 100):
        (value, metrics), (gradient, student_gradient) = run(jnp.int32(step))
        hinting = step < 7
        assert [float(metrics[f'{name}/weight'].total) for name in ('hint', 'task')] == [hinting, not hinting]
        np.testing.assert_allclose(value, np.mean(difference**2) if hinting else np.mean(np.sum(drawn['s'] ** 2, 1)), rtol=1e-5)
        assert all(np.any(leaf != 0) == hinting for leaf in jax.tree.leaves(gradient))
        if not hinting:
            np.testing.assert_allclose(student_gradient.features['s'], drawn['s'] / 2, rtol=1e-6)


def test_an_objective_over_layers_is_the_mean_over_the_pairs():
    shapes = {'a': (4, 3), 'b': (4, 2)}
    student, teacher = features(**arrays(shapes, 0)), features(**arrays(shapes, 1))

    def difference(s, t, *, weight):
        def values(student, teacher, batch):
            return jnp.mean(student.features[s] - teacher.features[t], axis=1)

        return weight * objectives.from_function('difference', values)

    objective = 3.0 * objectives.over_layers(difference, {'a': 'a', 'b': 'b'}, weight=2.0)
    assert objective.names == ('a <- a', 'b <- b')
    empty = {name: {} for name in objective.names}
    value, metrics, _ = objective.apply(empty, empty, student, teacher, {}, step=0)
    a, b = (np.mean(student.features[path] - teacher.features[path]) for path in ('a', 'b'))
    np.testing.assert_allclose(value, 3 * (a + b), rtol=1e-5)
    np.testing.assert_allclose(metrics['b <- b'].total / metrics['b <- b'].count, b, rtol=1e-5)


def test_pairs_of_layers_train_connectors_of_their_own():
    drawn = arrays({'a': (4, 3), 'b': (4, 3)})
    params, _ = abstract_init(
        objectives.over_layers(objectives.hint, {'a': 'a', 'b': 'b'}), features(**drawn), features(**drawn), {}
    )
    assert set(params) == {'a <- a', 'b <- b'}
    with pytest.raises(ValueError, match=r'^over_layers: [^\n]+ is empty$'):
        objectives.over_layers(objectives.hint, {})


@pytest.mark.parametrize('student_layers', range(1, 7))
@pytest.mark.parametrize('teacher_layers', range(1, 7))
def test_uniform_layers_are_at_the_same_depth(student_layers, teacher_layers):
    """The teacher's layer is the first that is at least as deep, relative to its network; the last to the last."""
    student, teacher = ([f'{side}{i}' for i in range(n)] for side, n in (('s', student_layers), ('t', teacher_layers)))
    mapping = objectives.uniform_layers(student, teacher)
    chosen = [teacher.index(mapping[path]) for path in student]
    assert list(mapping) == student
    assert chosen == sorted(chosen)
    assert chosen[-1] == teacher_layers - 1
    for i, j in enumerate(chosen):
        assert (j + 1) * student_layers >= (i + 1) * teacher_layers > j * student_layers
    if teacher_layers % student_layers == 0:
        assert np.all(np.diff(chosen) == teacher_layers // student_layers)


def test_hint_with_batch_norm_sees_only_the_examples_that_count():
    rng = np.random.default_rng(0)
    student = features(s=rng.normal(size=(4, 2, 2, 3)).astype(np.float32))
    teacher = features(t=rng.normal(size=(4, 2, 2, 3)).astype(np.float32))
    objective, mask = objectives.hint('s', 't', normalize=True), np.array([True, True, False, True])
    params, state = objective.init(jax.random.key(0), student, teacher, {})
    apply = jax.jit(functools.partial(objective.apply, step=0))
    masked, *_ = apply(params, state, student, teacher, {'mask': mask})
    sliced, *_ = apply(params, state, *jax.tree.map(lambda x: x[mask], (student, teacher)), {})
    np.testing.assert_allclose(masked, sliced, rtol=1e-5)
