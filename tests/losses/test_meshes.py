"""Every loss on eight devices: with arrays on a mesh with Explicit axes, and inside `shard_map`."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kdjax import losses

BATCH, DEVICES = 16, 8
LABELS = np.arange(BATCH, dtype=np.int32) % 5
KEEP = np.arange(BATCH) % 5 != 1
DATA = PartitionSpec(('data', 'model'))


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def table(*shape, names=(), call=None, **named):
    """Losses of a student and a teacher of one shape: `call` of the loss of that name, or a function for each name."""
    return {name: (shape, lambda s, t, y, w, name=name: call(getattr(losses, name), s, t, y, w)) for name in names} | {
        name: (shape, function) for name, function in named.items()
    }


BANK = random(20, 8, seed=2)
POSITIONS = np.random.default_rng(4).permutation(20)
CLASSES = losses.class_index(np.arange(20) % 3)
KERNEL = random(8, 6, seed=3)


def spans_of(labels):
    """Spans 0, 1, 2 of five tokens, at places that depend on the example."""
    return (jnp.arange(5)[None] + labels[:, None] % 2) // 2


def bank(x):
    """Five rows for each example of the batch."""
    return x[:, None] * BANK[None, :5]


LOSSES = (
    table(
        *(BATCH, 5),
        names=(
            *(
                'soft_targets',
                'logit_mse',
                'hard_targets',
                'dist',
                'multi_level_logits',
                'reverse_kl',
                'jensen_shannon',
                'skewed_kl',
            ),
            *('skewed_reverse_kl', 'total_variation', 'adaptive_kl', 'multi_level_logits'),
        ),
        call=lambda loss, s, t, y, w: loss(s, t, where=w[:, None]),
    )
    | table(
        *(BATCH, 5),
        names=('binary_soft_targets', 'regression'),
        call=lambda loss, s, t, y, w: loss(s, t, where=w[:, None]),
    )
    | table(
        *(BATCH, 5),
        names=('decoupled_kd', 'normalized_kd', 'weighted_soft_labels', 'label_free_tuning'),
        call=lambda loss, s, t, y, w: loss(s, t, y),
    )
    | table(
        *(BATCH, 5),
        subset_soft_targets=lambda s, t, y, w: losses.subset_soft_targets(s, t[:, :2], [0, 3]),
        binary_labels=lambda s, t, y, w: losses.binary_labels(s, jnp.clip(t, 0.0, 1.0), where=w[:, None]),
        bounded_regression=lambda s, t, y, w: losses.bounded_regression(s, 2 * s, t),
        top_k_logits=lambda s, t, y, w: losses.top_k_logits(t, 3),
        top_k_soft_targets=lambda s, t, y, w: losses.top_k_soft_targets(s, t[:, :2], jnp.stack([y, 4 - y], 1) % 5, t[:, 2]),
        top_k_reverse_kl=lambda s, t, y, w: losses.top_k_reverse_kl(s, t[:, :2], jnp.stack([y, 4 - y], 1) % 5, t[:, 2]),
        top_k_jensen_shannon=lambda s, t, y, w: losses.top_k_jensen_shannon(s, t[:, :2], jnp.stack([y, 4 - y], 1) % 5, t[:, 2]),
        top_k_from_log_probabilities=lambda s, t, y, w: losses.top_k_from_log_probabilities(jax.nn.log_softmax(t)[:, :2]),
        alpha_beta_divergence=lambda s, t, y, w: losses.alpha_beta_divergence(s, t, alpha=0.4, beta=0.3, where=w[:, None]),
        dist_plus=lambda s, t, y, w: losses.dist_plus(s, t, s * s, t * t, where=w[:, None]),
        taid=lambda s, t, y, w: losses.taid(s, t, interpolation=0.5, where=w[:, None]),
        universal_logit=lambda s, t, y, w: losses.universal_logit(s, t[:, :3]),
        sampled_reverse_kl=lambda s, t, y, w: losses.sampled_reverse_kl(-s * s, -t * t, where=w[:, None]),
        approximate_likelihood_matching=lambda s, t, y, w: losses.approximate_likelihood_matching(
            -s * s, -t * t, where=w[:, None]
        ),
        span_log_probabilities=lambda s, t, y, w: losses.span_log_probabilities(s, spans_of(y), 3),
        span_universal_logit=lambda s, t, y, w: losses.span_universal_logit(
            s[:, :, None] * jnp.arange(1.0, 4.0)[None, None],
            t[:, :, None] * jnp.arange(4.0)[None, None],
            *(spans_of(y) % 3, spans_of(y) % 4, spans_of(y), spans_of(y)[:, ::-1]),
        ),
        policy_gradient=lambda s, t, y, w: losses.policy_gradient(-s * s, -t * t, where=w[:, None]),
        standardize_logits=lambda s, t, y, w: losses.standardize_logits(s),
        diversity=lambda s, t, y, w: losses.diversity(s, where=w),
        domain_confusion=lambda s, t, y, w: losses.domain_confusion(s),
        domain_discrimination=lambda s, t, y, w: losses.domain_discrimination(s, y),
        gradient_reversal=lambda s, t, y, w: losses.gradient_reversal(s, 0.5),
        jacobian=lambda s, t, y, w: losses.jacobian(s[:, None], jnp.sin(t)[:, None]),
    )
    | table(
        *(BATCH, 4, 6, 4),
        names=('hint', 'masked_generation', 'channel_wise', 'attention_transfer', 'factor_transfer', 'nst', 'singular_vectors'),
        call=lambda loss, s, t, y, w: loss(s, t, where=w[:, None, None, None]),
    )
    | table(
        *(BATCH, 4, 6, 4),
        names=('activation_boundary', 'reconstruction', 'attention_distillation'),
        call=lambda loss, s, t, y, w: loss(s, t, where=w[:, None, None, None]),
    )
    | table(
        *(BATCH, 4, 6, 4),
        inter_channel=lambda s, t, y, w: losses.inter_channel(s, t, where=w[:, None, None, None]),
        fbkd=lambda s, t, y, w: losses.fbkd(s, t, guided=1.0, attention=1.0, where=w[:, None, None, None]),
        pearson_features=lambda s, t, y, w: losses.pearson_features(s, t, where=w[:, None, None, None]),
        hierarchical_context=lambda s, t, y, w: losses.hierarchical_context(s, t),
        fsp=lambda s, t, y, w: losses.fsp(s, s[..., :2], t, t[..., :2]),
        vid=lambda s, t, y, w: losses.vid(s, 2.0, t),
        overhaul=lambda s, t, y, w: losses.overhaul(s, t, -0.5),
        overhaul_margin=lambda s, t, y, w: losses.overhaul_margin(s, t),
        activation_size=lambda s, t, y, w: losses.activation_size(s),
        attention_maps=lambda s, t, y, w: losses.attention_maps(s[..., :4, :], t[..., :4, :]),
        value_relations=lambda s, t, y, w: losses.value_relations(s, t),
        loss_gradient_attention=lambda s, t, y, w: losses.loss_gradient_attention(
            s, t, jnp.tile(s[:, :1, 0], (1, 3, 1)), t[:, 0, :3], y % 3
        ),
    )
    | table(
        *(BATCH, 8),
        names=('similarity_preserving', 'pkt', 'rkd_distance', 'rkd_angle', 'correlation_congruence', 'info_nce'),
        call=lambda loss, s, t, y, w: loss(s, t, where=w),
    )
    | table(
        *(BATCH, 8),
        instance_graph=lambda s, t, y, w: losses.instance_graph(s, t, (s, jnp.abs(s)), (t, jnp.abs(t)), where=w),
        crd=lambda s, t, y, w: losses.crd(s, t, bank(t), bank(s), examples=20),
        crd_normalizer=lambda s, t, y, w: losses.crd_normalizer(s, bank(t), examples=20),
        crd_update_memory=lambda s, t, y, w: losses.crd_update_memory(BANK, POSITIONS[: len(s)], s),
        crd_negatives=lambda s, t, y, w: losses.crd_negatives(jax.random.key(0), y, CLASSES, 3),
        linear_soft_targets=lambda s, t, y, w: losses.linear_soft_targets(s, KERNEL, t, KERNEL, chunk=8, where=w),
    )
    | table(*(BATCH, 8), srd=lambda s, t, y, w: losses.srd(s, t, where=w[:, None]))
    | table(*(BATCH, 3, 8), hidden_cosine=lambda s, t, y, w: losses.hidden_cosine(s, t, where=w[:, None]))
)
# Losses that relate the examples, and results that are not one for each example of the batch.
OF_THE_BATCH = {
    'correlation_congruence',
    'crd',
    'crd_negatives',
    'crd_normalizer',
    'crd_update_memory',
    'dist',
    'dist_plus',
    'multi_level_logits',
    'diversity',
    'info_nce',
    'instance_graph',
    'pearson_features',
    'pkt',
    'rkd_angle',
    'rkd_distance',
    'similarity_preserving',
}
# Of numbers on the host.
WITHOUT_ARRAYS = {'class_index', 'reversal_schedule'}
every_loss = pytest.mark.parametrize('name', list(LOSSES))


def arrays(name):
    """Student and teacher, labels, and which examples to keep."""
    shape, _ = LOSSES[name]
    return random(*shape), random(*shape, seed=1), LABELS, KEEP


def value_and_gradients(name):
    """What a loss returns, and the gradients of its sum under some weights with respect to student and teacher."""

    def function(student, teacher, labels, keep):
        def floating(student, teacher):
            values = LOSSES[name][1](student, teacher, labels, keep)
            return [x for x in jax.tree.leaves(values) if jnp.issubdtype(x.dtype, jnp.floating)], values

        floats, pullback, values = jax.vjp(floating, student, teacher, has_aux=True)
        return values, pullback([jnp.cos(x) for x in floats])

    return function


def assert_near(results, expected):
    for x, y in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * np.max(np.abs(y), initial=0.1))


@functools.cache
def whole(name):
    """On one device."""
    return jax.device_get(jax.jit(value_and_gradients(name))(*arrays(name)))


@pytest.fixture(scope='module')
def mesh():
    return jax.make_mesh((4, 2), ('data', 'model'), axis_types=(AxisType.Explicit,) * 2)


def split(mesh, tree, spec=DATA):
    return jax.device_put(tree, NamedSharding(mesh, spec))


def test_every_loss_is_in_the_table():
    functions = {name for name, value in vars(losses).items() if inspect.isfunction(value)}
    assert functions == set(LOSSES) | WITHOUT_ARRAYS


@every_loss
def test_on_a_mesh_with_explicit_axes_values_and_gradients_are_those_without(mesh, name):
    """The values keep the sharding of the batch, the gradients that of the arrays."""
    values, gradients = jax.jit(value_and_gradients(name))(*split(mesh, arrays(name)))
    assert_near((values, gradients), whole(name))
    for x in (*jax.tree.leaves(values), *gradients):
        if x.shape[:1] == (BATCH,):
            assert jax.typeof(x).sharding.spec[0] == DATA[0]


@every_loss
def test_inside_shard_map_each_device_has_the_loss_of_its_share(mesh, name):
    def function(*arrays):
        return jax.tree.map(jnp.atleast_1d, value_and_gradients(name)(*arrays))

    if name in OF_THE_BATCH:
        shares = [x.reshape(DEVICES, -1, *x.shape[1:]) for x in arrays(name)]
        expected = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.jit(jax.vmap(function))(*shares))
    else:
        expected = whole(name)
    inside = jax.shard_map(function, mesh=mesh, in_specs=DATA, out_specs=DATA)
    assert_near(jax.jit(inside)(*split(mesh, arrays(name))), expected)


@pytest.mark.parametrize(
    'name', ['decoupled_kd', 'similarity_preserving', 'rkd_distance', 'linear_soft_targets', 'top_k_logits', 'crd_negatives']
)
def test_without_jit_too(mesh, name):
    """Gradients without jit need `jax.set_mesh` for JAX's own functions."""
    values, gradients = whole(name)
    assert_near(LOSSES[name][1](*split(mesh, arrays(name))), values)
    if name == 'similarity_preserving':
        with jax.set_mesh(mesh):
            assert_near(value_and_gradients(name)(*split(mesh, arrays(name))), (values, gradients))


def test_axes_that_are_not_of_examples_may_be_split_too(mesh):
    """One array on the mesh and one that is not, and `vmap` over both."""
    students, teacher = random(2, BATCH, 8), random(BATCH, 8, seed=1)

    @jax.jit
    def gradients(students, teacher):
        return jax.vmap(lambda student: jax.grad(losses.pkt)(student, teacher))(students)

    placed = split(mesh, students, PartitionSpec(None, 'data', 'model'))
    assert_near(gradients(placed, teacher), gradients(students, teacher))
