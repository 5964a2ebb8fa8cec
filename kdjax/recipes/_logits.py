"""Recipes for logits alone, or with labels."""

from kdjax import objectives
from kdjax.objectives import Objective
from kdjax.recipes._pair import Pair, over_epochs


def soft_targets(pair: Pair) -> Objective:
    """KD (Hinton 2015): 0.1 · hard labels + 0.9 · soft targets at temperature 4."""
    del pair
    return objectives.combine(hard=0.1 * objectives.hard_labels(), soft=0.9 * objectives.soft_targets(temperature=4.0))


def logit_mse(pair: Pair) -> Objective:
    """Ba & Caruana 2014: 0.1 · hard labels + 0.9 · squared difference of logits."""
    del pair
    return objectives.combine(hard=0.1 * objectives.hard_labels(), soft=0.9 * objectives.logit_mse())


def hard_targets(pair: Pair) -> Objective:
    """DeiT (Touvron 2021): half hard labels, half the teacher's choices."""
    del pair
    return objectives.combine(hard=0.5 * objectives.hard_labels(), choices=0.5 * objectives.hard_targets())


def standardized_logits(pair: Pair) -> Objective:
    """Sun 2024: 0.1 · hard labels + 9 · soft targets of standardized logits at temperature 2."""
    del pair
    soft = objectives.standardize_logits(objectives.soft_targets(temperature=2.0))
    return objectives.combine(hard=0.1 * objectives.hard_labels(), soft=9.0 * soft)


def reverse_kl(pair: Pair) -> Objective:
    """MiniLLM (Gu 2024): hard labels + reverse divergence. The paper is about language models; the weight is ours."""
    del pair
    return objectives.combine(hard=objectives.hard_labels(), reverse=objectives.reverse_kl())


def jensen_shannon(pair: Pair) -> Objective:
    """GKD (Agarwal 2024): hard labels + the divergence half way. The paper is about language models; the weight is ours."""
    del pair
    return objectives.combine(hard=objectives.hard_labels(), between=objectives.jensen_shannon())


def skewed_kl(pair: Pair) -> Objective:
    """DistiLLM (Ko 2024): hard labels + skewed divergence. The paper is about language models; the weight is ours."""
    del pair
    return objectives.combine(hard=objectives.hard_labels(), skewed=objectives.skewed_kl())


def skewed_reverse_kl(pair: Pair) -> Objective:
    """DistiLLM (Ko 2024): hard labels + skewed reverse divergence. The paper is about language models; the weight is ours."""
    del pair
    return objectives.combine(hard=objectives.hard_labels(), skewed=objectives.skewed_reverse_kl())


def total_variation(pair: Pair) -> Objective:
    """f-distill (Wen 2023): hard labels + total variation. The paper is about language models; the weight is ours."""
    del pair
    return objectives.combine(hard=objectives.hard_labels(), variation=objectives.total_variation())


def alpha_beta_divergence(pair: Pair) -> Objective:
    """ABKD (Wang 2025): hard labels + α-β-divergence with α = 0.2, β = 0.7. Weight and exponents are ours."""
    del pair
    return objectives.combine(hard=objectives.hard_labels(), divergence=objectives.alpha_beta_divergence(alpha=0.2, beta=0.7))


def adaptive_kl(pair: Pair) -> Objective:
    """AKL (Wu 2024): hard labels + adaptive divergence. The paper is about language models; the weight is ours."""
    del pair
    return objectives.combine(hard=objectives.hard_labels(), adaptive=objectives.adaptive_kl())


def taid(pair: Pair) -> Objective:
    """TAID (Shing 2025): hard labels + a target that moves to the teacher over the run, as fast as the student follows.

    The paper is about language models, and has no labels; their weight is ours.
    """
    moving = objectives.adaptive_taid(max(1, pair.epochs * pair.steps_per_epoch))
    return objectives.combine(hard=objectives.hard_labels(), moving=moving)


def decoupled_kd(pair: Pair) -> Objective:
    """DKD (Zhao 2022): hard labels + DKD with α = 1, β = 8, T = 4, warmed up over 20 epochs of 240."""
    return objectives.combine(hard=objectives.hard_labels(), dkd=over_epochs(pair) * objectives.decoupled_kd())


def normalized_kd(pair: Pair) -> Objective:
    """NKD (Yang 2023): hard labels + NKD with γ = 1.5, T = 1."""
    del pair
    return objectives.combine(hard=objectives.hard_labels(), nkd=objectives.normalized_kd())


def weighted_soft_labels(pair: Pair) -> Objective:
    """WSLD (Zhou 2021): hard labels + 2.25 · weighted soft labels at temperature 2."""
    del pair
    return objectives.combine(hard=objectives.hard_labels(), weighted=2.25 * objectives.weighted_soft_labels())


def dist(pair: Pair) -> Objective:
    """DIST (Huang 2022): hard labels + DIST with β = γ = 2, T = 4."""
    del pair
    return objectives.combine(hard=objectives.hard_labels(), dist=objectives.dist(beta=2.0, gamma=2.0, temperature=4.0))


def multi_level_logits(pair: Pair) -> Objective:
    """MLLD (Jin 2023): 0.1 · hard labels + 0.9 · predictions and their relations at T = 2 to 6, of one view of the images."""
    del pair
    levels = objectives.multi_level_logits()
    return objectives.combine(hard=0.1 * objectives.hard_labels(), levels=0.9 * levels)


def curriculum_temperature(pair: Pair) -> Objective:
    """CTKD (Li 2023): 0.1 · hard labels + 0.9 · soft targets at a trained temperature, reversed over 10 epochs of 240."""
    steps = max(1, round(pair.epochs * pair.steps_per_epoch * 10 / 240))
    return objectives.combine(hard=0.1 * objectives.hard_labels(), soft=0.9 * objectives.curriculum_temperature(steps))


def label_free_tuning(pair: Pair) -> Objective:
    """MFT (Belcak 2025): soft targets at T = 1, corrected until the label leads by 0.2. The paper is about language models."""
    del pair
    return objectives.combine(soft=objectives.label_free_tuning())


def diversity(pair: Pair) -> Objective:
    """Hard labels + 0.01 · confident and diverse predictions, which need no teacher. The weight is ours."""
    del pair
    return objectives.combine(hard=objectives.hard_labels(), diversity=0.01 * objectives.diversity())
