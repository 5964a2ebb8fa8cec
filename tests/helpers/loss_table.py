"""The table of all losses: what shapes each takes, what its mask means, and how it is called and differentiated."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import losses

LABELS = np.array([0, 4, 2], np.int32)
LOGITS = (3, 5)


class Case(NamedTuple):
    """Shapes that a loss takes and returns, that of a mask over everything, and what a sliced mask means.

    `call(student, teacher, **options)` adapts a loss that takes more arrays than two; `labelled` says that a third are labels.
    `mask_axis` is the mask's sliced axis where that is another than the arrays'; `has_axis` says that the loss takes `axis`.
    """

    student: tuple[int, ...]
    teacher: tuple[int, ...]
    result: tuple[int, ...]
    mask: tuple[int, ...]
    sliced_axis: int | tuple[int, ...]
    labelled: bool = False
    call: Callable[..., jax.Array] | None = None
    mask_axis: int | None = None
    has_axis: bool = True


def fsp(student, teacher, **options):
    """With constant activations after the part of the network."""
    return losses.fsp(student, jnp.ones(student.shape), teacher, jnp.ones(teacher.shape), **options)


def vid(mean, teacher, **options):
    """With one variance for all channels."""
    return losses.vid(mean, 2.0, teacher, **options)


def overhaul(student, teacher, **options):
    """With one margin for all channels."""
    return losses.overhaul(student, teacher, -0.5, **options)


def fbkd(student, teacher, **options):
    """With weights of one, since the published ones are of the size of rounding errors."""
    return losses.fbkd(student, teacher, guided=1.0, attention=1.0, **options)


def crd(student, teacher, axis=-1, **options):
    """Against banks in which all examples share their rows, so that a batch may be sliced."""
    examples = student.size // 3
    rows = np.random.default_rng(2).normal(size=(2, 1, 5, 3)).astype(np.float32)
    memories = np.broadcast_to(rows / np.linalg.norm(rows, axis=-1, keepdims=True), (2, examples, 5, 3))
    return losses.crd(student, teacher, *memories, examples=20, temperature=0.5, axis=axis, **options)


def instance_graph(student, teacher, **options):
    """The logits are a layer too, and their magnitude is the second. They are used often: their gradients add up in float32."""
    student, teacher = (x.astype(np.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in (student, teacher))
    layers = (student, abs(student)), (teacher, abs(teacher))
    return losses.instance_graph(student, teacher, *layers, edges=1.0, transformations=1.0, **options)


def subset_soft_targets(student, teacher, axis=-1, **options):
    """With a teacher that knows all classes."""
    classes = np.arange(np.shape(student)[axis % np.ndim(student)])
    return losses.subset_soft_targets(student, teacher, classes, axis=axis, **options)


def linear_soft_targets(student, teacher, **options):
    """In two chunks of two tokens, over a vocabulary that does not divide."""
    kernels = np.random.default_rng(3).normal(size=(2, 3, 7)).astype(np.float32)
    return losses.linear_soft_targets(student, kernels[0], teacher, kernels[1], chunk=2, **options)


def alpha_beta_divergence(student, teacher, **options):
    """With exponents apart from all limits."""
    return losses.alpha_beta_divergence(student, teacher, alpha=0.4, beta=0.3, **options)


def dist_plus(student, teacher, **options):
    """With the logits as features too. They are used twice: their gradients add up in float32."""
    student, teacher = (x.astype(np.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in (student, teacher))
    return losses.dist_plus(student, teacher, student, teacher, **options)


def taid(student, teacher, **options):
    """Halfway."""
    return losses.taid(student, teacher, interpolation=0.5, **options)


def bounded_regression(student, teacher, **options):
    """With targets at 0 and a student that is never good enough."""
    return losses.bounded_regression(student, teacher, jnp.zeros(student.shape), margin=100.0, **options)


CASES = {
    'soft_targets': Case(LOGITS, LOGITS, (3,), (3, 5), 1),
    'logit_mse': Case(LOGITS, LOGITS, (3,), (3, 5), 1),
    'decoupled_kd': Case(LOGITS, LOGITS, (3,), (3, 5), 1, labelled=True),
    'normalized_kd': Case(LOGITS, LOGITS, (3,), (3, 5), 1, labelled=True),
    'weighted_soft_labels': Case(LOGITS, LOGITS, (3,), (3, 5), 1, labelled=True),
    'hard_targets': Case(LOGITS, LOGITS, (3,), (3, 5), 1),
    'dist': Case(LOGITS, LOGITS, (), (3, 5), 1),
    'multi_level_logits': Case(LOGITS, LOGITS, (), (3, 5), 1),
    'label_free_tuning': Case(LOGITS, LOGITS, (3,), (3, 5), 1, labelled=True),
    'dist_plus': Case((4, 3), (4, 3), (), (4, 1), 0, call=dist_plus),
    'subset_soft_targets': Case(LOGITS, LOGITS, (3,), (3, 5), 1, call=subset_soft_targets),
    'linear_soft_targets': Case((4, 3), (4, 3), (4,), (4,), 0, call=linear_soft_targets),
    'reverse_kl': Case(LOGITS, LOGITS, (3,), (3, 5), 1),
    'jensen_shannon': Case(LOGITS, LOGITS, (3,), (3, 5), 1),
    'skewed_kl': Case(LOGITS, LOGITS, (3,), (3, 5), 1),
    'skewed_reverse_kl': Case(LOGITS, LOGITS, (3,), (3, 5), 1),
    'total_variation': Case(LOGITS, LOGITS, (3,), (3, 5), 1),
    'alpha_beta_divergence': Case(LOGITS, LOGITS, (3,), (3, 5), 1, call=alpha_beta_divergence),
    'adaptive_kl': Case(LOGITS, LOGITS, (3,), (3, 5), 1),
    'taid': Case(LOGITS, LOGITS, (3,), (3, 5), 1, call=taid),
    'binary_soft_targets': Case(LOGITS, LOGITS, (3,), (3, 5), 1),
    'bounded_regression': Case((3, 6), (3, 6), (3,), (3, 6), 1, call=bounded_regression),
    'hint': Case((3, 2, 4, 3), (3, 2, 4, 3), (3,), (3, 2, 4, 3), 2),
    'attention_transfer': Case((3, 2, 4, 3), (3, 5, 4, 2), (3,), (3, 2, 4, 1), 2),
    'masked_generation': Case((3, 2, 4, 3), (3, 2, 4, 3), (3,), (3, 2, 4, 3), 2),
    'hierarchical_context': Case((3, 6, 2, 4), (3, 6, 2, 4), (3,), (3, 6, 2, 4), 3),
    'channel_wise': Case((3, 2, 4, 3), (3, 2, 4, 3), (3,), (3, 2, 4, 1), 2),
    'fsp': Case((3, 2, 4, 3), (3, 2, 4, 3), (3,), (3, 2, 4, 1), 2, call=fsp),
    'nst': Case((3, 2, 4, 3), (3, 5, 4, 2), (3,), (3, 2, 4, 1), 2),
    'singular_vectors': Case((3, 2, 4, 3), (3, 5, 4, 2), (3,), (3, 2, 4, 1), 2),
    'vid': Case((3, 2, 4, 3), (3, 2, 4, 3), (3,), (3, 2, 4, 3), 2, call=vid),
    'factor_transfer': Case((3, 2, 4, 3), (3, 5, 4, 3), (3,), (3, 2, 4, 1), 2),
    'srd': Case((3, 2, 4, 3), (3, 2, 4, 3), (3,), (3, 2, 4, 3), 2),
    'fbkd': Case((3, 2, 4, 3), (3, 2, 4, 3), (3,), (3, 2, 4, 1), 2, call=fbkd),
    'inter_channel': Case((3, 2, 4, 3), (3, 5, 4, 3), (3,), (3, 2, 4, 1), 2),
    'pearson_features': Case((3, 2, 4, 3), (3, 2, 4, 3), (3,), (3, 2, 4, 3), 2),
    'activation_boundary': Case((3, 2, 4, 3), (3, 2, 4, 3), (3,), (3, 2, 4, 3), 2),
    'overhaul': Case((3, 2, 4, 3), (3, 2, 4, 3), (3,), (3, 2, 4, 3), 2, call=overhaul),
    'similarity_preserving': Case((4, 3), (4, 3), (), (4,), 0),
    'pkt': Case((4, 3), (4, 5), (), (4,), 0),
    'rkd_distance': Case((4, 3), (4, 5), (), (4,), 0),
    'rkd_angle': Case((4, 3), (4, 5), (), (4,), 0),
    'correlation_congruence': Case((4, 3), (4, 5), (), (4,), 0),
    'instance_graph': Case((4, 3), (4, 3), (), (4,), 0, call=instance_graph),
    'info_nce': Case((4, 3), (4, 3), (), (4,), 0),
    'crd': Case((4, 3), (4, 3), (4,), (4,), 0, call=crd),
    'hidden_cosine': Case((3, 5, 4), (3, 5, 4), (3,), (3, 5), 1),
    'attention_maps': Case((3, 2, 5, 5), (3, 2, 5, 5), (3,), (3, 5), (2, 3), mask_axis=1, has_axis=False),
    'value_relations': Case((3, 2, 5, 4), (3, 2, 5, 3), (3,), (3, 5), 2, mask_axis=1, has_axis=False),
    'jacobian': Case((3, 2, 4, 3), (3, 2, 4, 3), (3,), (3, 2, 4, 3), 2, has_axis=False),
    'reconstruction': Case((3, 2, 4, 3), (3, 2, 4, 3), (3,), (3, 2, 4, 3), 2),
    'attention_distillation': Case((3, 2, 4, 3), (3, 2, 4, 3), (3,), (3, 2, 4, 3), 2),
}
# Losses to which the teacher's sign, or a comparison with it, is all that counts, so that its gradient is zero.
ON_SIGNS = {'activation_boundary', 'bounded_regression', 'hard_targets'}
# Losses with a value for every example that depends on all of them, by way of a normalizer or of means and deviations.
OF_BATCH_STATISTICS = {'crd', 'pearson_features'}
# Public functions of kdjax.losses that are not losses of a student and a teacher; they have tests of their own.
OTHERS: set[str] = {
    'activation_size',
    'approximate_likelihood_matching',
    'binary_labels',
    'class_index',
    'crd_negatives',
    'crd_normalizer',
    'crd_update_memory',
    'diversity',
    'domain_confusion',
    'domain_discrimination',
    'gradient_reversal',
    'loss_gradient_attention',
    'overhaul_margin',
    'policy_gradient',
    'regression',
    'reversal_schedule',
    'sampled_reverse_kl',
    'span_log_probabilities',
    'span_universal_logit',
    'standardize_logits',
    'top_k_from_log_probabilities',
    'top_k_jensen_shannon',
    'top_k_logits',
    'top_k_reverse_kl',
    'top_k_soft_targets',
    'universal_logit',
}
ON_LOGITS = [name for name, case in CASES.items() if case.student == LOGITS]
every_loss = pytest.mark.parametrize('name', list(CASES))
every_loss_with_an_axis = pytest.mark.parametrize('name', [name for name, case in CASES.items() if case.has_axis])


def call(name, student, teacher, labels=LABELS, **options):
    """Calls a loss, with labels if it takes any."""
    case = CASES[name]
    if not case.has_axis:
        options.pop('axis', None)
    return (case.call or getattr(losses, name))(student, teacher, *([labels] if case.labelled else []), **options)


LOSSES = {name: functools.partial(call, name) for name in CASES}


def arguments(name, *, seed=0):
    """Student, teacher, and labels if the loss takes any."""
    return *inputs(name, seed=seed), *([LABELS] if CASES[name].labelled else [])


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
