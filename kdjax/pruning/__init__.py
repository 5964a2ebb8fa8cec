"""Pruning: scores of weights become masks, schedules say how many, and an optax transformation applies them.

- Scores say what a weight is worth: `magnitude`, `saliency`, `slice_norms`, `filter_norms`, `channel_norms`, `random_scores`.
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

from kdjax.pruning.channels import ChannelGroup as ChannelGroup
from kdjax.pruning.channels import ChannelGroups as ChannelGroups
from kdjax.pruning.channels import channel_groups as channel_groups
from kdjax.pruning.channels import remove_channels as remove_channels
from kdjax.pruning.kernels import product_kernels as product_kernels
from kdjax.pruning.low_rank import factorize as factorize
from kdjax.pruning.masks import MaskFunction as MaskFunction
from kdjax.pruning.masks import Masks as Masks
from kdjax.pruning.masks import erk_masks as erk_masks
from kdjax.pruning.masks import global_masks as global_masks
from kdjax.pruning.masks import layer_masks as layer_masks
from kdjax.pruning.patterns import block_masks as block_masks
from kdjax.pruning.patterns import n_m_masks as n_m_masks
from kdjax.pruning.rewind import RewindState as RewindState
from kdjax.pruning.rewind import rewinding as rewinding
from kdjax.pruning.schedules import cubic as cubic
from kdjax.pruning.schedules import iterative as iterative
from kdjax.pruning.schedules import one_shot as one_shot
from kdjax.pruning.scores import ScoreFunction as ScoreFunction
from kdjax.pruning.scores import Scores as Scores
from kdjax.pruning.scores import channel_norms as channel_norms
from kdjax.pruning.scores import filter_norms as filter_norms
from kdjax.pruning.scores import magnitude as magnitude
from kdjax.pruning.scores import random_scores as random_scores
from kdjax.pruning.scores import saliency as saliency
from kdjax.pruning.scores import slice_norms as slice_norms
from kdjax.pruning.transformation import PruneState as PruneState
from kdjax.pruning.transformation import apply_masks as apply_masks
from kdjax.pruning.transformation import check_outermost as check_outermost
from kdjax.pruning.transformation import prune as prune
