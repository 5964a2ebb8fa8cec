"""Training on data that stays where it is: clients train on their own shards, and only what they have learned comes back.

    problem = training.distillation(network, None, objectives.hard_labels(), optax.sgd(0.1))
    update = client_updates(problem, steps=20, batch_size=32)
    clients = update(key, variables, shards)
    variables = average_clients(clients, examples)

Averaging is one way to make one network of the clients'; another is to distil from their `networks.ensemble`, on data that need
no labels and are nobody's.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, PartitionSpec
from jax.typing import ArrayLike

from kdjax.batches import Batch
from kdjax.problems import Problem


def client_mesh(clients: int) -> Mesh:
    """A mesh with one axis, `'clients'`, over as many devices as divide the number of clients.

    >>> client_mesh(jax.device_count()).axis_names
    ('clients',)
    """
    devices = jax.devices()[: math.gcd(clients, jax.device_count())]
    return jax.make_mesh((len(devices),), ('clients',), axis_types=(AxisType.Auto,), devices=devices)


def client_updates(
    problem: Problem, *, steps: int, batch_size: int
) -> Callable[[jax.Array, dict[str, Any], Batch], dict[str, Any]]:
    """Makes a function that has every client train on its own shard, from the same variables.

    What sees the examples of a client is mapped over clients with `jax.shard_map`, on the devices that hold their shards. It
    returns a client's variables and nothing else; no collective runs among devices.

    Args:
      problem: what a client learns; it needs no teacher. Its optimizer begins anew at every call.
      steps: steps of every client, on batches drawn from its shard with replacement.
      batch_size: examples a step.

    Returns:
      `update(key, variables, shards) -> variables [clients, ...]`, jitted; the shards are arrays [clients, examples, ...], see
      `data.stack_shards`.

    Raises:
      ValueError: steps or batch size are below 1.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, optax
    >>> from kdjax import networks, objectives, training
    >>> network = networks.from_linen(nn.Dense(3))
    >>> problem = training.distillation(network, None, objectives.hard_labels(), optax.sgd(0.1))
    >>> shards = {'inputs': jnp.ones((4, 6, 5)), 'labels': jnp.zeros((4, 6), jnp.int32)}
    >>> variables = network.init(jax.random.key(0), jnp.ones((1, 5)))
    >>> clients = client_updates(problem, steps=2, batch_size=3)(jax.random.key(1), variables, shards)
    >>> clients['params']['kernel'].shape
    (4, 5, 3)

    Reference:
      McMahan, Moore, Ramage, Hampson, Agüera y Arcas. Communication-Efficient Learning of Deep Networks from Decentralized
      Data. 2017. https://arxiv.org/abs/1602.05629
    """
    if steps < 1 or batch_size < 1:
        raise ValueError(f'client_updates: steps and batch_size must be at least 1, got {steps} and {batch_size}')

    def train(key: jax.Array, variables: dict[str, Any], shard: Batch) -> dict[str, Any]:
        examples = shard['inputs'].shape[0]
        init_key, batch_key = jax.random.split(key)

        def batch(indices: jax.Array) -> Batch:
            return {name: array[indices] for name, array in shard.items()}

        def step(state: Any, indices: jax.Array) -> tuple[Any, None]:
            return problem.step(state, {}, batch(indices))[0], None

        drawn = jax.random.randint(batch_key, (steps, batch_size), 0, examples)
        state, _ = jax.lax.scan(step, problem.init(init_key, batch(drawn[0]), student_variables=variables), drawn)
        return state.variables

    @jax.jit
    def update(key: jax.Array, variables: dict[str, Any], shards: Batch) -> dict[str, Any]:
        clients = shards['inputs'].shape[0]
        # The check would want it declared that the state begins the same on all devices and does not stay so.
        mapped = jax.shard_map(
            jax.vmap(train, (0, None, 0)),
            mesh=client_mesh(clients),
            in_specs=(PartitionSpec('clients'), PartitionSpec(), PartitionSpec('clients')),
            out_specs=PartitionSpec('clients'),
            check_vma=False,
        )
        return mapped(jax.random.split(key, clients), variables, shards)

    return update


def average_clients(variables: dict[str, Any], examples: ArrayLike) -> dict[str, Any]:
    """The mean of the clients' variables, Σ_k n_k θ_k / Σ_k n_k: federated averaging.

    Args:
      variables: floating-point arrays [clients, ...].
      examples: [clients], how many examples each has.

    Raises:
      ValueError: the numbers of clients differ.

    >>> print(average_clients({'w': jnp.array([1.0, 4.0])}, jnp.array([200, 100]))['w'])
    2.0

    Reference:
      McMahan, Moore, Ramage, Hampson, Agüera y Arcas. Communication-Efficient Learning of Deep Networks from Decentralized
      Data. 2017. https://arxiv.org/abs/1602.05629
    """
    weights = jnp.asarray(examples).astype(jnp.float32)
    found = {leaf.shape[:1] for leaf in jax.tree.leaves(variables)}
    if weights.ndim != 1 or found != {weights.shape}:
        raise ValueError(f'average_clients: examples {weights.shape} do not fit variables with leading axes {sorted(found)}')
    weights = weights / jnp.sum(weights)

    def average(leaf: jax.Array) -> jax.Array:
        return jnp.tensordot(weights, leaf.astype(jnp.float32), 1).astype(leaf.dtype)

    return jax.tree.map(average, variables)
