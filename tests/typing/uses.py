"""What a type checker must let pass, and what it must catch. `make types` reads this file; nothing runs it.

Where a line is wrong, a comment says which rule catches it. A comment on a line where nothing is wrong is an error too, so each
of them is a test.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kdjax import losses, metrics, networks, objectives, quantization, training
from kdjax.batches import Batch
from kdjax.networks import Network, Outputs
from kdjax.objectives import Objective


def init(key: jax.Array, inputs: Any) -> dict[str, Any]:
    return {'params': {'kernel': jnp.ones((inputs.shape[-1], 3))}}


def apply(
    variables: dict[str, Any], inputs: Any, *, train: bool = False, rng: jax.Array | None = None
) -> tuple[Outputs, dict[str, Any]]:
    return Outputs(inputs @ variables['params']['kernel']), {}


def apply_to_mapping(
    variables: Mapping[str, Any], inputs: Any, *, train: bool = False, rng: jax.Array | None = None
) -> tuple[Outputs, dict[str, Any]]:
    return Outputs(inputs @ variables['params']['kernel']), {}


def apply_without_types(variables, inputs, *, train=False, rng=None):
    return Outputs(inputs @ variables['params']['kernel']), {}


def apply_without_train(variables: dict[str, Any], inputs: Any) -> tuple[Outputs, dict[str, Any]]:
    return Outputs(inputs @ variables['params']['kernel']), {}


def networks_of_ones_own(key: jax.Array, inputs: jax.Array) -> Network:
    network = Network(init, apply)
    Network(init, apply_to_mapping)
    Network(init, apply_without_types)
    Network(init, apply_without_train)  # pyright: ignore[reportArgumentType]
    variables = network.init(key, inputs)
    network.apply(variables, inputs, train=True, rng=key)[0].logits.sum()
    network.apply(variables, inputs, trian=True)  # pyright: ignore[reportCallIssue]
    networks.ensemble([network, network], average='logits')
    networks.ensemble([network, network], average='mean')  # pyright: ignore[reportArgumentType]
    return network


def losses_behind_their_decorator(student: jax.Array, teacher: jax.Array) -> jax.Array:
    losses.soft_targets(student, teacher, temprature=4.0)  # pyright: ignore[reportCallIssue]
    losses.attention_transfer(student, teacher, variant='norm')
    losses.attention_transfer(student, teacher, variant='nrom')  # pyright: ignore[reportArgumentType]
    return losses.soft_targets(student, teacher, temperature=4.0).mean()


def objectives_and_their_arithmetic() -> Objective:
    objective = objectives.combine(
        hard=0.1 * objectives.hard_labels(),
        soft=0.9 * objectives.soft_targets(temperature=optax.linear_schedule(8.0, 2.0, 100)),
        attention=objectives.attention_transfer('stage3', 'stage3', variant='norm'),
    )
    objectives.attention_transfer('stage3', 'stage3', variant='nrom')  # pyright: ignore[reportArgumentType]
    objectives.combine(hard=0.1)  # pyright: ignore[reportArgumentType]
    return optax.cosine_decay_schedule(1.0, 100) * objective + objectives.hard_labels()


def problems(network: Network, objective: Objective, key: jax.Array, batch: Batch) -> None:
    problem = training.distillation(network, network, objective, optax.adam(1e-3))
    variables = network.init(key, batch['inputs'])
    state = problem.init(key, batch, student_variables=variables)
    problem.init(key, batch, typo=3)  # pyright: ignore[reportCallIssue]
    state, measured = problem.step(state, variables, batch)
    problem.step(state, batch)  # pyright: ignore[reportCallIssue]
    metrics.compute(measured)
    problem.check(batch, 4)
    problem.check(batch)  # pyright: ignore[reportCallIssue]
    training.skip_nonfinite(problem).init(key, batch)
    training.fit(problem, batch, variables, key=key, batch_size=4, epochs=1, mode='max')
    training.fit(problem, batch, variables, key=key, batch_size=4, epochs=1, mode='largest')  # pyright: ignore[reportArgumentType]


def evaluation(network: Network, variables: dict[str, Any], batch: Batch) -> None:
    evaluate = training.evaluator(network, metrics={'accuracy': metrics.accuracy(), 'perplexity': metrics.perplexity()})
    metrics.compute(evaluate(variables, batch))
    evaluate(variables, batch, teacher=None)  # pyright: ignore[reportCallIssue]


def quantization_rules(network: Network) -> Network:
    quantization.Rule(ranges='statik')  # pyright: ignore[reportArgumentType]
    return quantization.fake_quantize_network(network, {'*/kernel': quantization.Rule(weights=4, ranges='static'), '*': None})
