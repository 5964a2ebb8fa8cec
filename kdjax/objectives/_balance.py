"""Terms of one size, whatever units their losses have."""

from typing import Any

import jax
import jax.numpy as jnp

from kdjax.batches import Batch
from kdjax.metrics import Average, divide, mean
from kdjax.networks import Outputs
from kdjax.objectives._objective import Objective, Term


def balance_by_magnitude(objective: Objective, reference: str) -> Objective:
    """Rescales every term so that its value equals that of one of them, at every step; only then do the weights apply.

    Σ_i w_i · L_i · |L_r| / |L_i|, where gradients take the quotient as a number. So the weights say what share of the loss
    each term has, and need not be searched anew for other features and networks. A term that is 0 is left as it is. NVIDIA's
    Model Optimizer balances so the losses of layers by that of the logits, and those of the logits by the labels' one.

    The terms are one now, whose metrics are those of the objective, with the factor of each as `'name/factor'`.

    Args:
      objective: a sum of two terms or more.
      reference: the name of the term that the others are measured by, one of `objective.names`.

    Raises:
      ValueError: the objective has no such term.

    >>> import jax, jax.numpy as jnp
    >>> from kdjax import objectives
    >>> student, teacher = Outputs(jnp.array([[2.0, 0.0]])), Outputs(jnp.array([[0.0, 2.0]]))
    >>> both = objectives.combine(hard=objectives.hard_labels(), mse=0.5 * objectives.logit_mse())
    >>> balanced, batch = balance_by_magnitude(both, 'hard'), {'labels': jnp.array([1])}
    >>> params, state = balanced.init(jax.random.key(0), student, teacher, batch)
    >>> loss, metrics, _ = balanced.apply(params, state, student, teacher, batch, step=0)
    >>> print(loss, *(metrics[f'balance_by_magnitude/{name}'].total for name in both.names))
    3.190392 2.126928 4.0
    """
    if reference not in objective.names:
        raise ValueError(f'balance_by_magnitude: the objective has no term {reference}, but {", ".join(objective.names)}')

    def apply(
        params: Any, state: Any, student: Outputs, teacher: Outputs, batch: Batch, *, step: jax.Array
    ) -> tuple[Average, dict[str, Average], Any]:
        _, metrics, state = objective.apply(params, state, student, teacher, batch, step=step)
        sizes = {name: jax.lax.stop_gradient(jnp.abs(divide(metrics[name]))) for name in objective.names}
        loss, factors = jnp.float32(0.0), {}
        for name, size in sizes.items():
            factor = jnp.where(size == 0, 1.0, sizes[reference] / jnp.where(size == 0, 1.0, size))
            loss += factor * divide(metrics[f'{name}/weighted'])
            factors[f'{name}/factor'] = mean(factor)
        del metrics['loss']
        return mean(loss), {**metrics, **factors}, state

    return Objective((Term('balance_by_magnitude', objective.init, apply, check=objective.check),))
