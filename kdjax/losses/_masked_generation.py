"""MGD, masked generative distillation: what was generated from a masked activation, against the teacher's."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import numerics
from kdjax.losses._activations import activations
from kdjax.meshes import on_any_mesh


@on_any_mesh
def masked_generation(student: ArrayLike, teacher: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None) -> jax.Array:
    """MGD: mean squared difference of the teacher's activation and one generated from a masked one, per example.

    mean over all but the first axis of (g - f_t)². The random mask of positions and the generator of convolutions that
    makes g from the student's masked activation are `objectives.masked_generation`'s. Published code takes the sum over
    an example; for this mean, multiply its weights by height · width · channels.

    Args:
      student: the generated activations [batch, ..., channels], floating point of any precision; arithmetic is in float32.
      teacher: activations of the same shape.
      axis: the channel axis.
      where: boolean, broadcastable to the activations: elements to keep. The paper keeps all, masked before or not.

    Returns:
      float32 [batch], in squared units of the activation; 0 where nothing is kept.

    Raises:
      ValueError: the shapes differ, there is no axis of examples, or a dtype is not floating point.

    >>> import jax.numpy as jnp
    >>> print(masked_generation(jnp.array([[1., 2.], [0., 0.]]), jnp.array([[1., 4.], [0., 1.]])))
    [2.  0.5]

    Reference:
      Yang, Li, Shao, Shi, Yuan, Yuan. Masked Generative Distillation. 2022. https://arxiv.org/abs/2205.01529
    """
    student, teacher, where = activations('masked_generation', student, teacher, axis, where)
    return numerics.masked_mean(jnp.square(student - teacher), tuple(range(1, student.ndim)), where)
