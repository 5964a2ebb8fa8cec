"""Removing channels for real: which slices of which parameters are one channel, and a network without them.

A channel is no slice of one kernel. It is a slice of the kernel and bias that make it, of the norm after them, of everything
added to it on the way, and of the kernels that read it. `kdjax.pruning._dependencies` finds these by a walk over the network's
jaxpr, whatever it was written in. Pruned together, as `prune(..., leaves=channels.leaves, masks=channels.masks)` does, they can
be cut out, and what is left computes the same.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import paths
from kdjax.networks import Network
from kdjax.pruning._dependencies import same_channels
from kdjax.pruning._masks import Masks, keep_largest
from kdjax.pruning._scores import Scores


class Member(NamedTuple):
    """An array that a group of channels runs through.

    Attributes:
      path: of the array in the variables, `'params/stage0/conv/kernel'`.
      axis: along which it has the channels.
      channels: for each position along the axis, which channel of the group it belongs to, or -1 for none.
    """

    path: str
    axis: int
    channels: np.ndarray


class ChannelGroup(NamedTuple):
    """Channels that run through the same arrays.

    Attributes:
      size: how many there are.
      members: the arrays.
    """

    size: int
    members: tuple[Member, ...]


class ChannelGroups(NamedTuple):
    """All channels of a network that can be removed; `leaves` and `masks` are what `prune` takes.

    Attributes:
      groups: one for every set of channels that can be chosen from independently.
    """

    groups: tuple[ChannelGroup, ...]

    def leaves(self, path: str, leaf: Any) -> bool:
        """Whether a parameter belongs to a channel."""
        del leaf
        return any(member.path == f'params/{path}' for group in self.groups for member in group.members)

    def masks(self, scores: Scores, sparsity: Any) -> Masks:
        """Prunes round(sparsity · n) of the n channels of every group, and never the last.

        The score of a channel is the sum over all that belongs to it.

        Args:
          scores: of all parameters that belong to channels, of their shapes. One of length 1 along an axis of channels, as
            `activation_norms` gives along those that a kernel writes, says nothing of them.
          sparsity: the share of channels to prune, in [0, 1].

        Returns:
          Masks of the scores' shapes, and as long as the parameter along axes of channels.

        Raises:
          ValueError: a sparsity that is known at trace time lies outside [0, 1].

        Reference:
          Fang, Ma, Song, Mi, Wang. DepGraph: Towards Any Structural Pruning. 2023. https://arxiv.org/abs/2301.12900
        """
        if isinstance(sparsity, (int, float)) and not 0 <= sparsity <= 1:
            raise ValueError(f'sparsity must be between 0 and 1, got {sparsity}')
        masks = {path: jnp.ones(score.shape, jnp.bool_) for path, score in scores.items()}
        for group in self.groups:
            pruned = jnp.minimum(jnp.round(jnp.float32(sparsity) * group.size).astype(jnp.int32), group.size - 1)
            (kept,) = keep_largest([_totals(group, scores)], group.size - pruned)
            for member in group.members:
                path = member.path.removeprefix('params/')
                if path in masks:
                    # The last entry is for positions of no channel.
                    along = jnp.append(kept, True)[member.channels]
                    masks[path] = masks[path] & along.reshape([-1 if i == member.axis else 1 for i in range(masks[path].ndim)])
        return masks


def channel_groups(network: Network, variables: Mapping[str, Any], inputs: Any) -> ChannelGroups:
    """Finds the channels of a network that can be removed, and everything that belongs to each.

    Kept are the channels of inputs and logits, and those that meet an operation that depends on how many there are or in which
    order they come: layer norms and softmax over channels, attention, slices, reshapes that split them, grouped convolutions.
    A depthwise convolution passes its channels on.

    Args:
      network: any; it is traced with `train=False`.
      variables: arrays or shapes.
      inputs: a batch of inputs, any pytree; only its shapes count.

    Returns:
      The groups. For a residual network, one for each stage's stream and one for the inside of each block.

    Raises:
      ValueError: the network has no channel that can be removed.

    >>> import jax, jax.numpy as jnp
    >>> from kdjax import models, networks
    >>> network = networks.from_linen(models.MLP((8,), classes=3))
    >>> variables = network.init(jax.random.key(0), jnp.ones((1, 4)))
    >>> (group,) = channel_groups(network, variables, jnp.ones((1, 4))).groups
    >>> group.size, [(member.path, member.axis) for member in group.members]
    (8, [('params/head/kernel', 0), ('params/hidden0/bias', 0), ('params/hidden0/kernel', 1)])
    """
    groups: dict[tuple[tuple[str, int], ...], list[dict[tuple[str, int], list[int]]]] = {}
    for channel in same_channels(network, variables, inputs):
        groups.setdefault(tuple(sorted(channel)), []).append(channel)
    if not groups:
        raise ValueError('channel_groups: the network has no channels that can be removed')
    lengths = {path: leaf.shape for path, leaf in paths.leaves_with_paths(variables).items()}
    return ChannelGroups(tuple(_group(places, channels, lengths) for places, channels in groups.items()))


def remove_channels(channels: ChannelGroups, variables: Mapping[str, Any]) -> dict[str, Any]:
    """Cuts out the channels of which every parameter is exactly zero.

    The network that fits what is left computes the same, up to the rounding of sums; for the modules of `kdjax.models`,
    `models.narrow(module, smaller, inputs)` makes it. Of a group that is all zeros the first channel stays.

    Args:
      channels: of the network.
      variables: its variables, with pruned channels at zero: from training with `prune`, or from `apply_masks`.

    Returns:
      The variables with shorter arrays, batch statistics among them.

    Raises:
      ValueError: the variables are not those that the channels were found in.

    >>> import jax, jax.numpy as jnp
    >>> from kdjax import models, networks, pruning
    >>> module, inputs = models.MLP((8,), classes=3), jnp.ones((1, 4))
    >>> network = networks.from_linen(module)
    >>> variables = network.init(jax.random.key(0), inputs)
    >>> channels = channel_groups(network, variables, inputs)
    >>> weights = pruning.magnitude(paths.select(channels.leaves, variables['params']))
    >>> pruned = {'params': pruning.apply_masks(channels.masks(weights, 0.75), variables['params'])}
    >>> smaller = remove_channels(channels, pruned)
    >>> models.narrow(module, smaller, inputs).apply(smaller, inputs).shape, smaller['params']['head']['kernel'].shape
    ((1, 3), (2, 3))
    """
    leaves = jax.device_get(paths.leaves_with_paths(variables))
    kept_along: dict[str, dict[int, np.ndarray]] = {}
    for group in channels.groups:
        for member in group.members:
            if member.path not in leaves or leaves[member.path].shape[member.axis] != len(member.channels):
                raise ValueError(f'remove_channels: {member.path} is not as it was when the channels were found')
        alive = np.zeros(group.size, bool)
        for member in group.members:
            if member.path.startswith('params/'):
                leaf = leaves[member.path]
                axes = tuple(axis for axis in range(leaf.ndim) if axis != member.axis)
                used = np.any(leaf != 0, axis=axes) & (member.channels >= 0)
                alive[member.channels[used]] = True
        alive[0] |= not alive.any()
        for member in group.members:
            along = kept_along.setdefault(member.path, {})
            kept = np.append(alive, True)[member.channels]
            along[member.axis] = along.get(member.axis, True) & kept

    def cut(path: str, leaf: Any) -> Any:
        for axis, kept in kept_along.get(path, {}).items():
            leaf = jnp.take(leaf, np.flatnonzero(kept), axis=axis)
        return leaf

    return paths.map_with_paths(cut, dict(variables))


def _group(
    places: tuple[tuple[str, int], ...], channels: list[dict[tuple[str, int], list[int]]], shapes: Mapping[str, Any]
) -> ChannelGroup:
    members = []
    for path, axis in places:
        owner = np.full(shapes[path][axis], -1)
        for i, channel in enumerate(channels):
            owner[channel[path, axis]] = i
        members.append(Member(path, axis, owner))
    return ChannelGroup(len(channels), tuple(members))


def _totals(group: ChannelGroup, scores: Scores) -> jax.Array:
    """The score of every channel; that of a channel whose every part is already pruned, -inf, stays -inf."""
    totals, alive = jnp.zeros(group.size), jnp.zeros(group.size, jnp.bool_)
    for member in group.members:
        score = scores.get(member.path.removeprefix('params/'))
        if score is None or score.shape[member.axis] != len(member.channels):
            continue
        axes = tuple(axis for axis in range(score.ndim) if axis != member.axis)
        # Part of a weight may be pruned with the channel of its other axis.
        finite = jnp.isfinite(score)
        sums = jnp.sum(jnp.where(finite, score, jnp.zeros_like(score)), axis=axes)
        inside = np.flatnonzero(member.channels >= 0)
        owners = member.channels[inside]
        totals = totals.at[owners].add(sums[inside].astype(jnp.float32))
        alive = alive.at[owners].max(jnp.any(finite, axis=axes)[inside])
    return jnp.where(alive, totals, -jnp.inf)
