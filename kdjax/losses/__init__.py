"""Distillation losses: pure functions of arrays that know nothing of networks, optimizers or training.

Every loss is `loss(student, teacher, [labels], *, hyperparameters, axis=-1, where=None)`, computes in float32 whatever comes
in, returns float32, and has finite values and gradients for finite logits, for -inf logits, for zeros and under full masks. A
loss that is a sum over examples returns one value per example, and the caller writes `.mean()`; a loss on relations between
the examples of a batch returns a scalar. No loss stops the gradient on the teacher's side.

No loss makes a plausible number of what is none. NaN or an infinity that is kept gives NaN, but for logits at -inf, which rule
out a class; behind a mask neither value nor gradient sees it. A negative label is no label, and costs exactly 0. Labels beyond
the classes, indices beyond a bank, and hyperparameters out of range are a `ValueError` where they are known, as in a call
outside `jit`; where they are traced, such labels and indices give NaN. Hyperparameters are scalars, and logits are of two
classes or more. An empty batch gives an empty result, or 0.

What to choose, by what there is to compare. Those marked (batch) return a scalar for the whole batch, the others one value
per example.

Logits over the same classes, nothing else:
  `soft_targets`, `logit_mse`, `hard_targets`; `dist`, `multi_level_logits` (batch); `reverse_kl`, `jensen_shannon`,
  `skewed_kl`, `skewed_reverse_kl`, `total_variation`, `alpha_beta_divergence`, `adaptive_kl`; `taid`, whose target moves; and
  `standardize_logits` before any of them.
Logits and labels:
  `decoupled_kd`, `normalized_kd`, `weighted_soft_labels`, `label_free_tuning`.
Logits and a layer of each network:
  `dist_plus` (batch).
Several labels at a time, or numbers instead of classes:
  `binary_labels`, and its teacher's form `binary_soft_targets`; `regression`, with `delta` for outliers, and
  `bounded_regression`, where the teacher says when a student is good enough.
A teacher of some of the classes or of others, of the k largest logits or of sampled tokens, or too many classes for logits:
  `subset_soft_targets`; `universal_logit`; `top_k_soft_targets`, `top_k_reverse_kl`, `top_k_jensen_shannon`;
  `sampled_reverse_kl`, `policy_gradient`; `linear_soft_targets`.
Text in the tokens of two tokenizers, aligned by `kdjax.data.align_tokens`:
  `span_universal_logit`; of `span_log_probabilities`, `approximate_likelihood_matching` and `sampled_reverse_kl`.
A layer of each network, of one shape (for others, `kdjax.objectives` trains a connector):
  `hint`, `vid`, `factor_transfer`, `hierarchical_context`, `masked_generation`, `channel_wise`, `attention_distillation`,
  `pearson_features`, `inter_channel`, `fbkd`, `reconstruction`; before the ReLU, `activation_boundary` and `overhaul`; two
  layers each, `fsp`.
A layer of each network, with any channels:
  `attention_transfer`, `nst`, `singular_vectors`.
Embeddings of a batch, of any widths, with memory for batch x batch numbers:
  `similarity_preserving`, `pkt`, `rkd_distance`, `rkd_angle`, `correlation_congruence`, `instance_graph` (batch).
Embeddings of one width and other examples to tell from, those of the batch or a memory of the data set:
  `info_nce` (batch), `crd`.
Embeddings of one width, standardized:
  `srd`.
Tokens and heads of transformers, with a padding mask:
  `hidden_cosine`, `attention_maps`, `value_relations`.
Derivatives, at the price of more backward passes:
  `jacobian`, `loss_gradient_attention`.
The student alone, or several domains:
  `diversity` (batch), `activation_size`; `domain_discrimination` behind `gradient_reversal`, `domain_confusion`.

The lifted forms in `kdjax.objectives` bring what has to be trained or remembered: connectors, variances, margins, banks.
"""

