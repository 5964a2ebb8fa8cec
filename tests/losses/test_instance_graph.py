"""The instance relationship graph against a float64 oracle, and the properties that it promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import gradient_checks
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kdjax import losses

BATCH = 4
STUDENT_WIDTHS, TEACHER_WIDTHS = (3, 3, 2), (5, 5, 4)
WHERE = np.array([True, False, True, True])


def oracle(student, teacher, student_layers, teacher_layers, edges=50.0, transformations=50.0):
    """Vertices, edges divided by their largest, and the change of both over successive layers."""

    def squares(x, y):
        d = ((x - y) ** 2).sum(-1)
        return d / d.max() if d.max() > 0 else d

    graphs = [[squares(x[:, None], x[None]) for x in layers] for layers in (student_layers, teacher_layers)]
    loss = np.mean((student - teacher) ** 2) + edges * np.mean([(s - t) ** 2 for s, t in zip(*graphs, strict=True)])
    steps = len(student_layers) - 1
    for i in range(steps):
        change = np.mean((graphs[0][i + 1] - graphs[0][i] - graphs[1][i + 1] + graphs[1][i]) ** 2)
        successive = [layers[i : i + 2] for layers in (student_layers, teacher_layers)]
        if all(x.shape == y.shape for x, y in successive):
            moves = [squares(x, y) for x, y in successive]
            change += np.mean((moves[0] - moves[1]) ** 2)
        loss += transformations * change / steps
    return loss


def draw(batch=BATCH, seed=0):
    """Logits and three layers of each network. In both, the first two layers are of one width and the third is not."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(2, batch, 6)).astype(np.float32)
    return *logits, *(
        [rng.normal(size=(batch, width)).astype(np.float32) for width in widths] for widths in (STUDENT_WIDTHS, TEACHER_WIDTHS)
    )


def value_and_gradients(arrays, where=None, **options):
    """The value, and gradients in the shape of the arrays."""
    value, *gradients = gradient_checks.value_and_gradients('instance_graph', *arrays, where=where, **options)
    return value, gradients


def map_arrays(function, arrays):
    return jax.tree.map(function, tuple(arrays))


@pytest.mark.parametrize('where', [None, WHERE])
@pytest.mark.parametrize('weights', [{}, {'edges': 2.0, 'transformations': 0.0}, {'edges': 0.0, 'transformations': 3.0}])
def test_value_and_all_gradients_equal_the_oracle(where, weights):
    arrays = draw()
    value, gradients = value_and_gradients(arrays, where, **weights)
    flat, structure = jax.tree.flatten(map_arrays(lambda x: x.astype(np.float64), arrays))

    def loss(changed):
        kept = changed if where is None else [x[where] for x in changed]
        return oracle(*jax.tree.unflatten(structure, kept), **weights)

    np.testing.assert_allclose(value, loss(flat), rtol=1e-5)
    for i, gradient in enumerate(jax.tree.leaves(gradients)):
        for index in np.ndindex(gradient.shape):
            steps = [[x.copy() for x in flat] for _ in range(2)]
            steps[0][i][index] += 1e-6
            steps[1][i][index] -= 1e-6
            expected = (loss(steps[0]) - loss(steps[1])) / 2e-6
            np.testing.assert_allclose(gradient[index], expected, rtol=1e-5, atol=3e-5)


def test_one_layer_has_edges_and_no_transformation():
    student, teacher, student_layers, teacher_layers = draw()
    arrays = student, teacher, student_layers[:1], teacher_layers[:1]
    np.testing.assert_allclose(value_and_gradients(arrays)[0], oracle(*arrays), rtol=1e-5)


def test_layers_of_any_rank_are_flattened():
    student, teacher, student_layers, teacher_layers = draw(batch=6)
    images = [x.reshape(6, 1, -1, 1) for x in student_layers]
    value, _ = value_and_gradients((student, teacher, images, teacher_layers))
    np.testing.assert_allclose(value, oracle(student, teacher, student_layers, teacher_layers), rtol=1e-5)


def test_scales_rotations_and_shifts_of_both_networks_layers_do_not_matter():
    """One for all layers of a network, since examples move between them."""
    arrays = draw()
    value, _ = value_and_gradients(arrays)
    order = np.array([2, 0, 3, 1])
    student, teacher, student_layers, teacher_layers = map_arrays(lambda x: x[order], arrays)
    moved = [1e15 * x for x in student_layers], [1e-15 * x[:, ::-1] for x in teacher_layers]
    np.testing.assert_allclose(value_and_gradients((student, teacher, *moved))[0], value, rtol=1e-5)
    shifted = [x + 2 for x in student_layers], teacher_layers
    np.testing.assert_allclose(value_and_gradients((student, teacher, *shifted))[0], value, rtol=1e-5)


