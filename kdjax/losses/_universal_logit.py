"""ULD, universal logit distillation: for networks over different classes, such as other vocabularies."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import numerics
from kdjax.meshes import on_any_mesh


@on_any_mesh
def universal_logit(student: ArrayLike, teacher: ArrayLike, *, temperature: ArrayLike = 1.0, axis: int = -1) -> jax.Array:
    """ULD: difference of both networks' sorted probabilities, whatever their classes, per example.

    Σ_i |p_s(i) - p_t(i)| with the probabilities of each in falling order, and zeros for those that the smaller vocabulary
    lacks. It is a Wasserstein distance with a cost of 1 between any two tokens. Only how sure the networks are is compared, not
    of what. Classes to be left out, such as the padding of a vocabulary, are ruled out by logits of -inf.

    Args:
      student: logits [..., classes], floating point of any precision; arithmetic is in float32.
      teacher: logits [..., other classes].
      temperature: T > 0 of both, a number or a traced scalar.
      axis: the class axis of both.

    Returns:
      float32 of shape [...], from 0 to 2.

    Raises:
      ValueError: the shapes differ but for the classes, a dtype is not floating point, there is a single class, or the
        temperature does not fit.

    >>> import jax.numpy as jnp
    >>> print(universal_logit(jnp.array([[0., 0., 0., 0.]]), jnp.array([[0., 1e4]])))
    [1.5]

    Reference:
      Boizard, El Haddad, Hudelot, Colombo. Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for
      LLMs. 2024. https://arxiv.org/abs/2402.12030
    """
    numerics.check_positive('universal_logit', temperature=temperature)
    zero = numerics.log_zero(student, teacher)
    student, teacher = numerics.pair('universal_logit', student, teacher, axis, same_shape=False)
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f'universal_logit: student {student.shape} and teacher {teacher.shape} (classes last) must be alike '
            'but for the classes'
        )
    sides = []
    for logits in (student, teacher):
        numerics.check_classes('universal_logit', logits.shape)
        sides.append(jnp.exp(numerics.log_softmax(logits, temperature, zero=zero)))
    return difference_when_sorted(*sides)


def difference_when_sorted(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Σ_i |p_s(i) - p_t(i)| of probabilities [..., classes] and [..., other classes] in falling order, with zeros behind."""
    classes = max(student.shape[-1], teacher.shape[-1])
    falling = [
        jnp.pad(-jnp.sort(-p, axis=-1), [(0, 0)] * (p.ndim - 1) + [(0, classes - p.shape[-1])]) for p in (student, teacher)
    ]
    return jnp.sum(jnp.abs(falling[0] - falling[1]), axis=-1)
