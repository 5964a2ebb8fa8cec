"""FitNets: the mean squared difference of two activations."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import numerics
from kdjax.losses._activations import activations
from kdjax.meshes import on_any_mesh


@on_any_mesh
def hint(student: ArrayLike, teacher: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None) -> jax.Array:
    """FitNets: mean squared difference of two activations of the same shape, per example.

    mean over all but the first axis of (f_s - f_t)². The regressor that brings the student's activation to the teacher's
    shape is `objectives.hint`'s. The paper writes ½ of the sum; the mean, as in most implementations, does not grow with
    the size.

    Args:
      student: activations [batch, ..., channels], floating point of any precision; arithmetic is in float32.
      teacher: activations of the same shape.
      axis: the channel axis.
      where: boolean, broadcastable to the activations: elements to keep.

    Returns:
      float32 [batch], in squared units of the activation; 0 where nothing is kept.

    Raises:
      ValueError: the shapes differ, there is no axis of examples, or a dtype is not floating point.

    >>> import jax.numpy as jnp
    >>> print(hint(jnp.array([[1., 2.], [0., 0.]]), jnp.array([[1., 4.], [0., 0.]])))
    [2. 0.]

    Reference:
      Romero, Ballas, Kahou, Chassang, Gatta, Bengio. FitNets: Hints for Thin Deep Nets. 2015. https://arxiv.org/abs/1412.6550
    """
    student, teacher, where = activations('hint', student, teacher, axis, where)
    return numerics.masked_mean(jnp.square(student - teacher), tuple(range(1, student.ndim)), where)
