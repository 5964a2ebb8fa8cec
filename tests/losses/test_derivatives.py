"""Losses on derivatives against derivatives worked out by hand in float64, and the properties that these promise."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import losses

BATCH, INPUTS, HIDDEN, CLASSES = 3, 4, 5, 3


def network(params, x):
    """Two layers and tanh, on inputs of any shape."""
    inner, outer = params
    x = x.reshape(x.shape[0], -1)
    return jnp.matmul(jnp.tanh(jnp.matmul(x, inner, precision='highest')), outer, precision='highest')


def network_jacobian(params, x):
    """Its Jacobian [batch, classes, inputs] by the chain rule, in numpy."""
    inner, outer = params
    slope = 1 - np.tanh(x.reshape(len(x), -1) @ inner) ** 2
    return np.einsum('hc,bh,ih->bci', outer, slope, inner)


def jacobian_oracle(student, teacher, inputs, directions):
    """mean over v of ||J_sᵀ v - J_tᵀ v||²."""
    difference = network_jacobian(student, inputs) - network_jacobian(teacher, inputs)
    return np.mean(np.sum(np.einsum('bci,kc->kbi', difference, directions) ** 2, axis=-1), axis=0)


def products(function, inputs, directions):
    """Jᵀ v [batch, directions, ...] of a function for each direction."""
    outputs, pullback = jax.vjp(function, inputs)
    return jax.vmap(lambda v: pullback(jnp.broadcast_to(v, outputs.shape).astype(outputs.dtype))[0], out_axes=1)(directions)


def jacobian(student, teacher, inputs, directions):
    """The loss of two functions."""
    return losses.jacobian(*(products(function, inputs, directions) for function in (student, teacher)))


def class_gradients(head, features):
    """The derivative of each logit by each channel, its mean over positions: [batch, classes, channels]."""
    classes = jax.eval_shape(head, features).shape[1]
    return products(head, features, jnp.eye(classes)).mean(axis=(2, 3))


def attention(student_head, teacher_head, student, teacher, labels):
    """The loss of two networks' heads, with the gradients of all classes."""
    gradients = class_gradients(student_head, student), class_gradients(teacher_head, teacher)
    return losses.loss_gradient_attention(student, teacher, *gradients, labels)


def weights(*widths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in itertools.pairwise(widths)]


