"""SimKD, the reused teacher classifier, with the projector that it trains and the logits that it is for."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import losses
from kdjax.batches import Batch
from kdjax.metrics import Average
from kdjax.networks import Outputs
from kdjax.objectives._arguments import batch_mean, feature_pair
from kdjax.objectives._bottleneck import Bottleneck, require_positions
from kdjax.objectives._objective import Objective, Term
from kdjax.objectives._positions import feature_counts, pool_to_one_size
from kdjax.pooling import average_pool


def simkd(student: str, teacher: str, *, reduction: int = 2) -> Objective:
    """SimKD: the student's last map, behind a trained projector, becomes the teacher's, for the teacher's own head to read.

    mean (P(f_s) - f_t)², as `losses.hint`. The projector P is a bottleneck of 1x1, 3x3 and 1x1 convolutions without bias, each
    with batch norm and ReLU, of the teacher's channels / `reduction` in between. The larger of two images is average-pooled to
    the smaller. It is all that the paper trains on, with weight 1: no labels, no soft targets. The student's own head learns
    nothing of it; `simkd_logits` has the logits of the student's map behind projector and teacher's head, which are the
    product. The state is the projector's running means and variances, which these logits need.

    The authors' code and its copies for mdistiller agree, but for the convolution of 3x3, which the paper also has by depth
    (each channel on its own) to save parameters. There is no recipe: a recipe trains the student's own head.

    Args:
      student: path of the student's layer [batch, positions, channels], the last before its pooling.
      teacher: path of the teacher's, which enters its pooling and head.
      reduction: by how much the bottleneck is narrower than the teacher's layer.

    Raises:
      ValueError: `reduction` is less than 1, or from `init`: a layer has no positions.

    Reference:
      Chen, Mei, Zhang, Wang, Feng, Chen. Knowledge Distillation with the Reused Teacher Classifier. 2022.
      https://arxiv.org/abs/2203.14001
    """
    if reduction < 1:
        raise ValueError(f'simkd: reduction must be at least 1, got {reduction}')
    features = feature_pair('simkd', student, teacher)

    def model(target: Any) -> Bottleneck:
        channels = target.shape[-1]
        return Bottleneck(max(1, channels // reduction), channels, activate_last=True)

    def init(key: jax.Array, student: Outputs, teacher: Outputs, batch: Batch) -> tuple[Any, Any]:
        del batch
        source, target = features(student, teacher)
        require_positions('simkd', source, target)
        variables = model(target).lazy_init(key, jax.ShapeDtypeStruct(source.shape, jnp.float32))
        return dict(variables['params']), dict(variables['batch_stats'])

    def apply(
        params: Any, state: Any, student: Outputs, teacher: Outputs, batch: Batch, *, step: jax.Array
    ) -> tuple[Average, dict[str, Average], Any]:
        del step
        source, target = pool_to_one_size(batch, *features(student, jax.lax.stop_gradient(teacher)))
        where = feature_counts(batch, target.shape)
        some = jnp.bool_(True) if where is None else jnp.any(where)
        # Statistics of no examples would be NaN.
        mask = None if where is None else where | ~some
        variables = {'params': params, 'batch_stats': state}
        projected, moved = model(target).apply(variables, source, mask, mutable=['batch_stats'])
        state = jax.tree.map(lambda new, old: jnp.where(some, new, old), dict(moved['batch_stats']), state)
        return batch_mean(losses.hint(projected, target, where=where), batch), {}, jax.lax.stop_gradient(state)

    return Objective((Term('simkd', init, apply),))


def simkd_logits(
    params: Any,
    state: Any,
    student: jax.Array,
    kernel: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    size: tuple[int, int] | None = None,
) -> jax.Array:
    """The logits of a student that reads its map with the teacher's head: projector, mean over positions, linear map.

    Of a trained SimKD alone, `params` and `state` are `objective_params['simkd']` and `objective_state['simkd']` of its state
    of training, and the product is a network:

        def apply(variables, inputs, *, train=False, rng=None):
            outputs, state = student.apply(variables['student'], inputs)
            logits = simkd_logits(*variables['projector'], outputs.features['stage3'], *variables['head'])
            return Outputs(logits, outputs.features), state

    Args:
      params: of the projector.
      state: its running means and variances.
      student: the student's map [batch, positions, channels].
      kernel: of the teacher's head [the teacher's channels, classes].
      bias: of the teacher's head [classes].
      size: height and width of the teacher's map, where the student's is larger, to which it was pooled in training.

    Returns:
      float32 [batch, classes].

    Raises:
      ValueError: the map has no positions, or the head does not fit the projector.
    """
    require_positions('simkd_logits', student)
    kernel = jnp.asarray(kernel, jnp.float32)
    hidden, channels = params['Conv_0']['kernel'].shape[-1], params['Conv_2']['kernel'].shape[-1]
    if kernel.ndim != 2 or kernel.shape[0] != channels:
        raise ValueError(f'simkd_logits: the head must be [channels, classes] with {channels} channels, got {kernel.shape}')
    source = student.astype(jnp.float32)
    source = source if size is None else average_pool(source, size)
    module = Bottleneck(hidden, channels, activate_last=True)
    projected = module.apply({'params': params, 'batch_stats': state}, source, train=False)
    pooled = jnp.mean(jnp.asarray(projected), axis=tuple(range(1, source.ndim - 1)))
    logits = jnp.matmul(pooled, kernel, precision=jax.lax.Precision.HIGHEST)
    return logits if bias is None else logits + jnp.asarray(bias, jnp.float32)[None]
