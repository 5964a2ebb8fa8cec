"""Objectives whose values need the logits of one position at a time, and which so never need those of all."""

from kdjax.objectives._objective import Objective


def by_position(objective: Objective) -> Objective:
    """Says of an objective that it is a mean over positions, each of which it sees alone, and of networks but the logits.

    Where logits are those of a `networks.linear_head`, such terms are computed a chunk of positions at a time, all that an
    objective has of them in one pass, and no array [positions, classes] exists. Those of `kdjax.objectives` are known to be of
    this kind; this is for functions of one's own. They are handed outputs without features, logits [positions, classes] of some
    positions, and a batch of what its entries [batch, ..., more] say of these, as [positions, more]. Logits that are arrays are
    handed over as ever.

    Args:
      objective: of terms without state whose value is a mean: of what a function gives for each position, or an `Average`.

    >>> import jax, jax.numpy as jnp
    >>> from kdjax import networks, objectives
    >>> def gap(student, teacher, batch):
    ...     return (student.logits - teacher.logits).max(-1)
    >>> objective = by_position(objectives.from_function('gap', gap))
    >>> student = networks.Outputs(networks.LinearLogits(jnp.ones((2, 3, 4)), jnp.ones((4, 5)), chunk=2))
    >>> teacher = networks.Outputs(jnp.zeros((2, 3, 5)))
    >>> params, state = objective.init(jax.random.key(0), student, teacher, {})
    >>> print(objective.apply(params, state, student, teacher, {}, step=0)[0])
    4.0
    """
    return Objective(tuple(term._replace(by_position=True) for term in objective.terms))
