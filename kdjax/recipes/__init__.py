"""Recipes: an objective with the weights that its paper, or the tables that compare methods, published.

    pair = recipes.pair(student, teacher, batch['inputs'], steps_per_epoch=390)
    problem = training.distillation(student, teacher, recipes.decoupled_kd(pair), optimizer)

Weights are those of the CIFAR-100 protocol where it has any. Each recipe is a function of the pair, since methods on features
need to know which layers there are, and warm-ups and stages how long an epoch is.
"""

from kdjax.recipes._channels import inter_channel, pearson_features
from kdjax.recipes._features import (
    activation_boundary,
    attention_distillation,
    attention_transfer,
    channel_wise,
    factor_transfer,
    factor_transfer_in_one_stage,
    fsp,
    hierarchical_context,
    hint,
    hint_in_two_stages,
    jacobian,
    loss_gradient_attention,
    masked_generation,
    nst,
    overhaul,
    singular_vectors,
    vid,
)
from kdjax.recipes._logits import (
    decoupled_kd,
    dist,
    diversity,
    hard_targets,
    jensen_shannon,
    logit_mse,
    normalized_kd,
    reverse_kl,
    skewed_kl,
    soft_targets,
    standardized_logits,
    weighted_soft_labels,
)
from kdjax.recipes._pair import Pair, Recipe, over_epochs, pair
from kdjax.recipes._projectors import fbkd, semckd, srd
from kdjax.recipes._relations import (
    correlation_congruence,
    correlation_congruence_of_kernels,
    crd,
    info_nce,
    instance_graph,
    pkt,
    rkd,
    similarity_preserving,
)
from kdjax.recipes._tokens import attention_maps, hidden_cosine, value_relations

RECIPES: dict[str, Recipe] = {
    recipe.__name__: recipe
    for recipe in (
        soft_targets,
        logit_mse,
        hard_targets,
        standardized_logits,
        reverse_kl,
        jensen_shannon,
        skewed_kl,
        decoupled_kd,
        normalized_kd,
        weighted_soft_labels,
        dist,
        hint,
        hint_in_two_stages,
        attention_transfer,
        fsp,
        nst,
        vid,
        factor_transfer,
        factor_transfer_in_one_stage,
        activation_boundary,
        overhaul,
        hierarchical_context,
        masked_generation,
        channel_wise,
        pearson_features,
        inter_channel,
        singular_vectors,
        loss_gradient_attention,
        jacobian,
        attention_distillation,
        diversity,
        similarity_preserving,
        pkt,
        rkd,
        correlation_congruence,
        correlation_congruence_of_kernels,
        instance_graph,
        crd,
        info_nce,
        srd,
        semckd,
        fbkd,
    )
}
"""For any pair of image classifiers."""

TRANSFORMER_RECIPES: dict[str, Recipe] = {
    recipe.__name__: recipe for recipe in (soft_targets, hidden_cosine, attention_maps, value_relations)
}
"""For a pair of transformers whose stages are their blocks."""

__all__ = [
    'RECIPES',
    'TRANSFORMER_RECIPES',
    'Pair',
    'Recipe',
    'activation_boundary',
    'attention_distillation',
    'attention_maps',
    'attention_transfer',
    'channel_wise',
    'correlation_congruence',
    'correlation_congruence_of_kernels',
    'crd',
    'decoupled_kd',
    'dist',
    'diversity',
    'factor_transfer',
    'factor_transfer_in_one_stage',
    'fbkd',
    'fsp',
    'hard_targets',
    'hidden_cosine',
    'hierarchical_context',
    'hint',
    'hint_in_two_stages',
    'info_nce',
    'instance_graph',
    'inter_channel',
    'jacobian',
    'jensen_shannon',
    'logit_mse',
    'loss_gradient_attention',
    'masked_generation',
    'normalized_kd',
    'nst',
    'over_epochs',
    'overhaul',
    'pair',
    'pearson_features',
    'pkt',
    'reverse_kl',
    'rkd',
    'semckd',
    'similarity_preserving',
    'singular_vectors',
    'skewed_kl',
    'soft_targets',
    'srd',
    'standardized_logits',
    'value_relations',
    'vid',
    'weighted_soft_labels',
]
