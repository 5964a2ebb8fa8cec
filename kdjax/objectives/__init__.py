"""Objectives: losses lifted to networks' outputs, with connectors, weights and schedules, and the arithmetic that joins them.

    objective = combine(
        hard=0.1 * hard_labels(),
        soft=0.9 * soft_targets(temperature=4.0),
        hint=optax.cosine_decay_schedule(100.0, 5_000) * hint(student='stage3', teacher='stage3'),
    )

A term has the name of the loss in `kdjax.losses` that it lifts; `from_function` and `with_parameters` make terms of one's own.
"""

from kdjax.batches import Batch
from kdjax.objectives._arguments import batch_mean
from kdjax.objectives._balance import balance_by_magnitude
from kdjax.objectives._by_position import by_position
from kdjax.objectives._cat_kd import cat_kd
from kdjax.objectives._combinators import constraint, in_stages, over_positions
from kdjax.objectives._contrastive import crd, info_nce
from kdjax.objectives._curriculum_temperature import curriculum_temperature
from kdjax.objectives._derivatives import jacobian, loss_gradient_attention
from kdjax.objectives._dist_plus import dist_plus
from kdjax.objectives._domain import domain_discrimination
from kdjax.objectives._factor_transfer import factor_transfer
from kdjax.objectives._fbkd import fbkd
from kdjax.objectives._features import attention_transfer, channel_wise, hint, nst, singular_vectors
from kdjax.objectives._fsp import fsp
from kdjax.objectives._inter_channel import inter_channel
from kdjax.objectives._knowledge_review import hierarchical_context
from kdjax.objectives._layers import over_layers, uniform_layers
from kdjax.objectives._logits import (
    adaptive_kl,
    alpha_beta_divergence,
    decoupled_kd,
    dist,
    hard_labels,
    hard_targets,
    jensen_shannon,
    label_free_tuning,
    logit_mse,
    multi_level_logits,
    normalized_kd,
    reverse_kl,
    skewed_kl,
    skewed_reverse_kl,
    soft_targets,
    standardize_logits,
    subset_soft_targets,
    taid,
    total_variation,
    universal_logit,
    weighted_soft_labels,
)
from kdjax.objectives._masked_generation import masked_generation
from kdjax.objectives._members import mutual_learning, of_member
from kdjax.objectives._mixing import mixed_labels
from kdjax.objectives._objective import Objective, Term, combine, from_function, with_check, with_parameters
from kdjax.objectives._overhaul import activation_boundary, overhaul
from kdjax.objectives._pearson_features import pearson_features
from kdjax.objectives._recorded import from_recorded_logits
from kdjax.objectives._relations import (
    correlation_congruence,
    instance_graph,
    pkt,
    rkd_angle,
    rkd_distance,
    similarity_preserving,
)
from kdjax.objectives._sampled import policy_gradient, sampled_reverse_kl
from kdjax.objectives._semckd import semckd
from kdjax.objectives._simkd import simkd, simkd_logits
from kdjax.objectives._spans import approximate_likelihood_matching, span_universal_logit
from kdjax.objectives._srd import srd
from kdjax.objectives._taid import adaptive_taid
from kdjax.objectives._targets import binary_labels, binary_soft_targets, bounded_regression, regression
from kdjax.objectives._tokens import attention_maps, hidden_cosine, value_relations
from kdjax.objectives._top_k import top_k_jensen_shannon, top_k_reverse_kl, top_k_soft_targets
from kdjax.objectives._unsupervised import activation_size, attention_distillation, diversity, reconstruction
from kdjax.objectives._vid import vid

__all__ = [
    'Batch',
    'Objective',
    'Term',
    'activation_boundary',
    'activation_size',
    'adaptive_kl',
    'adaptive_taid',
    'alpha_beta_divergence',
    'approximate_likelihood_matching',
    'attention_distillation',
    'attention_maps',
    'attention_transfer',
    'balance_by_magnitude',
    'batch_mean',
    'binary_labels',
    'binary_soft_targets',
    'bounded_regression',
    'by_position',
    'cat_kd',
    'channel_wise',
    'combine',
    'constraint',
    'correlation_congruence',
    'crd',
    'curriculum_temperature',
    'decoupled_kd',
    'dist',
    'dist_plus',
    'diversity',
    'domain_discrimination',
    'factor_transfer',
    'fbkd',
    'from_function',
    'from_recorded_logits',
    'fsp',
    'hard_labels',
    'hard_targets',
    'hidden_cosine',
    'hierarchical_context',
    'hint',
    'in_stages',
    'info_nce',
    'instance_graph',
    'inter_channel',
    'jacobian',
    'jensen_shannon',
    'label_free_tuning',
    'logit_mse',
    'loss_gradient_attention',
    'masked_generation',
    'mixed_labels',
    'multi_level_logits',
    'mutual_learning',
    'normalized_kd',
    'nst',
    'of_member',
    'over_layers',
    'over_positions',
    'overhaul',
    'pearson_features',
    'pkt',
    'policy_gradient',
    'reconstruction',
    'regression',
    'reverse_kl',
    'rkd_angle',
    'rkd_distance',
    'sampled_reverse_kl',
    'semckd',
    'similarity_preserving',
    'simkd',
    'simkd_logits',
    'singular_vectors',
    'skewed_kl',
    'skewed_reverse_kl',
    'soft_targets',
    'span_universal_logit',
    'srd',
    'standardize_logits',
    'subset_soft_targets',
    'taid',
    'top_k_jensen_shannon',
    'top_k_reverse_kl',
    'top_k_soft_targets',
    'total_variation',
    'uniform_layers',
    'universal_logit',
    'value_relations',
    'vid',
    'weighted_soft_labels',
    'with_check',
    'with_parameters',
]
