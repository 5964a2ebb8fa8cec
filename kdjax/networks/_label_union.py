"""One network of several that know different classes."""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.networks._ensemble import ensemble
from kdjax.networks._linear_logits import dense_logits
from kdjax.networks._network import Network
from kdjax.networks._preprocess import postprocess


def label_union(
    members: Sequence[Network],
    classes: Sequence[Sequence[int]],
    *,
    average: Literal['probabilities', 'logits'] = 'probabilities',
) -> Network:
    """Makes one network that knows all classes of several, each of which knows only some.

    `average='probabilities'`: softmax of the logits is the mean of the members' softmax, which is 0 for classes that a member
    does not know. `average='logits'`: the logit of a class is the mean over the members that know it; where no two members
    share a class, that is all their logits side by side, and the largest prevails. Where all members know all classes, both
    are those of `ensemble`.

    How likely a class of one member is beside one of another is not among what the members have learned: it rests on how they
    react to inputs of classes that they do not know.

    Args:
      members: networks.
      classes: for every member, the classes of the union that its logits stand for, in their order; together they are
        0, 1, ..., each in at least one.
      average: `'probabilities'` or `'logits'`.

    Returns:
      The network. Its variables and features are named as those of an `ensemble` of the members.

    Raises:
      ValueError: the classes are not as they should be, an unknown average, or, when traced, a member with another number of
        logits than classes.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> from kdjax.networks import from_linen
    >>> network = label_union([from_linen(nn.Dense(3)), from_linen(nn.Dense(2))], [(0, 1, 2), (3, 4)])
    >>> outputs, _ = network.apply(network.init(jax.random.key(0), jnp.ones((4, 5))), jnp.ones((4, 5)))
    >>> outputs.logits.shape
    (4, 5)

    Reference:
      Vongkulbhisal, Vinayavekhin, Visentini-Scarzanella. Unifying Heterogeneous Classifiers with Distillation. 2019.
      https://arxiv.org/abs/1904.06062
    """
    members, known = tuple(members), tuple(tuple(map(int, own)) for own in classes)
    if len(members) != len(known):
        raise ValueError(f'label_union: give the classes of every member; got {len(known)} for {len(members)} members')
    for i, own in enumerate(known):
        if len(set(own)) != len(own):
            raise ValueError(f'label_union: the classes of member {i} must differ from each other, got {own}')
    union = sorted(set().union(*known))
    if union != list(range(len(union))):
        raise ValueError(f'label_union: the classes together must be 0, 1, ... without gaps, got {union}')
    # A class that a member does not know has no share in its softmax, or in the sum of its logits.
    unknown = 0.0 if average == 'logits' else -jnp.inf
    widened = [_widen(member, i, own, len(union), unknown) for i, (member, own) in enumerate(zip(members, known, strict=True))]
    joined = ensemble(widened, average=average)
    if average == 'probabilities':
        return joined
    counts = np.bincount(np.concatenate(known), minlength=len(union))
    scale = np.float32(len(members)) / counts.astype(np.float32)

    return postprocess(joined, lambda logits: logits * scale.reshape((1,) * (logits.ndim - 1) + (-1,)))


def _widen(member: Network, number: int, known: tuple[int, ...], total: int, unknown: float) -> Network:
    """A member with a logit for every class of the union."""

    def widen(logits: jax.Array) -> jax.Array:
        if logits.shape[-1] != len(known):
            raise ValueError(f'label_union: member {number} gives logits {logits.shape} and has {len(known)} classes')
        wide = jnp.full((*logits.shape[:-1], total), unknown, jnp.float32)
        return wide.at[..., np.array(known)].set(dense_logits(logits).astype(jnp.float32))

    return postprocess(member, widen)
