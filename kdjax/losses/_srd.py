"""SRD, the simple recipe: the logarithm of the sum of high powers of the differences of two embeddings."""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import numerics
from kdjax.losses._activations import activations
from kdjax.meshes import on_any_mesh


@on_any_mesh
def srd(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    exponent: ArrayLike = 4.0,
    epsilon: ArrayLike = 1e-12,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """SRD, the simple recipe: logarithm of the summed powers of the differences of two embeddings, per example.

    log(Σ |s - t|^exponent + epsilon), the sum over all but the first axis. The power looks at the largest differences, and the
    logarithm makes gradients that do not shrink as the sum does. Both sides are meant to be standardized, the student's behind
    a linear projector, as `objectives.srd` does; the projector learns what the networks have in common.

    The authors' code and torchdistill take the logarithm of one sum over the batch and the features, without epsilon: a batch
    that is matched has -inf and NaN gradients, and an example counts by its share of the sum. Here each example has its own
    logarithm, which a mask and weights may leave out. The exponent is 4 in the authors' code, and 1 in torchdistill unless it
    is given. The published weight, 2, beside a cross-entropy and soft targets at T = 1, is that of pooled embeddings.

    Args:
      student: embeddings [batch, ..., channels], floating point of any precision; arithmetic is in float32.
      teacher: embeddings of the same shape.
      exponent: the power, positive; a number or a traced scalar.
      epsilon: what keeps the logarithm finite where the two are equal, positive.
      axis: the channel axis.
      where: boolean, broadcastable to the embeddings: elements to keep.

    Returns:
      float32 [batch], at least log(epsilon), which is negative; 0 where nothing is kept.

    Raises:
      ValueError: the shapes differ, there is no axis of examples, a dtype is not floating point, or the exponent or epsilon is
        not a positive scalar.

    >>> import jax.numpy as jnp
    >>> print(srd(jnp.array([[1., 2.]]), jnp.array([[1., 4.]])))
    [2.773]

    Reference:
      Miles, Mikolajczyk. Understanding the Role of the Projector in Knowledge Distillation. 2024.
      https://arxiv.org/abs/2303.11098
    """
    numerics.check_positive('srd', exponent=exponent, epsilon=epsilon)
    student, teacher, where = activations('srd', student, teacher, axis, where)
    exponent, least = jnp.asarray(exponent, jnp.float32), jnp.log(jnp.asarray(epsilon, jnp.float32))
    size = math.prod(student.shape[1:])
    distances = jnp.abs(student - teacher).reshape(student.shape[0], size)
    # Relative to the largest, whose power would overflow, or vanish.
    largest = jax.lax.stop_gradient(jnp.max(distances, axis=1, initial=0.0))
    relative = distances / numerics.nonzero(largest)[:, None]
    powers = jnp.where(relative == 0, 0.0, numerics.nonzero(relative) ** exponent)
    total = jnp.sum(powers, axis=1)
    logarithms = exponent * jnp.log(numerics.nonzero(largest)) + jnp.log(numerics.nonzero(total))
    values = jnp.where(total == 0, least, jnp.logaddexp(logarithms, least))
    if where is None:
        return values if size else jnp.zeros(values.shape)
    return jnp.where(jnp.any(where.reshape(where.shape[0], size), axis=1), values, 0.0)
