"""Flax Linen modules as networks."""

from collections.abc import Callable
from typing import Any

import flax.errors
import flax.linen as nn
import jax

from kdjax.networks import _class_gradients
from kdjax.networks._arguments import TrainArgument, call_arguments
from kdjax.networks._network import Network, Outputs, as_outputs, as_paths, select_features


def from_linen(
    module: nn.Module,
    *,
    features: str | tuple[str, ...] = (),
    class_gradients: str | tuple[str, ...] = (),
    mutable: str | tuple[str, ...] = (),
    train_argument: TrainArgument = None,
) -> Network:
    """Makes a `Network` of a Linen module.

    The module takes a batch of inputs and returns logits, or `Outputs`. Inputs are one pytree: an only argument is all of it;
    over several, a tuple is spread by position, a dictionary by name. If its `__call__` has an argument named `train`,
    `training`, `is_training` or `deterministic`, that is set; every random stream that it asks for is drawn from `rng`.

    Args:
      module: the module, unbound.
      features: paths of submodules whose outputs `apply` also returns, such as `'stage2/block1'`; names that the module sows in
        `'intermediates'` are paths too. Of a submodule that is called several times, the last output is returned.
      class_gradients: paths among `features` for which `apply` also returns `'path/class_gradients'`, of shape [batch, classes,
        channels]: the derivative of each logit by each channel, its mean over positions. These are Grad-CAM's weights, for
        `objectives.loss_gradient_attention`; they cost a backward pass per class from the logits to the layer. The submodule
        must be called once, and return an array.
      mutable: collections that may change with `train=False` too, and are returned in the state, such as `'cache'`; with
        `train=True` all may but the parameters.
      train_argument: a switch between training and evaluation of another name: the one that is True in training, or
        `{'is_eval': False}`, what it is in training; `()` if the module has none. To be given too where a module hands the
        switch on within its `**kwargs`, which does not show.

    Returns:
      The network. Its variables are the module's own collections, `'params'` among them.

    Raises:
      ValueError: a path in `class_gradients` is not in `features`, an argument of the module, such as a boolean with a default,
        may be its switch and is none of the four, or `mutable` names the parameters; from `init` and `apply`: inputs do not
        fit the arguments, a path in `features` does not exist, where the message lists those that do, or `class_gradients`
        name no submodule that is called once.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> network = from_linen(nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(3)]), features='layers_0')
    >>> variables = network.init(jax.random.key(0), jnp.ones((2, 5)))
    >>> outputs, state = network.apply(variables, jnp.ones((2, 5)))
    >>> outputs.logits.shape, outputs.features['layers_0'].shape
    ((2, 3), (2, 8))
    """
    features, class_gradients = as_paths(features), as_paths(class_gradients)
    _class_gradients.check_tapped('from_linen', class_gradients, features)
    kept = as_paths(mutable)
    if 'params' in kept:
        raise ValueError("from_linen: mutable are collections of the state, such as 'cache', not 'params'")
    owner = type(module).__name__
    arguments = call_arguments(module, train_argument, maker='from_linen', optional=False)

    def init(key: jax.Array, inputs: Any) -> dict[str, Any]:
        args, named = arguments(jax.eval_shape(lambda x: x, inputs), False)
        variables = module.lazy_init(key, *args, **named)
        return {name: value for name, value in variables.items() if name != 'intermediates'}

    def apply(
        variables: dict[str, Any], inputs: Any, *, train: bool = False, rng: jax.Array | None = None
    ) -> tuple[Outputs, dict[str, Any]]:
        args, named = arguments(inputs, train)
        state = {name: value for name, value in variables.items() if name != 'params'}

        def forward(capture: Any) -> tuple[Any, tuple[dict[str, Any], dict[str, Any]]]:
            applied: Any = module.apply(
                variables,
                *args,
                rngs=rng,
                mutable=[*(state if train else ()), *kept, 'intermediates'],
                capture_intermediates=capture,
                **named,
            )
            result, changed = applied
            intermediates = changed.pop('intermediates', {})
            return result, (dict(changed), _by_path(intermediates))

        if train and rng is None:
            _check_no_noise(owner, lambda: forward(False))
        wanted = {path.removesuffix('/__call__') for path in features}
        result, (changed, activations) = forward(
            (lambda submodule, method: '/'.join(submodule.path) in wanted) if features else False
        )
        if any(path not in activations for path in features):
            # A second, abstract pass, to name all the paths there are.
            _, (_, activations) = jax.eval_shape(lambda: forward(True))
        tapped = select_features(features, activations, owner)
        for path in class_gradients:
            tapped[f'{path}/class_gradients'] = _class_gradients.class_gradients(
                'from_linen',
                path,
                tapped[path],
                lambda perturb, path=path: _perturbed(lambda: forward(False)[0], path, perturb),
            )
        return as_outputs(result, tapped, owner), {**state, **changed}

    return Network(init, apply)


def _perturbed(forward: Callable[[], Any], path: str, perturb: Callable[[jax.Array], jax.Array]) -> Any:
    """What a module returns where `perturb` is applied to what its submodule at a path returns."""

    def intercept(function: Callable[..., Any], arguments: Any, keywords: Any, context: nn.module.InterceptorContext) -> Any:
        output = function(*arguments, **keywords)
        if context.method_name != '__call__' or '/'.join(context.module.path) != path:
            return output
        return perturb(output)

    with nn.intercept_methods(intercept):
        return forward()


def _check_no_noise(owner: str, forward: Any) -> None:
    try:
        jax.eval_shape(forward)
    except flax.errors.InvalidRngError:
        raise ValueError(f'{owner} draws random numbers in training: pass rng=') from None


def _by_path(intermediates: Any, prefix: tuple[str, ...] = ()) -> dict[str, Any]:
    """Flattens Linen's intermediates, in which every name holds a tuple with one entry per call."""
    if isinstance(intermediates, tuple):
        path = '/'.join(prefix).removesuffix('__call__').rstrip('/')
        return {path: intermediates[-1]} if path else {}
    return {path: value for name, node in intermediates.items() for path, value in _by_path(node, (*prefix, name)).items()}
