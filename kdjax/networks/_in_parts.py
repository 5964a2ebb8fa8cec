"""A network computed a share of the batch at a time, for objectives that see all of it."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from kdjax.networks._linear_logits import LinearLogits
from kdjax.networks._network import Network, Outputs, unchanged
from kdjax.paths import leaves_with_paths


def in_parts(network: Network, n: int) -> Network:
    """Computes a network for a batch in n parts, one after the other: exact accumulation of gradients.

    The outputs are those of the whole batch, in its order, so that any objective applies to it as ever: means over the labels
    there are, terms that compare examples, a bank of them. The backward pass computes a part's activations again, and adds its
    gradient to that of the parts before. In memory are the activations of one part, and inputs and outputs of all of them:
    logits and tapped features; of a `linear_head`'s logits the hidden states alone. It costs a forward pass more.

    `optax.MultiSteps` averages the gradients of micro-batches instead. That is the gradient of the whole batch only where every
    micro-batch counts equally, which they do not where labels are missing, positions masked or examples weighted, and only for
    objectives that are means over examples; those that compare examples see no more than a micro-batch. (Two steps of momentum
    with 9 of 32 examples labelled, in four parts, end 3e-8 away from the whole batch; four micro-batches end 0.3 away.)
    Schedules of an objective then count micro-batches, those of the optimizer whole ones.

    Example i belongs to part i % n: of a batch that is sharded over devices every part is too, as long as it has an example for
    each. Noise is drawn for every part from a key of its own. Variables are those of the network, which may be evaluated
    itself, in batches of any size.

    Args:
      network: a network that treats every example alone. One that changes its state cannot be computed in parts, since each
        would start from the same state: batch norm in training. In evaluation it can.
      n: the number of parts.

    Raises:
      ValueError: n is not positive; from `apply`, when traced: n does not divide the batch, the network changes its state, or
        outputs have no leading axis of examples, as `tap_parameters` gives them, which goes outside of this.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> from kdjax.networks import from_linen
    >>> network = in_parts(from_linen(nn.Dense(3)), 2)
    >>> network.apply(network.init(jax.random.key(0), jnp.ones((4, 5))), jnp.ones((4, 5)))[0].logits.shape
    (4, 3)
    """
    if n < 1:
        raise ValueError(f'in_parts: the number of parts must be positive, got {n}')
    if n == 1:
        return network

    def apply(
        variables: dict[str, Any], inputs: Any, *, train: bool = False, rng: jax.Array | None = None
    ) -> tuple[Outputs, dict[str, Any]]:
        size = _size(inputs, n)
        names: list[str] = []

        @functools.partial(jax.checkpoint, prevent_cse=False)  # in a loop there is nothing to prevent
        def run(part: Any, number: jax.Array) -> Outputs:
            own_rng = None if rng is None else jax.random.fold_in(rng, number)
            outputs, state = network.apply(variables, part, train=train, rng=own_rng)
            changed = sorted(set(leaves_with_paths(state)) - unchanged(state, variables))
            if changed:
                raise ValueError(
                    f'in_parts: the network changes its state, such as {changed[0]}, which parts of a batch cannot share: '
                    f'use layers without batch statistics, or smaller batches'
                )
            names[:] = state
            return _without_factors(outputs)

        # Cut so that a part has some of every device's examples, not all of one device's.
        parts = jax.tree.map(lambda x: jnp.swapaxes(jnp.reshape(x, (size // n, n, *x.shape[1:])), 0, 1), inputs)
        outputs = jax.lax.map(lambda part: run(*part), (parts, jnp.arange(n)))
        complete = jax.eval_shape(lambda: network.apply(variables, inputs, train=train, rng=rng)[0])
        whole = _without_factors(complete)
        _check_examples(outputs, whole, size, n)
        joined = jax.tree.map(lambda x: jnp.reshape(jnp.swapaxes(x, 0, 1), (size, *x.shape[2:])), outputs)
        if len(jax.tree.leaves(whole)) < len(jax.tree.leaves(complete)):
            # The kernels of linear heads are no part's own: they are those of any part, of which the rest is not used.
            first = network.apply(variables, jax.tree.map(lambda x: x[0], parts), train=train, rng=rng)[0]
            joined = jax.tree.map(_with_hidden, first, joined, is_leaf=_is_linear)
        return joined, {name: variables[name] for name in names if name in variables}

    return Network(network.init, apply)


def _size(inputs: Any, n: int) -> int:
    sizes = {jnp.shape(x)[:1] for x in jax.tree.leaves(inputs)}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(f'in_parts: inputs must be arrays with one number of examples, got {sorted(sizes)}')
    ((size,),) = sizes
    if size % n:
        raise ValueError(f'in_parts: a batch of {size} cannot be cut into {n} equal parts; choose a number that divides it')
    return size


def _check_examples(outputs: Outputs, whole: Outputs, size: int, n: int) -> None:
    """Raises unless the leading axis of what comes out is that of the examples: as long as the part, and as the batch."""
    wholes, parts = (leaves_with_paths({'logits': out.logits, **out.features}) for out in (whole, outputs))
    for path in wholes:
        if parts[path].shape[1:2] != (size // n,) or wholes[path].shape[:1] != (size,):
            raise ValueError(
                f'in_parts: {path} {wholes[path].shape} has no leading axis of {size} examples along which to join parts; put '
                f'in_parts inside of what makes it'
            )


def _is_linear(x: Any) -> bool:
    return isinstance(x, LinearLogits)


def _without_factors(outputs: Outputs) -> Outputs:
    """Outputs with the hidden states in place of `LinearLogits`."""
    return jax.tree.map(lambda x: x.hidden if _is_linear(x) else x, outputs, is_leaf=_is_linear)


def _with_hidden(own: Any, joined: Any) -> Any:
    return dataclasses.replace(own, hidden=joined) if _is_linear(own) else joined