from kdjax.losses._adaptive_kl import adaptive_kl
from kdjax.losses._alpha_beta import alpha_beta_divergence
from kdjax.losses._attention_transfer import attention_transfer
from kdjax.losses._channel_wise import channel_wise
from kdjax.losses._correlation_congruence import correlation_congruence
from kdjax.losses._crd import ClassIndex, class_index, crd, crd_negatives, crd_normalizer, crd_update_memory
from kdjax.losses._decoupled_kd import decoupled_kd
from kdjax.losses._derivatives import jacobian, loss_gradient_attention
from kdjax.losses._dist import dist, dist_plus
from kdjax.losses._divergences import jensen_shannon, reverse_kl, skewed_kl, skewed_reverse_kl, total_variation
from kdjax.losses._domain import domain_confusion, domain_discrimination, gradient_reversal, reversal_schedule
from kdjax.losses._factor_transfer import factor_transfer
from kdjax.losses._fbkd import fbkd
from kdjax.losses._fsp import fsp
from kdjax.losses._hint import hint
from kdjax.losses._info_nce import info_nce
from kdjax.losses._instance_graph import instance_graph
from kdjax.losses._inter_channel import inter_channel
from kdjax.losses._knowledge_review import hierarchical_context
from kdjax.losses._label_free_tuning import label_free_tuning
from kdjax.losses._linear_heads import linear_soft_targets
from kdjax.losses._logits import hard_targets, logit_mse, soft_targets, standardize_logits
from kdjax.losses._masked_generation import masked_generation
from kdjax.losses._multi_level_logits import multi_level_logits
from kdjax.losses._normalized_kd import normalized_kd
from kdjax.losses._nst import nst
from kdjax.losses._overhaul import activation_boundary, overhaul, overhaul_margin
from kdjax.losses._pearson_features import pearson_features
from kdjax.losses._pkt import pkt
from kdjax.losses._rkd import rkd_angle, rkd_distance
from kdjax.losses._sampled import policy_gradient, sampled_reverse_kl
from kdjax.losses._similarity_preserving import similarity_preserving
from kdjax.losses._singular_vectors import singular_vectors
from kdjax.losses._spans import approximate_likelihood_matching, span_log_probabilities, span_universal_logit
from kdjax.losses._srd import srd
from kdjax.losses._subset_soft_targets import subset_soft_targets
from kdjax.losses._taid import taid
from kdjax.losses._targets import binary_labels, binary_soft_targets, bounded_regression, regression
from kdjax.losses._top_k import (
    top_k_from_log_probabilities,
    top_k_jensen_shannon,
    top_k_logits,
    top_k_reverse_kl,
    top_k_soft_targets,
)
from kdjax.losses._transformers import attention_maps, hidden_cosine, value_relations
from kdjax.losses._universal_logit import universal_logit
from kdjax.losses._unsupervised import activation_size, attention_distillation, diversity, reconstruction
from kdjax.losses._vid import vid
from kdjax.losses._weighted_soft_labels import weighted_soft_labels

__all__ = [
    'ClassIndex',
    'activation_boundary',
    'activation_size',
    'adaptive_kl',
    'alpha_beta_divergence',
    'approximate_likelihood_matching',
    'attention_distillation',
    'attention_maps',
    'attention_transfer',
    'binary_labels',
    'binary_soft_targets',
    'bounded_regression',
    'channel_wise',
    'class_index',
    'correlation_congruence',
    'crd',
    'crd_negatives',
    'crd_normalizer',
    'crd_update_memory',
    'decoupled_kd',
    'dist',
    'dist_plus',
    'diversity',
    'domain_confusion',
    'domain_discrimination',
    'factor_transfer',
    'fbkd',
    'fsp',
    'gradient_reversal',
    'hard_targets',
    'hidden_cosine',
    'hierarchical_context',
    'hint',
    'info_nce',
    'instance_graph',
    'inter_channel',
    'jacobian',
    'jensen_shannon',
    'label_free_tuning',
    'linear_soft_targets',
    'logit_mse',
    'loss_gradient_attention',
    'masked_generation',
    'multi_level_logits',
    'normalized_kd',
    'nst',
    'overhaul',
    'overhaul_margin',
    'pearson_features',
    'pkt',
    'policy_gradient',
    'reconstruction',
    'regression',
    'reversal_schedule',
    'reverse_kl',
    'rkd_angle',
    'rkd_distance',
    'sampled_reverse_kl',
    'similarity_preserving',
    'singular_vectors',
    'skewed_kl',
    'skewed_reverse_kl',
    'soft_targets',
    'span_log_probabilities',
    'span_universal_logit',
    'srd',
    'standardize_logits',
    'subset_soft_targets',
    'taid',
    'top_k_from_log_probabilities',
    'top_k_jensen_shannon',
    'top_k_logits',
    'top_k_reverse_kl',
    'top_k_soft_targets',
    'total_variation',
    'universal_logit',
    'value_relations',
    'vid',
    'weighted_soft_labels',
]
