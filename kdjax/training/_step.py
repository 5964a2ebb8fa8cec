"""The training step: student, teacher, objective and optimizer become one pure function of state and batch."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from kdjax.batches import Batch, check_batch, take_examples
from kdjax.metrics import Average, mean
from kdjax.networks import Network, Outputs, Variables
from kdjax.objectives import Objective
from kdjax.optimizers import keep_frozen_state
from kdjax.problems import Problem, TrainState
from kdjax.pruning import check_outermost


def distillation(
    student: Network,
    teacher: Network | None,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    objective_optimizer: optax.GradientTransformation | None = None,
) -> Problem:
    """Makes the functions that train a student to meet an objective.

    One step runs the teacher (`train=False`, no gradient), the student forward and backward, and the optimizers. Sharding
    follows the arguments: with a batch sharded over devices and the rest replicated it is data parallel, and losses and
    batch statistics still see the whole batch.

    Args:
      student: the network that learns.
      teacher: the network that it learns from; None for a student that learns alone, such as a teacher itself.
      objective: what it learns.
      optimizer: updates the student's parameters.
      objective_optimizer: updates the objective's parameters, if it has any: connectors are helpers that are neither pruned nor
        decayed with the student. Adam at 1e-3 by default.

    Returns:
      The `Problem`. Its metrics are the objective's, `'gradient_norm'`, the L2 norm of the gradient of the student's
      parameters, and, where the optimizer tells it as `optax.inject_hyperparams` does, `'learning_rate'`.

    Raises:
      ValueError: from `init`: the objective needs what the networks or the batch lack, shapes do not fit, or `pruning.prune` is
        not the last in its chain.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, optax
    >>> from kdjax import networks, objectives
    >>> network = networks.from_linen(nn.Dense(3))
    >>> batch = {'inputs': jnp.ones((4, 5)), 'labels': jnp.zeros(4, jnp.int32)}
    >>> objective = 0.1 * objectives.hard_labels() + 0.9 * objectives.soft_targets()
    >>> problem = distillation(network, network, objective, optax.sgd(0.1))
    >>> state = problem.init(jax.random.key(0), batch)
    >>> teacher_variables = network.init(jax.random.key(1), batch['inputs'])
    >>> state, metrics = problem.step(state, teacher_variables, batch)
    >>> int(state.step), sorted(metrics)[:4]
    (1, ['gradient_norm', 'hard_labels', 'hard_labels/weighted', 'loss'])
    """
    if objective_optimizer is None:
        objective_optimizer = optax.adam(1e-3)

    def output_shapes(student_variables: Variables, inputs: Any) -> tuple[Outputs, Outputs]:
        key = jax.random.key(0)
        student_shapes = jax.eval_shape(
            lambda variables, inputs: student.apply(variables, inputs, train=True, rng=key)[0], student_variables, inputs
        )
        if teacher is None:
            return student_shapes, Outputs(None)
        teacher_init, teacher_apply = teacher
        return student_shapes, jax.eval_shape(
            lambda inputs: teacher_apply(teacher_init(key, inputs), inputs, train=False)[0], inputs
        )

    def init(key: jax.Array, batch: Batch, *, student_variables: Variables | None = None) -> TrainState:
        check_batch(batch)
        student_key, objective_key, run_key = jax.random.split(key, 3)
        if student_variables is None:
            student_variables = student.init(student_key, batch['inputs'])
        params = student_variables['params']
        shapes = jax.eval_shape(lambda x: x, batch)
        student_shapes, teacher_shapes = output_shapes(student_variables, shapes['inputs'])
        objective_params, objective_state = objective.init(objective_key, student_shapes, teacher_shapes, shapes)
        opt_state = optimizer.init(params)
        check_outermost(opt_state)
        state = TrainState(
            step=jnp.int32(0),
            params=params,
            model_state={name: value for name, value in student_variables.items() if name != 'params'},
            opt_state=opt_state,
            objective_params=objective_params,
            objective_state=objective_state,
            objective_opt_state=objective_optimizer.init(objective_params),
            key=run_key,
        )
        # The step donates its state: the caller's variables must outlive that, and no array may stand in it twice, as where an
        # optimizer remembers the first parameters.
        return jax.tree.map(jnp.copy, state)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, teacher_variables: Variables, batch: Batch) -> tuple[TrainState, dict[str, Average]]:
        check_batch(batch)
        teacher_outputs = Outputs(None)
        if teacher is not None:
            teacher_outputs, _ = teacher.apply(teacher_variables, batch['inputs'], train=False)
            teacher_outputs = jax.lax.stop_gradient(teacher_outputs)
        rng = jax.random.fold_in(state.key, state.step)

        def loss_function(params: Any, objective_params: Any) -> tuple[jax.Array, tuple[Any, Any, dict[str, Average]]]:
            variables = {'params': params, **state.model_state}
            student_outputs, new_state = student.apply(variables, batch['inputs'], train=True, rng=rng)
            loss, metrics, objective_state = objective.apply(
                objective_params, state.objective_state, student_outputs, teacher_outputs, batch, step=state.step
            )
            return loss, (new_state, objective_state, metrics)

        gradient = jax.grad(loss_function, argnums=(0, 1), has_aux=True)
        (grads, objective_grads), (new_state, objective_state, metrics) = gradient(state.params, state.objective_params)
        # optax's Adam promotes dtypes implicitly, which would fail for users who forbid that in their own code.
        with jax.numpy_dtype_promotion('standard'):
            metrics['gradient_norm'] = mean(optax.tree.norm(grads))
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            objective_updates, objective_opt_state = objective_optimizer.update(
                objective_grads, state.objective_opt_state, state.objective_params
            )
        new = TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            model_state=keep_frozen_state(opt_state, state.model_state, new_state),
            opt_state=opt_state,
            objective_params=optax.apply_updates(state.objective_params, objective_updates),
            objective_state=objective_state,
            objective_opt_state=objective_opt_state,
            key=state.key,
        )
        rate = _learning_rate(opt_state)
        return new, metrics if rate is None else {**metrics, 'learning_rate': mean(rate)}

    def check(data: Batch, batch_size: int, *, student_variables: Variables | None = None) -> None:
        check_batch(data)
        shapes = jax.eval_shape(lambda x: x, take_examples(data, slice(0, batch_size)))
        variables = student_variables
        if variables is None:
            variables = jax.eval_shape(student.init, jax.random.key(0), shapes['inputs'])
        objective.check(*output_shapes(variables, shapes['inputs']), data)

    return Problem(init, step, check)


def _learning_rate(opt_state: optax.OptState) -> ArrayLike | None:
    """What `optax.inject_hyperparams` says of the step's learning rate, wherever it stands in a chain."""
    injected = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)
    states = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, injected))
    rates = [x.hyperparams['learning_rate'] for x in states if isinstance(x, injected) and 'learning_rate' in x.hyperparams]
    return rates[0] if rates else None
