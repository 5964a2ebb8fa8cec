"""All that one student becomes: pruned, quantized, and both, in both orders.

- 'unstructured, then static': the student is pruned while it goes on training, and then quantized. Quantization-aware
  training goes on where pruning ended, and zeros stay zeros.
- 'static, then unstructured': the student is quantized, and then pruned. Quantization-aware training is followed by pruning
  while training with fake quantization goes on. But where the ranges of activations are dynamic or static, weights are integers
  once they are quantized, and integers have no gradients: pruning takes the smallest of them at once, and nothing recovers.
  Such rows say what that order costs.
"""

import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from kdjax import export, models, networks, pruning, quantization

SPARSITIES = {'unstructured': 0.8, '2:4': 0.5, 'channels': 0.5}
PRUNINGS = tuple(SPARSITIES)
AWARE = 'quantization-aware'
QUANTIZATIONS = {
    'dynamic': quantization.Rule(ranges='dynamic'),
    'static': quantization.Rule(ranges='static'),
    AWARE: quantization.Rule(ranges='moving_average'),
}


class Pruning(NamedTuple):
    """A way to prune.

    Attributes:
      sparsity: in the end.
      chosen: what is pruned: `leaves` and `masks` of `pruning.prune`.
      at_once: sets the smallest magnitudes among parameters to zero, without training.
      finish: takes out of the pruned variables what need not be kept.
      module: that fits what is left.
      network: of that module.
    """

    sparsity: float
    chosen: dict[str, Any]
    at_once: Callable[[Any], Any]
    finish: Callable[[dict[str, Any]], dict[str, Any]]
    module: nn.Module
    network: networks.Network


class Stage(NamedTuple):
    """A training.

    Attributes:
      network: that trains.
      optimizer: that trains it.
      epochs: how many.
    """

    network: networks.Network
    optimizer: optax.GradientTransformation
    epochs: int


class Compressed(NamedTuple):
    """A network that is ready to be shipped.

    Attributes:
      network: in floating point.
      rule: how it is quantized; None if it is not.
      variables: of the network, with the ranges that the rule needs, weights in floating point.
    """

    network: networks.Network
    rule: quantization.Rule | None
    variables: dict[str, Any]


def names() -> list[str]:
    """Of all that `compress` returns, in that order."""
    orders = [
        [method, *(f'{way}, then {method}' for way in PRUNINGS), *(f'{method}, then {way}' for way in PRUNINGS)]
        for method in QUANTIZATIONS
    ]
    return ['student', *PRUNINGS, *(name for order in orders for name in order)]


def network_of(module: nn.Module, prepare: Callable[[Any], jax.Array]) -> networks.Network:
    """The module as a network of inputs that `prepare` makes ready."""
    return networks.preprocess(networks.from_linen(module), prepare)


def ways_to_prune(module: nn.Module, prepare: Callable[[Any], jax.Array], inputs: Any) -> dict[str, Pruning]:
    """The ways to prune a student, by name; of `inputs` only the shapes count."""
    return {name: way_to_prune(name, sparsity, module, prepare, inputs) for name, sparsity in SPARSITIES.items()}


def way_to_prune(name: str, sparsity: float, module: nn.Module, prepare: Callable[[Any], jax.Array], inputs: Any) -> Pruning:
    """A way to prune a student.

    Args:
      name: `'unstructured'`, `'2:4'`, which zeroes half, or `'channels'`.
      sparsity: the share that goes: of the weights, or of the channels of every layer.
      module: the student's.
      prepare: makes inputs ready for it.
      inputs: a batch, of which only the shapes count.

    Raises:
      ValueError: the student has no channels that can be removed, or none of its kind with fewer exists.
    """
    student = network_of(module, prepare)
    way = functools.partial(_way, module, student)
    if name == 'unstructured':
        return way(sparsity)
    if name == '2:4':
        # Inputs that are not a multiple of four are those of the first layer.
        fours = lambda path, leaf: leaf.ndim >= 2 and leaf.shape[-2] % 4 == 0  # noqa: E731
        return way(0.5, leaves=fours, masks=pruning.n_m_masks(2, 4))
    variables = jax.jit(student.init)(jax.random.key(0), inputs)
    channels = pruning.channel_groups(student, variables, inputs)
    fewer = way(sparsity, leaves=channels.leaves, masks=channels.masks)
    # As many channels of every group stay whatever the weights are: the module that fits these fits all.
    smaller = pruning.remove_channels(channels, {**variables, 'params': fewer.at_once(variables['params'])})
    narrowed = models.narrow(module, smaller, jax.eval_shape(prepare, inputs))
    finish = lambda variables: pruning.remove_channels(channels, variables)  # noqa: E731
    return fewer._replace(finish=finish, module=narrowed, network=network_of(narrowed, prepare))


