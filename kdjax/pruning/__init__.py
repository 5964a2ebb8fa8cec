"""Pruning: scores of weights, masks with exact counts, schedules, and the optax transformation that applies them."""

from kdjax.pruning.masks import Masks as Masks
from kdjax.pruning.masks import Scores as Scores
from kdjax.pruning.masks import global_masks as global_masks
from kdjax.pruning.masks import layer_masks as layer_masks
from kdjax.pruning.masks import magnitude as magnitude
from kdjax.pruning.schedules import cubic as cubic
from kdjax.pruning.transformation import PruneState as PruneState
from kdjax.pruning.transformation import apply_masks as apply_masks
from kdjax.pruning.transformation import prune as prune
