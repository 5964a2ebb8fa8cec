"""Objectives: losses lifted to networks' outputs, with connectors, weights and schedules, and the arithmetic that joins them.

objective = combine(
    hard=0.1 * hard_labels(),
    soft=0.9 * soft_targets(temperature=4.0),
    hint=optax.cosine_decay_schedule(100.0, 5_000) * hint(student='stage3', teacher='stage3'),
)
"""

from kdjax.batches import Batch as Batch
from kdjax.objectives.arguments import batch_mean as batch_mean
from kdjax.objectives.combinators import constraint as constraint
from kdjax.objectives.combinators import from_recorded_logits as from_recorded_logits
from kdjax.objectives.combinators import in_stages as in_stages
from kdjax.objectives.combinators import over_positions as over_positions
from kdjax.objectives.contrastive import crd as crd
from kdjax.objectives.contrastive import info_nce as info_nce
from kdjax.objectives.derivatives import jacobian as jacobian
from kdjax.objectives.derivatives import loss_gradient_attention as loss_gradient_attention
from kdjax.objectives.domain import domain_discrimination as domain_discrimination
from kdjax.objectives.features import activation_boundary as activation_boundary
from kdjax.objectives.features import attention_transfer as attention_transfer
from kdjax.objectives.features import channel_wise as channel_wise
from kdjax.objectives.features import fsp as fsp
from kdjax.objectives.features import hint as hint
from kdjax.objectives.features import masked_generation as masked_generation
from kdjax.objectives.features import nst as nst
from kdjax.objectives.features import over_layers as over_layers
from kdjax.objectives.features import singular_vectors as singular_vectors
from kdjax.objectives.features import uniform_layers as uniform_layers
from kdjax.objectives.logits import decoupled_kd as decoupled_kd
from kdjax.objectives.logits import dist as dist
from kdjax.objectives.logits import hard_labels as hard_labels
from kdjax.objectives.logits import hard_targets as hard_targets
from kdjax.objectives.logits import jensen_shannon as jensen_shannon
from kdjax.objectives.logits import linear_soft_targets as linear_soft_targets
from kdjax.objectives.logits import logit_mse as logit_mse
from kdjax.objectives.logits import normalized_kd as normalized_kd
from kdjax.objectives.logits import reverse_kl as reverse_kl
from kdjax.objectives.logits import skewed_kl as skewed_kl
from kdjax.objectives.logits import soft_targets as soft_targets
from kdjax.objectives.logits import standardize_logits as standardize_logits
from kdjax.objectives.logits import subset_soft_targets as subset_soft_targets
from kdjax.objectives.logits import top_k_soft_targets as top_k_soft_targets
from kdjax.objectives.logits import weighted_soft_labels as weighted_soft_labels
from kdjax.objectives.members import mutual_learning as mutual_learning
from kdjax.objectives.members import of_member as of_member
from kdjax.objectives.mixing import mixed_labels as mixed_labels
from kdjax.objectives.objective import Objective as Objective
from kdjax.objectives.objective import Term as Term
from kdjax.objectives.objective import combine as combine
from kdjax.objectives.objective import from_function as from_function
from kdjax.objectives.objective import with_check as with_check
from kdjax.objectives.objective import with_parameters as with_parameters
from kdjax.objectives.regressions import factor_transfer as factor_transfer
from kdjax.objectives.regressions import hierarchical_context as hierarchical_context
from kdjax.objectives.regressions import overhaul as overhaul
from kdjax.objectives.regressions import vid as vid
from kdjax.objectives.relations import correlation_congruence as correlation_congruence
from kdjax.objectives.relations import instance_graph as instance_graph
from kdjax.objectives.relations import pkt as pkt
from kdjax.objectives.relations import rkd_angle as rkd_angle
from kdjax.objectives.relations import rkd_distance as rkd_distance
from kdjax.objectives.relations import similarity_preserving as similarity_preserving
from kdjax.objectives.targets import binary_labels as binary_labels
from kdjax.objectives.targets import binary_soft_targets as binary_soft_targets
from kdjax.objectives.targets import bounded_regression as bounded_regression
from kdjax.objectives.targets import regression as regression
from kdjax.objectives.tokens import attention_maps as attention_maps
from kdjax.objectives.tokens import hidden_cosine as hidden_cosine
from kdjax.objectives.tokens import value_relations as value_relations
from kdjax.objectives.unsupervised import activation_size as activation_size
from kdjax.objectives.unsupervised import attention_distillation as attention_distillation
from kdjax.objectives.unsupervised import diversity as diversity
from kdjax.objectives.unsupervised import reconstruction as reconstruction
