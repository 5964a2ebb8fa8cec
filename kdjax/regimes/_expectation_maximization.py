"""Teacher and student that teach each other what unlabelled inputs are, by expectation maximization."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kdjax.batches import Batch, check_batch
from kdjax.networks import Network, Variables, dense_logits


class Bounds(NamedTuple):
    """The lower bound of the log likelihood, in nats per example, after each half of a step; neither half lowers it.

    Attributes:
      expectation: with new responsibilities: there the bound is the log likelihood itself.
      maximization: with new parameters too.
    """

    expectation: jax.Array
    maximization: jax.Array


class ExpectationMaximizationState(NamedTuple):
    """What expectation maximization changes.

    Attributes:
      variables: those of every network.
      start: the parameters of every network at the start, the center of the prior.
    """

    variables: tuple[Variables, ...]
    start: tuple[Any, ...]


class ExpectationMaximization(NamedTuple):
    """Expectation maximization as two functions.

    Attributes:
      init: `init(variables) -> state`, the variables of every network, in order.
      step: `step(state, data) -> (state, bounds)`, jitted: one E-step and one M-step on all data.
    """

    init: Callable[[Sequence[Variables]], ExpectationMaximizationState]
    step: Callable[[ExpectationMaximizationState, Batch], tuple[ExpectationMaximizationState, Bounds]]


def expectation_maximization(
    networks: Sequence[Network], *, iterations: int = 10, precision: float = 0.0
) -> ExpectationMaximization:
    """Makes the functions that fit several networks to labels and to each other's view of unlabelled inputs.

    The class y of an input x is a hidden variable on which all networks, a teacher and its student, should agree. What is
    maximised is the mean over examples of log Π_k p_k(y | x) where there is a label, and log Σ_y Π_k p_k(y | x) where there
    is none, less λ/2 · Σ_k ||θ_k - θ_k0||², a Gaussian prior around the parameters at the start. With responsibilities q its
    bound is mean_i Σ_y q_i(y) (Σ_k log p_k(y | x_i) - log q_i(y)) less the prior.

    E-step: q_i(y) ∝ Π_k p_k(y | x_i), all on the label where there is one. M-step: some iterations of L-BFGS on the parameters
    of all networks, each of which then learns from the same soft targets q; they are dropped should they lower the bound. So
    the bound never falls, and it converges; the labels, the prior and the start keep it from the one class for all that would
    maximise agreement too.

    Args:
      networks: over the same classes; they run with `train=False` throughout, so dropout and batch statistics stand still.
      iterations: of L-BFGS in each M-step.
      precision: λ.

    Returns:
      The two functions. Data is a batch whose labels are negative, or absent, where there are none; a step takes all of it at
      once, so it has to fit. `until_convergence` runs the steps.

    Raises:
      ValueError: no networks, an argument is out of range, or, when traced, the logits differ in shape.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> from kdjax import networks, regimes, training
    >>> member = networks.from_linen(nn.Dense(2))
    >>> data = {'inputs': jnp.array([[2.0], [-2.0], [1.0], [-1.0]]), 'labels': jnp.array([0, 1, -1, -1])}
    >>> pair = regimes.expectation_maximization([member, member], precision=0.1)
    >>> state = pair.init([member.init(jax.random.key(i), data['inputs']) for i in range(2)])
    >>> state, bounds = regimes.until_convergence(pair, state, data, tolerance=1e-4)
    >>> bool((jnp.diff(bounds) >= -1e-5).all())
    True

    Reference:
      Dempster, Laird, Rubin. Maximum Likelihood from Incomplete Data via the EM Algorithm. 1977.
      https://doi.org/10.1111/j.2517-6161.1977.tb01600.x
      Liang, Taskar, Klein. Alignment by Agreement. 2006. https://aclanthology.org/N06-1014/
    """
    networks = tuple(networks)
    if not networks:
        raise ValueError('expectation_maximization: there must be at least one network')
    if iterations < 1 or precision < 0:
        raise ValueError(
            f'expectation_maximization: iterations must be at least 1 and precision at least 0, got {iterations}, {precision}'
        )
    optimizer = optax.lbfgs()

    def init(variables: Sequence[Variables]) -> ExpectationMaximizationState:
        if len(variables) != len(networks):
            raise ValueError(f'expectation_maximization: {len(networks)} networks need as many variables, got {len(variables)}')
        return ExpectationMaximizationState(tuple(variables), tuple(own['params'] for own in variables))

    @jax.jit
    def step(state: ExpectationMaximizationState, data: Batch) -> tuple[ExpectationMaximizationState, Bounds]:
        check_batch(data)
        start = tuple(own['params'] for own in state.variables)

        def join(params: tuple[Any, ...]) -> tuple[Variables, ...]:
            return tuple({**own, 'params': new} for own, new in zip(state.variables, params, strict=True))

        log_q = jax.lax.stop_gradient(_responsibilities(_log_products(networks, join(start), data['inputs']), data))

        def loss(params: tuple[Any, ...]) -> jax.Array:
            log_product = _log_products(networks, join(params), data['inputs'])
            q = jnp.exp(log_q)
            bound = jnp.mean(jnp.sum(jnp.where(q > 0, q * (log_product - log_q), 0.0), axis=-1))
            return 0.5 * precision * optax.tree.norm(optax.tree.sub(params, state.start), squared=True) - bound

        with jax.numpy_dtype_promotion('standard'), jax.numpy_rank_promotion('allow'):  # optax's line search uses both
            before = loss(start)
            value_and_gradient = optax.value_and_grad_from_state(loss)

            def iterate(carry: Any, _: None) -> tuple[Any, None]:
                params, memory = carry
                value, gradient = value_and_gradient(params, state=memory)
                more = {'value': value, 'grad': gradient, 'value_fn': loss}
                updates, memory = optimizer.update(gradient, memory, params, **more)
                return (optax.apply_updates(params, updates), memory), None

            (found, _), _ = jax.lax.scan(iterate, (start, optimizer.init(start)), length=iterations)
            after = loss(found)
        better = after <= before
        params = jax.tree.map(lambda new, old: jnp.where(better, new, old), found, start)
        return ExpectationMaximizationState(join(params), state.start), Bounds(-before, -jnp.where(better, after, before))

    return ExpectationMaximization(init, step)


def until_convergence(
    problem: ExpectationMaximization,
    state: ExpectationMaximizationState,
    data: Batch,
    *,
    tolerance: float = 1e-4,
    limit: int = 100,
) -> tuple[ExpectationMaximizationState, jax.Array]:
    """Runs the steps of expectation maximization until one raises the bound by less than a tolerance.

    Args:
      problem: from `expectation_maximization`.
      state: the state to start from.
      data: labelled and unlabelled inputs.
      tolerance: in nats per example.
      limit: of the steps.

    Returns:
      The last state, and the bound after every half of a step, [2 · steps], which does not fall but for rounding.

    Raises:
      ValueError: an argument is out of range.
    """
    if tolerance <= 0 or limit < 1:
        raise ValueError(f'until_convergence: tolerance must be positive and limit at least 1, got {tolerance} and {limit}')
    bounds: list[jax.Array] = []
    for _ in range(limit):
        state, found = problem.step(state, data)
        bounds += found
        if len(bounds) > 2 and bounds[-1] - bounds[-3] < tolerance:
            break
    return state, jnp.stack(bounds)


def _log_products(networks: Sequence[Network], variables: Sequence[Variables], inputs: Any) -> jax.Array:
    """Σ_k log p_k(y | x), [examples, classes]."""
    outputs = [network.apply(own, inputs, train=False)[0] for network, own in zip(networks, variables, strict=True)]
    logits = [dense_logits(own.logits) for own in outputs]
    if any(x is None or x.shape != logits[0].shape for x in logits):
        shapes = [None if x is None else x.shape for x in logits]
        raise ValueError(f'expectation_maximization: the networks must give logits of one shape, got {shapes}')
    return functools.reduce(jnp.add, (jax.nn.log_softmax(x.astype(jnp.float32), axis=-1) for x in logits))


def _responsibilities(log_products: jax.Array, data: Batch) -> jax.Array:
    """The log of q, which is -inf for the other classes of an example with a label."""
    log_q = jax.nn.log_softmax(log_products, axis=-1)
    if 'labels' not in data:
        return log_q
    labels = jnp.asarray(data['labels'])[:, None]
    of_label = jnp.where(jnp.arange(log_q.shape[-1])[None, :] == labels, jnp.float32(0.0), -jnp.inf)
    return jnp.where(labels >= 0, of_label, log_q)
