"""Pruning: scores of weights become masks, schedules say how many, and an optax transformation applies them.

- Scores say what a weight is worth: `magnitude`, `saliency`, `slice_norms`, `filter_norms`, `channel_norms`, `random_scores`;
  by what the network computes on data, `activation_norms`, and of whole blocks `block_importance`.
- Masks say which weights stay: over all arrays together with `global_masks`, a share of every array with `layer_masks` and
  `erk_masks`, in a pattern with `n_m_masks` and `block_masks`.
- Schedules say how many go at which step: a number, `one_shot`, `cubic`, `iterative`.
- `prune` joins them around any optimizer; `rewinding` around it goes back to early weights. `product_kernels` says which
  parameters the network uses as kernels, where their names do not.
- `channel_groups` finds what belongs to one channel, and `remove_channels` cuts it out: the network becomes smaller and faster.
  `factorize` makes two thin products of one large one.

A score per filter prunes whole filters: masks have the scores' shape and broadcast to the weights.

>>> import optax
>>> from kdjax import pruning
>>> sparsity = pruning.cubic(0.9, begin=1_000, end=8_000)
>>> unstructured = pruning.prune(optax.adamw(1e-3), sparsity)
>>> two_of_four = pruning.prune(optax.adamw(1e-3), 0.5, leaves='*/kernel', masks=pruning.n_m_masks(2, 4))
>>> filters = pruning.prune(optax.adamw(1e-3), sparsity, scores=pruning.filter_norms(), masks=pruning.layer_masks)
"""

from kdjax.pruning._activations import activation_norms, block_importance
from kdjax.pruning._channels import ChannelGroup, ChannelGroups, channel_groups, remove_channels
from kdjax.pruning._kernels import product_kernels
from kdjax.pruning._low_rank import factorize
from kdjax.pruning._masks import MaskFunction, Masks, erk_masks, global_masks, layer_masks
from kdjax.pruning._patterns import block_masks, n_m_masks
from kdjax.pruning._rewind import RewindState, rewinding
from kdjax.pruning._schedules import cubic, iterative, one_shot
from kdjax.pruning._scores import (
    ScoreFunction,
    Scores,
    channel_norms,
    filter_norms,
    magnitude,
    random_scores,
    saliency,
    slice_norms,
)
from kdjax.pruning._transformation import PruneState, apply_masks, check_outermost, prune

__all__ = [
    'ChannelGroup',
    'ChannelGroups',
    'MaskFunction',
    'Masks',
    'PruneState',
    'RewindState',
    'ScoreFunction',
    'Scores',
    'activation_norms',
    'apply_masks',
    'block_importance',
    'block_masks',
    'channel_groups',
    'channel_norms',
    'check_outermost',
    'cubic',
    'erk_masks',
    'factorize',
    'filter_norms',
    'global_masks',
    'iterative',
    'layer_masks',
    'magnitude',
    'n_m_masks',
    'one_shot',
    'product_kernels',
    'prune',
    'random_scores',
    'remove_channels',
    'rewinding',
    'saliency',
    'slice_norms',
]
