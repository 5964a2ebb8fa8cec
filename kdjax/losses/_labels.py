"""What losses on logits and labels share: checks, masks of the labelled class and of the others, and cross-entropy.

Logits are [..., classes] and labels integers [...]. An example with a negative label has none: it costs exactly 0 and teaches
nothing, whatever its logits. A label beyond the classes is an error where it is known, and NaN where it is traced.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import numerics


class Classes(NamedTuple):
    """Masks of the shape of the logits: the labelled class, those other than it, and all, of those that are kept.

    With the labels, and the log probability of classes at -inf.
    """

    target: jax.Array
    others: jax.Array
    kept: jax.Array
    labels: jax.Array
    zero: float


def prepare(
    loss: str,
    student: ArrayLike,
    teacher: ArrayLike,
    labels: ArrayLike,
    temperature: ArrayLike,
    axis: int,
    where: ArrayLike | None,
) -> tuple[tuple[jax.Array, ...], Classes, jax.Array]:
    """Checks the arguments; returns both logits, what there is to know of the classes, and the temperature in float32."""
    numerics.check_positive(loss, temperature=temperature)
    where = numerics.mask(loss, where, jnp.shape(student), axis)
    zero = numerics.log_zero(student, teacher)
    student, teacher = numerics.pair(loss, student, teacher, axis)
    numerics.check_classes(loss, student.shape)
    labels = numerics.check_labels(loss, labels, student.shape[:-1], student.shape[-1])
    logits = tuple(jnp.where(labels[..., None] < 0, 0.0, x) for x in (student, teacher))
    target = jax.nn.one_hot(labels, student.shape[-1], dtype=jnp.bool_)
    kept = jnp.ones(student.shape, jnp.bool_) if where is None else where
    return logits, Classes(target & kept, ~target & kept, kept, labels, zero), jnp.asarray(temperature, jnp.float32)


def of_labelled(values: jax.Array, classes: Classes) -> jax.Array:
    return numerics.of_labelled(values, classes.labels, classes.kept.shape[-1])


def cross_entropy(log_p: jax.Array, log_q: jax.Array, where: jax.Array) -> jax.Array:
    """-Σ p log q over the classes that are kept."""
    return -jnp.sum(jnp.exp(log_p) * log_q, axis=-1, where=where)
