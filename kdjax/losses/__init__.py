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
  `soft_targets`, `logit_mse`, `hard_targets`, `dist` (batch); `reverse_kl`, `jensen_shannon`, `skewed_kl`; and
  `standardize_logits` before any of them.
Logits and labels:
  `decoupled_kd`, `normalized_kd`, `weighted_soft_labels`.
Several labels at a time, or numbers instead of classes:
  `binary_labels`, and its teacher's form `binary_soft_targets`; `regression`, with `delta` for outliers, and
  `bounded_regression`, where the teacher says when a student is good enough.
A teacher that knows only some of the classes, or of whose logits only the largest were kept, or too many classes for logits:
  `subset_soft_targets`, `top_k_soft_targets`, `linear_soft_targets`.
A layer of each network, of one shape (for others, `kdjax.objectives` trains a connector):
  `hint`, `vid`, `factor_transfer`, `hierarchical_context`, `masked_generation`, `channel_wise`, `attention_distillation`,
  `reconstruction`; before the ReLU, `activation_boundary` and `overhaul`; two layers each, `fsp`.
A layer of each network, with any channels:
  `attention_transfer`, `nst`, `singular_vectors`.
Embeddings of a batch, of any widths, with memory for batch x batch numbers:
  `similarity_preserving`, `pkt`, `rkd_distance`, `rkd_angle`, `correlation_congruence`, `instance_graph` (batch).
Embeddings of one width and other examples to tell from, those of the batch or a memory of the data set:
  `info_nce` (batch), `crd`.
Tokens and heads of transformers, with a padding mask:
  `hidden_cosine`, `attention_maps`, `value_relations`.
Derivatives, at the price of more backward passes:
  `jacobian`, `loss_gradient_attention`.
The student alone, or several domains:
  `diversity` (batch), `activation_size`; `domain_discrimination` behind `gradient_reversal`, `domain_confusion`.

The lifted forms in `kdjax.objectives` bring what has to be trained or remembered: connectors, variances, margins, banks.
"""

from kdjax.losses.contrastive import ClassIndex as ClassIndex
from kdjax.losses.contrastive import class_index as class_index
from kdjax.losses.contrastive import crd as crd
from kdjax.losses.contrastive import crd_negatives as crd_negatives
from kdjax.losses.contrastive import crd_normalizer as crd_normalizer
from kdjax.losses.contrastive import crd_update_memory as crd_update_memory
from kdjax.losses.contrastive import info_nce as info_nce
from kdjax.losses.derivatives import jacobian as jacobian
from kdjax.losses.derivatives import loss_gradient_attention as loss_gradient_attention
from kdjax.losses.divergences import jensen_shannon as jensen_shannon
from kdjax.losses.divergences import reverse_kl as reverse_kl
from kdjax.losses.divergences import skewed_kl as skewed_kl
from kdjax.losses.domain import domain_confusion as domain_confusion
from kdjax.losses.domain import domain_discrimination as domain_discrimination
from kdjax.losses.domain import gradient_reversal as gradient_reversal
from kdjax.losses.domain import reversal_schedule as reversal_schedule
from kdjax.losses.features import attention_transfer as attention_transfer
from kdjax.losses.features import channel_wise as channel_wise
from kdjax.losses.features import hierarchical_context as hierarchical_context
from kdjax.losses.features import hint as hint
from kdjax.losses.features import masked_generation as masked_generation
from kdjax.losses.graphs import instance_graph as instance_graph
from kdjax.losses.labelled import decoupled_kd as decoupled_kd
from kdjax.losses.labelled import normalized_kd as normalized_kd
from kdjax.losses.labelled import weighted_soft_labels as weighted_soft_labels
from kdjax.losses.linear import linear_soft_targets as linear_soft_targets
from kdjax.losses.logits import dist as dist
from kdjax.losses.logits import hard_targets as hard_targets
from kdjax.losses.logits import logit_mse as logit_mse
from kdjax.losses.logits import soft_targets as soft_targets
from kdjax.losses.logits import standardize_logits as standardize_logits
from kdjax.losses.regressions import activation_boundary as activation_boundary
from kdjax.losses.regressions import factor_transfer as factor_transfer
from kdjax.losses.regressions import overhaul as overhaul
from kdjax.losses.regressions import overhaul_margin as overhaul_margin
from kdjax.losses.regressions import vid as vid
from kdjax.losses.relations import correlation_congruence as correlation_congruence
from kdjax.losses.relations import pkt as pkt
from kdjax.losses.relations import rkd_angle as rkd_angle
from kdjax.losses.relations import rkd_distance as rkd_distance
from kdjax.losses.relations import similarity_preserving as similarity_preserving
from kdjax.losses.statistics import fsp as fsp
from kdjax.losses.statistics import nst as nst
from kdjax.losses.statistics import singular_vectors as singular_vectors
from kdjax.losses.targets import binary_labels as binary_labels
from kdjax.losses.targets import binary_soft_targets as binary_soft_targets
from kdjax.losses.targets import bounded_regression as bounded_regression
from kdjax.losses.targets import regression as regression
from kdjax.losses.transformers import attention_maps as attention_maps
from kdjax.losses.transformers import hidden_cosine as hidden_cosine
from kdjax.losses.transformers import value_relations as value_relations
from kdjax.losses.unsupervised import activation_size as activation_size
from kdjax.losses.unsupervised import attention_distillation as attention_distillation
from kdjax.losses.unsupervised import diversity as diversity
from kdjax.losses.unsupervised import reconstruction as reconstruction
from kdjax.losses.vocabularies import subset_soft_targets as subset_soft_targets
from kdjax.losses.vocabularies import top_k_logits as top_k_logits
from kdjax.losses.vocabularies import top_k_soft_targets as top_k_soft_targets