def upcast(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def central_difference(function, tree, step=1e-6):
    """The gradient of a function with scalar values with respect to every array of a list."""
    gradients = [np.zeros(x.shape) for x in tree]
    for i, x in enumerate(tree):
        for index in np.ndindex(x.shape):
            moved = np.zeros(x.shape)
            moved[index] = step
            sides = [[*tree[:i], x + sign * moved, *tree[i + 1 :]] for sign in (1, -1)]
            gradients[i][index] = (function(sides[0]) - function(sides[1])) / (2 * step)
    return gradients


def assert_gradients(computed, expected):
    for gradient, reference in zip(computed, expected, strict=True):
        np.testing.assert_allclose(gradient, reference, rtol=1e-4, atol=1e-5 * max(1.0, np.abs(reference).max()))


@jax.jit
def jitted_jacobian(student, teacher, inputs, directions):
    """The values, and the gradients of their sum with respect to both sets of parameters and the inputs."""

    def loss(student, teacher, inputs):
        return jacobian(functools.partial(network, student), functools.partial(network, teacher), inputs, directions)

    values, pullback = jax.vjp(loss, student, teacher, inputs)
    return values, *pullback(jnp.ones_like(values))


@pytest.fixture
def problem():
    """Two networks of other widths, inputs and two directions."""
    rng = np.random.default_rng(2)
    inputs, directions = (rng.normal(size=shape).astype(np.float32) for shape in ((BATCH, 2, INPUTS // 2), (2, CLASSES)))
    return weights(INPUTS, HIDDEN, CLASSES), weights(INPUTS, 2 * HIDDEN, CLASSES, seed=1), inputs, directions


def test_jacobian_values_and_second_derivatives_equal_the_oracle(problem):
    values, *gradients = jax.device_get(jitted_jacobian(*problem))
    student, teacher, inputs, directions = upcast(problem)
    np.testing.assert_allclose(values, jacobian_oracle(student, teacher, inputs, directions), rtol=1e-5)
    assert values.dtype == np.float32

    def total(student=student, teacher=teacher, inputs=inputs):
        return jacobian_oracle(student, teacher, inputs, directions).sum()

    assert_gradients(gradients[0], central_difference(lambda x: total(student=x), student))
    assert_gradients(gradients[1], central_difference(lambda x: total(teacher=x), teacher))
    assert_gradients(gradients[2:], central_difference(lambda x: total(inputs=x[0]), [inputs]))


def test_directions_of_the_identity_give_the_whole_jacobians(problem):
    student, teacher, inputs, _ = problem
    values, *_ = jitted_jacobian(student, teacher, inputs, np.eye(CLASSES, dtype=np.float32))
    single = [
        jax.jit(jax.vmap(jax.jacrev(lambda x, params=params: network(params, x[None])[0])))(inputs)
        for params in (student, teacher)
    ]
    expected = np.sum(np.square(single[0] - single[1]), axis=(1, 2, 3)) / CLASSES
    np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_random_directions_estimate_the_squared_frobenius_norm(problem):
    """Those with entries of variance 1; those of the unit sphere a share of it, 1 / classes."""
    student, teacher, inputs, _ = problem
    whole = CLASSES * jitted_jacobian(student, teacher, inputs, np.eye(CLASSES, dtype=np.float32))[0]
    normal = np.random.default_rng(3).normal(size=(4000, CLASSES)).astype(np.float32)
    sphere = normal / np.linalg.norm(normal, axis=1, keepdims=True)
    np.testing.assert_allclose(jitted_jacobian(student, teacher, inputs, normal)[0], whole, rtol=0.1)
    np.testing.assert_allclose(jitted_jacobian(student, teacher, inputs, sphere)[0], whole / CLASSES, rtol=0.1)


def test_jacobian_of_linear_networks_is_that_of_their_kernels_and_nothing_else():
    """Whatever the inputs and the biases."""
    (student,), (teacher,) = weights(INPUTS, CLASSES), weights(INPUTS, CLASSES, seed=1)
    direction = np.array([[1.0, -2.0, 0.5]], np.float32)
    inputs = np.random.default_rng(4).normal(size=(BATCH, INPUTS)).astype(np.float32)
    values = jacobian(lambda x: x @ student + 3.0, lambda x: x @ teacher, inputs, direction)
    expected = np.sum(((student - teacher).astype(np.float64) @ direction[0]) ** 2)
    np.testing.assert_allclose(values, np.full(BATCH, expected), rtol=1e-5)


def test_jacobian_of_equal_networks_is_zero_with_zero_gradients(problem):
    student, _, inputs, directions = problem
    for result in jax.tree.leaves(jitted_jacobian(student, student, inputs, directions)):
        np.testing.assert_allclose(result, np.zeros(result.shape), atol=1e-6)


def test_jacobian_of_an_example_depends_on_that_example_alone(problem):
    student, teacher, inputs, directions = problem
    values, *_, gradient = jax.device_get(jitted_jacobian(student, teacher, inputs, directions))
    order = np.array([2, 0, 1])
    permuted, *_, permuted_gradient = jitted_jacobian(student, teacher, inputs[order], directions)
    np.testing.assert_allclose(permuted, values[order], rtol=1e-5)
    np.testing.assert_allclose(permuted_gradient, gradient[order], rtol=1e-4, atol=1e-5)


def test_training_on_jacobians_alone_finds_the_teachers_kernel(key):
    """Through random directions, new in every step."""
    student, teacher = weights(INPUTS, CLASSES)[0], weights(INPUTS, CLASSES, seed=1)[0]
    inputs = jnp.ones((2, INPUTS))

    def step(student, key):
        directions = jax.random.normal(key, (1, CLASSES))
        gradient = jax.grad(lambda w: jacobian(lambda x: x @ w, lambda x: x @ teacher, inputs, directions).mean())
        return student - 0.1 * gradient(student), None

    found, _ = jax.jit(lambda w: jax.lax.scan(step, w, jax.random.split(key, 300)))(student)
    np.testing.assert_allclose(found, teacher, atol=1e-3)


def test_jacobian_under_vmap_and_in_half_precision(problem):
    student, teacher, inputs, directions = problem
    functions = functools.partial(network, student), functools.partial(network, teacher)
    loss = jax.jit(lambda x: jacobian(*functions, x, directions))
    values = loss(inputs)
    mapped = jax.jit(jax.vmap(loss))(jnp.stack([inputs, 2 * inputs]))
    np.testing.assert_allclose(mapped[0], values, rtol=1e-5)
    half = [products(function, inputs, directions).astype(jnp.bfloat16) for function in functions]
    rounded = losses.jacobian(*half)
    assert rounded.dtype == jnp.float32
    np.testing.assert_allclose(rounded, losses.jacobian(*(x.astype(np.float32) for x in half)), rtol=1e-6)
    np.testing.assert_allclose(rounded, values, rtol=0.1)


@pytest.mark.parametrize('scale', [0.0, 1e4, -1e4, 1e-25])
def test_jacobian_of_extreme_inputs_is_finite(problem, scale):
    student, teacher, inputs, directions = problem
    results = jitted_jacobian(student, teacher, inputs * np.float32(scale), directions)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(results))


def test_what_does_not_fit_jacobian_is_refused():
    ones = jnp.ones((3, 2, 4))
    for arguments, part in [
        ((ones, ones[:, :1]), r'student \(3, 2, 4\) and teacher \(3, 1, 4\) must have the same shape'),
        ((ones, ones[..., :2]), r'student \(3, 2, 4\) and teacher \(3, 2, 2\) must have the same shape'),
        ((ones[0], ones), r'student \(2, 4\) and teacher \(3, 2, 4\) must have the same rank'),
        ((ones[0], ones[0]), r'products must be \[batch, directions, \.\.\.\], got \(2, 4\)'),
        ((ones.astype(jnp.int32), ones), 'student must be floating point, got int32'),
    ]:
        with pytest.raises(ValueError, match=f'^jacobian: [^\n]*{part}[^\n]*$'):
            losses.jacobian(*arguments)


SIZES = {'student': (4, 2, 3), 'teacher': (3, 3, 2)}
POSITIONS = 6  # of the smaller of each axis
LABELS = np.array([0, 2, 1], np.int32)


def grad_cam(features, params, labels, size):
    """ReLU(Σ_c α_c A_c), pooled to the size and normalised, in numpy; α from the chain rule."""
    gradient = network_jacobian(params, features)[np.arange(len(labels)), labels].reshape(features.shape)
    maps = np.maximum(np.einsum('bhwc,bc->bhw', features, gradient.mean(axis=(1, 2))), 0)
    for axis, target in zip((1, 2), size, strict=True):
        length = maps.shape[axis]
        windows = [range(i * length // target, -(-(i + 1) * length // target)) for i in range(target)]
        maps = np.stack([np.take(maps, window, axis).mean(axis=axis) for window in windows], axis=axis)
    return maps / np.linalg.norm(maps, axis=(1, 2), keepdims=True)


def attention_oracle(student, teacher, student_features, teacher_features, labels=LABELS):
    """Σ |Q_t - Q_s|, per example."""
    size = np.minimum(student_features.shape[1:3], teacher_features.shape[1:3])
    maps = grad_cam(teacher_features, teacher, labels, size) - grad_cam(student_features, student, labels, size)
    return np.sum(np.abs(maps), axis=(1, 2))


@jax.jit
def jitted_attention(student, teacher, student_features, teacher_features, labels):
    """The values, and the gradients of their sum with respect to parameters and features of both."""

    def loss(student, teacher, *features):
        functions = functools.partial(network, student), functools.partial(network, teacher)
        return attention(*functions, *features, labels)

    values, pullback = jax.vjp(loss, student, teacher, student_features, teacher_features)
    return values, *pullback(jnp.ones_like(values))


@pytest.fixture
def maps():
    """Heads of both networks, the student's with one class more, and positive features of other sizes and channels."""
    rng = np.random.default_rng(5)
    features = [rng.normal(size=(BATCH, *size)).astype(np.float32) for size in SIZES.values()]
    heads = weights(24, HIDDEN, CLASSES + 1, seed=6), weights(18, HIDDEN, CLASSES, seed=7)
    return *([0.3 * inner, outer] for inner, outer in heads), *features


def test_gradient_attention_values_and_second_derivatives_equal_the_oracle(maps):
    """Other sizes, channels and numbers of classes."""
    values, *gradients = jax.device_get(jitted_attention(*maps, LABELS))
    sides = upcast(maps)
    np.testing.assert_allclose(values, attention_oracle(*sides), rtol=1e-5)
    assert np.all(values > 0.1)
    assert np.all(values <= np.sqrt(2 * POSITIONS))

    def total(i, x):
        return attention_oracle(*sides[:i], x, *sides[i + 1 :]).sum()

    for i in (0, 1):
        assert_gradients(gradients[i], central_difference(lambda x, i=i: total(i, x), sides[i]))
    for i in (2, 3):
        assert_gradients([gradients[i]], central_difference(lambda x, i=i: total(i, x[0]), [sides[i]]))


def average_head(kernel, features):
    """Global average pooling and one linear layer: Grad-CAM is then the class activation map."""
    return jnp.matmul(features.mean(axis=(1, 2)), kernel, precision='highest')


def test_gradient_attention_after_average_pooling_is_the_class_activation_map():
    kernels = weights(3, CLASSES, CLASSES)
    rng = np.random.default_rng(8)
    student, teacher = rng.normal(size=(2, BATCH, 2, 2, 3)).astype(np.float32)
    values = attention(*(functools.partial(average_head, kernel) for kernel in kernels), student, teacher, LABELS)
    expected = []
    for s, t, label in zip(student.astype(np.float64), teacher.astype(np.float64), LABELS, strict=True):
        cams = [np.maximum(x @ kernel[:, label], 0).ravel() for x, kernel in zip((s, t), kernels, strict=True)]
        expected.append(np.abs(np.subtract(*(cam / np.linalg.norm(cam) for cam in cams))).sum())
    np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_gradient_attention_does_not_see_scale_and_follows_the_order_of_positions_and_examples(maps):
    heads = weights(3, CLASSES, CLASSES)
    functions = [functools.partial(average_head, kernel) for kernel in heads]
    student, teacher = np.random.default_rng(9).normal(size=(2, BATCH, 2, 3, 3)).astype(np.float32)
    loss = jax.jit(lambda s, t, labels: attention(*functions, s, t, labels))
    values = loss(student, teacher, LABELS)
    for scale in (np.float32(1e15), np.float32(1e-25)):
        np.testing.assert_allclose(loss(scale * student, teacher, LABELS), values, rtol=1e-5)
    np.testing.assert_allclose(loss(student[:, ::-1, ::-1], teacher[:, ::-1, ::-1], LABELS), values, rtol=1e-5)
    np.testing.assert_allclose(loss(student[::-1], teacher[::-1], LABELS[::-1]), values[::-1], rtol=1e-5)
    assert not np.allclose(loss(student, teacher, np.roll(LABELS, 1)), values, rtol=1e-2)


def test_gradient_attention_of_equal_networks_is_zero(maps):
    student, _, features, _ = maps
    values, *gradients = jitted_attention(student, student, features, features, LABELS)
    np.testing.assert_allclose(values, np.zeros(BATCH), atol=1e-6)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))


def test_gradient_attention_of_maps_of_zeros_is_finite(maps):
    """Features of zeros, features that all speak against the class, and unknown labels."""
    _, _, student, teacher = maps
    results = jitted_attention(maps[0], maps[1], np.zeros_like(student), teacher, LABELS)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(results))
    nothing = jitted_attention(*maps, np.full(BATCH, -1, np.int32))
    for x in jax.tree.leaves(nothing):
        np.testing.assert_array_equal(x, np.zeros(x.shape))
    gradients = [class_gradients(functools.partial(network, p), x) for p, x in zip(maps[:2], (student, teacher), strict=True)]
    gradients = [x.at[0].set(np.nan) for x in gradients]
    student[0] = np.nan
    labels = np.full(BATCH, -1, np.int32)
    loss = jax.jit(lambda labels, *arrays: jax.vjp(lambda *x: losses.loss_gradient_attention(*x, labels), *arrays))
    values, pullback = loss(labels, student, teacher, *gradients)
    for x in (values, *pullback(jnp.ones(BATCH))):
        np.testing.assert_array_equal(x, np.zeros(x.shape))
    labels[1] = 99
    values, _ = loss(labels, student, teacher, *gradients)
    np.testing.assert_array_equal(np.isnan(values), np.arange(BATCH) == 1)
    head = functools.partial(average_head, np.ones((1, 1), np.float32))
    ones, label = jnp.ones((1, 2, 2, 1)), jnp.zeros(1, jnp.int32)
    value, gradient = jax.value_and_grad(lambda x: attention(head, head, x, ones, label)[0])(-ones)
    np.testing.assert_allclose(value, 2.0, rtol=1e-6)
    np.testing.assert_array_equal(gradient, np.zeros((1, 2, 2, 1)))


def test_gradient_attention_computes_in_float32(maps):
    student, teacher, *features = maps
    gradients = [class_gradients(functools.partial(network, p), x) for p, x in zip((student, teacher), features, strict=True)]
    half = [x.astype(jnp.bfloat16) for x in (*features, *gradients)]
    values = losses.loss_gradient_attention(*half, LABELS)
    assert values.dtype == jnp.float32
    expected = losses.loss_gradient_attention(*(x.astype(np.float32) for x in half), LABELS)
    np.testing.assert_allclose(values, expected, rtol=1e-6)


def test_gradients_of_one_class_need_no_labels(maps):
    student, teacher, *features = maps
    sides = zip((student, teacher), features, strict=True)
    gradients = [class_gradients(functools.partial(network, params), x) for params, x in sides]
    of_labels = [x[np.arange(BATCH), LABELS] for x in gradients]
    got = losses.loss_gradient_attention(*features, *of_labels)
    np.testing.assert_allclose(got, losses.loss_gradient_attention(*features, *gradients, LABELS), rtol=1e-6)


def test_what_does_not_fit_gradient_attention_is_refused():
    features, gradients, labels = jnp.ones((3, 2, 2, 3)), jnp.ones((3, 2, 3)), jnp.zeros(3, jnp.int32)
    for arguments, part in [
        ((features[:2], features, gradients, gradients, labels), r'got \(2, 2, 2, 3\) and \(3, 2, 2, 3\)'),
        ((features[0], features[0], gradients, gradients, labels), r'got \(2, 2, 3\) and \(2, 2, 3\)'),
        ((features, features, gradients, gradients, labels[:2]), r'labels \(2,\)'),
        ((features, features, gradients, gradients, jnp.zeros(3)), 'labels must be integer'),
        ((features, features, gradients, gradients, labels + 2), r'labels must be below the number of classes, 2, got 2'),
        ((features, features, gradients, gradients), r'student_gradients \(3, 2, 3\) must be \[batch, channels\]'),
        ((features, features, gradients, gradients[:, 0], labels), r'teacher_gradients \(3, 3\) must be'),
        ((features, features, gradients, gradients[..., :2], labels), r'teacher_gradients \(3, 2, 2\) must be'),
    ]:
        with pytest.raises(ValueError, match=f'^loss_gradient_attention: [^\n]*{part}[^\n]*$'):
            losses.loss_gradient_attention(*arguments)


def test_gradient_attention_in_another_layout_and_under_a_mask_is_that_of_what_is_kept():
    rng = np.random.default_rng(11)
    features = rng.normal(size=(2, BATCH, 2, 4, 3)).astype(np.float32)
    gradients = rng.normal(size=(2, BATCH, 3)).astype(np.float32)
    expected = losses.loss_gradient_attention(*features[:, :, :, :3], *gradients)
    spoilt = features.copy()
    spoilt[:, :, :, 3] = np.nan
    where = np.arange(4)[None, None, :, None] < 3
    np.testing.assert_allclose(losses.loss_gradient_attention(*spoilt, *gradients, where=where), expected, rtol=1e-5)
    moved = np.moveaxis(spoilt, -1, 2)
    where = np.moveaxis(where, -1, 1)
    np.testing.assert_allclose(losses.loss_gradient_attention(*moved, *gradients, axis=1, where=where), expected, rtol=1e-5)