def test_equal_graphs_give_zero_and_zero_gradients():
    student, _, layers, _ = draw()
    value, gradients = value_and_gradients((student, student, [np.float32(3) * x for x in layers], layers))
    np.testing.assert_allclose(value, 0, atol=1e-11)
    for gradient in jax.tree.leaves(gradients):
        np.testing.assert_allclose(gradient, np.zeros(gradient.shape), atol=1e-5)


@pytest.mark.parametrize('batch', [1, BATCH])
@pytest.mark.parametrize('fill', [0.0, 1.0, 1e15, -1e-25])
def test_equal_zero_and_extreme_examples_are_finite(batch, fill):
    arrays = draw(batch)
    layers = map_arrays(lambda x: np.full_like(x, fill), arrays[2:])
    logits = [np.full_like(arrays[0], x) for x in (1e4, -np.inf)]
    mixed = [x.copy() for x in arrays[2]]
    mixed[1][0] = fill
    for case in ((*logits, *layers), (*arrays[:2], mixed, arrays[3]), (*arrays[:2], mixed, layers[1])):
        for result in jax.tree.leaves(value_and_gradients(case)):
            assert np.all(np.isfinite(result))


def test_eight_devices_compute_what_one_does():
    arrays = draw(batch=16)
    where = np.arange(16) % 5 > 0
    expected = value_and_gradients(arrays, where)
    sharding = NamedSharding(jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,)), PartitionSpec('data'))
    results = value_and_gradients(*jax.device_put((arrays, where), sharding))
    for x, y in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * np.abs(y).max())


@pytest.mark.parametrize(
    'change, message',
    [
        (
            lambda s, t, a, b: (s, t, a, b[:2]),
            'student_layers and teacher_layers must be as many and at least one, got 3 and 2',
        ),
        (lambda s, t, a, b: (s, t, [], []), 'student_layers and teacher_layers must be as many and at least one, got 0 and 0'),
        (lambda s, t, a, b: (s, t[:, :5], a, b), r'student \(4, 6\) and teacher \(4, 5\) must have the same shape'),
        (lambda s, t, a, b: (s[0], t[0], a, b), r'student \(6,\) and teacher \(6,\) must be \[batch, classes\]'),
        (lambda s, t, a, b: (s[:3], t[:3], a, b), r'layers \[\(4, 3\), .*\] must have the 3 examples of student \(3, 6\)'),
        (
            lambda s, t, a, b: (s, t, a, [x[:3] for x in b]),
            r'student \(4, 3\) and teacher \(3, 5\) must have the same number',
        ),
    ],
)
def test_mistakes_are_told_in_one_line(change, message):
    with pytest.raises(ValueError, match=f'^instance_graph: {message}[^\n]*$'):
        losses.instance_graph(*change(*draw()))


@jax.jit
def masked_graph(student, teacher, layers, where):
    return losses.instance_graph(student, teacher, layers, layers, where=where)


def test_logits_of_positions_are_a_mean_over_those_that_are_kept():
    """Equal layers leave the vertices alone: per example the mean over kept positions, then over examples with any."""
    student, teacher = np.random.default_rng(0).normal(size=(2, 4, 3, 5)).astype(np.float32)
    where = np.array([[True, True, False], [False, False, False], [True, True, True], [False, True, False]])
    per_example = [np.mean(np.square(s - t)[kept]) for s, t, kept in zip(student, teacher, where, strict=True) if kept.any()]
    tokens, pooled = student[..., :2], student[:, 0]
    for layers in ([tokens], [pooled], [pooled, tokens]):
        np.testing.assert_allclose(masked_graph(student, teacher, layers, where), np.mean(per_example), rtol=1e-5)
    # Logits of examples are kept where any position is.
    per_example = np.mean(np.square(student - teacher)[:, 0], axis=1)[where.any(axis=1)]
    np.testing.assert_allclose(masked_graph(student[:, 0], teacher[:, 0], [tokens], where), np.mean(per_example), rtol=1e-5)


def test_a_weight_may_be_traced():
    arrays = draw()
    value = jax.jit(lambda weight: losses.instance_graph(*arrays, edges=weight))(jnp.float32(2))
    np.testing.assert_allclose(value, oracle(*arrays, edges=2.0), rtol=1e-5)
