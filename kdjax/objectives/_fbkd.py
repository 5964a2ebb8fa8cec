"""FBKD, attention-guided and non-local distillation for dense tasks, with all that it trains."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdjax import losses
from kdjax.batches import Batch
from kdjax.networks import Outputs
from kdjax.numerics import root
from kdjax.objectives._arguments import feature_pair
from kdjax.objectives._connectors import apply_connector, init_connector
from kdjax.objectives._objective import Objective, Weight, with_parameters
from kdjax.objectives._positions import feature_counts, pool_to_one_size, zero_outside


def fbkd(
    student: str,
    teacher: str,
    *,
    guided: Weight = 7e-5,
    attention: Weight = 4e-3,
    non_local: Weight = 7e-5,
    temperature: Weight = 0.1,
) -> Objective:
    """FBKD: `losses.fbkd` of a layer of the teacher and an adapted one of the student, and the distance of their relations.

    A 1x1 convolution adapts the student's layer to the teacher's channels. The relations of a layer are a non-local block of
    it, r_i = f_i + W · 1/P Σ_j (θ f_i · φ f_j) g f_j over the P positions j, with four 1x1 convolutions, of half the channels
    for θ, φ and g; each network has its own block, and another 1x1 convolution adapts the student's. The value adds
    non_local · ||r_t - r_s||, per example. All of these are trained, the teacher's block too, but never the teacher: without
    the f_i, which is published code's, both blocks would be free to vanish. The authors' blocks pool the positions j first, on
    large maps; mmrazor's have batch norm behind W. The larger of two images is average-pooled to the smaller.

    The weights are published for each level of a detector's feature pyramid, over which the objective is summed; copies for
    detectors of one stage have them six times as large. `kdjax.recipes.fbkd` has them.

    Args:
      student: path of the student's layer [batch, height, width, channels].
      teacher: path of the teacher's.
      guided: as in the loss; a number or a schedule, as are all.
      attention: as in the loss.
      non_local: weight of the distance of the relations.
      temperature: as in the loss.

    Raises:
      ValueError: from `init`: layers are no images.
    """
    features = feature_pair('fbkd', student, teacher)

    def modules(source: Any, target: Any) -> dict[str, tuple[nn.Module, Any]]:
        for x in (source, target):
            if len(x.shape) != 4:
                raise ValueError(f'fbkd: layers must be images [batch, height, width, channels], got {x.shape}')
        adapt = nn.Dense(target.shape[-1])
        return {
            'adapt': (adapt, source),
            'student_relations': (_NonLocal(), source),
            'teacher_relations': (_NonLocal(), target),
            'adapt_relations': (adapt, source),
        }

    def init(key: jax.Array, student: Outputs, teacher: Outputs, batch: Batch) -> Any:
        del batch
        made = modules(*features(student, teacher))
        keys = jax.random.split(key, len(made))
        return {name: init_connector(module, own, x) for own, (name, (module, x)) in zip(keys, made.items(), strict=True)}

    def loss(
        params: Any, student: Outputs, teacher: Outputs, batch: Batch, *, non_local: Any, **hyperparameters: Any
    ) -> jax.Array:
        source, target = pool_to_one_size(batch, *features(student, teacher))
        where = feature_counts(batch, target.shape)
        made = modules(source, target)

        def run(name: str, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
            return apply_connector(made[name][0], params[name], x, mask=mask)

        guided_and_attention = losses.fbkd(run('adapt', source), target, where=where, **hyperparameters)
        of_student = run('adapt_relations', run('student_relations', source, where))
        difference = zero_outside(where, run('teacher_relations', target, where) - of_student)
        distance = root(jnp.sum(jnp.square(difference), axis=(1, 2, 3)))
        return guided_and_attention + jnp.asarray(non_local, jnp.float32) * distance

    return with_parameters('fbkd', init, loss, guided=guided, attention=attention, non_local=non_local, temperature=temperature)


class _NonLocal(nn.Module):
    """A non-local block: every position and its products with all that count."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Maps [batch, height, width, channels] to the same shape."""
        batch, height, width, channels = x.shape
        flat = zero_outside(mask, x).reshape(batch, height * width, channels)
        inner = max(1, channels // 2)
        theta, phi, g = (nn.Dense(inner, name=name)(flat) for name in ('theta', 'phi', 'g'))
        count = jnp.full((batch, 1, 1), height * width, jnp.float32)
        if mask is not None:
            keep = jnp.broadcast_to(mask, (batch, height, width, 1)).reshape(batch, height * width, 1)
            # A bias stands where nothing counts.
            g, count = jnp.where(keep, g, 0.0), jnp.sum(keep, axis=(1, 2), keepdims=True, dtype=jnp.float32)
        # The products of φ and g first: the same, without an array of positions by positions.
        summary = jnp.einsum('bjc,bjd->bcd', phi, g, precision=jax.lax.Precision.HIGHEST) / jnp.maximum(count, 1.0)
        related = jnp.einsum('bic,bcd->bid', theta, summary, precision=jax.lax.Precision.HIGHEST)
        return (flat + nn.Dense(channels, name='out')(related)).reshape(x.shape)