def _way(module: nn.Module, student: networks.Network, sparsity: float, **chosen: Any) -> Pruning:
    optimizer = pruning.prune(optax.set_to_zero(), sparsity, **chosen)

    @jax.jit
    def at_once(params: Any) -> Any:
        updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
        return optax.apply_updates(params, updates)

    return Pruning(sparsity, chosen, at_once, lambda variables: variables, module, student)


def keep_zeros() -> optax.GradientTransformation:
    """Last of a chain, leaves alone what is exactly zero in kernels, so that pruned weights stay pruned."""

    def update(updates: Any, params: Any) -> Any:
        return jax.tree.map(lambda u, p: jnp.where(p == 0, jnp.zeros_like(u), u) if p.ndim >= 2 else u, updates, params)

    return optax.stateless(update)


def stages(
    student: networks.Network, ways: dict[str, Pruning], *, learning_rate: float, epochs: int, steps: int
) -> dict[str, Stage]:
    """The trainings that `compress` asks for, by the name of what they make.

    Args:
      student: in floating point.
      ways: to prune it.
      learning_rate: of Adam at the start of each stage, from where it falls by a cosine.
      epochs: of the student; every stage after it takes half as many.
      steps: of an epoch.
    """
    later = max(1, epochs // 2)
    aware = lambda network: quantization.fake_quantize_network(network, QUANTIZATIONS[AWARE])  # noqa: E731

    def adam(epochs: int) -> optax.GradientTransformation:
        return optax.adam(optax.cosine_decay_schedule(learning_rate, epochs * steps))

    def pruned(way: Pruning) -> optax.GradientTransformation:
        # Half the steps to prune, half to recover.
        schedule = pruning.cubic(way.sparsity, begin=0, end=max(1, later * steps // 2), every=5)
        return pruning.prune(adam(later), schedule, **way.chosen)

    made = {'student': Stage(student, adam(epochs), epochs), AWARE: Stage(aware(student), adam(later), later)}
    for name, way in ways.items():
        made[name] = Stage(student, pruned(way), later)
        made[f'{name}, then {AWARE}'] = Stage(aware(way.network), optax.chain(adam(later), keep_zeros()), later)
        made[f'{AWARE}, then {name}'] = Stage(aware(student), pruned(way), later)
    return made


def compress(
    student: networks.Network,
    ways: dict[str, Pruning],
    train: Callable[[str, Any], dict[str, Any]],
    batches: Sequence[Any],
) -> dict[str, Compressed]:
    """Makes all that a student becomes.

    Args:
      student: in floating point.
      ways: to prune it.
      train: `train(name, variables) -> variables`, what a stage makes of what it starts from, None for nothing.
      batches: of inputs, to find static ranges.

    Returns:
      The networks, by name.
    """
    made = {'student': Compressed(student, None, train('student', None))}
    for name, way in ways.items():
        made[name] = Compressed(way.network, None, way.finish(train(name, made['student'].variables)))
    for method, rule in QUANTIZATIONS.items():
        for before in ('student', *ways):
            name = method if before == 'student' else f'{before}, then {method}'
            network, _, variables = made[before]
            if method == 'static':
                variables = quantization.calibrate(network, rule, variables, batches)
            if method == AWARE:
                # Moving averages start from the static ranges.
                variables = train(name, made[name.replace(AWARE, 'static')].variables)
            made[name] = Compressed(network, rule, variables)
        for name, way in ways.items():
            if method == AWARE:
                variables = train(f'{method}, then {name}', made[method].variables)
            else:
                integers = quantization.quantize_variables(student, rule, made[method].variables, batches[0])
                params = quantization.dequantize_weights(integers['params'])
                variables = {**made[method].variables, 'params': way.at_once(params)}
            made[f'{method}, then {name}'] = Compressed(way.network, rule, way.finish(variables))
    return made


def ship(folder: pathlib.Path, compressed: Compressed, inputs: Any, metadata: Mapping[str, Any] | None = None) -> None:
    """Writes the folder to ship, unless it is there, with integers if the network is quantized; inputs give only shapes."""
    if folder.exists():
        return
    network, rule, variables = compressed
    if rule is not None:
        variables = quantization.quantize_variables(network, rule, variables, inputs)
        network = quantization.quantize_network(network, rule)
    export.save(folder, network, variables, inputs, metadata=metadata)
