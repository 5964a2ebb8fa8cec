"""Augmentation that needs two examples."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kdjax.batches import Batch, check_batch

_KNOWN = {'inputs', 'labels', 'mask', 'index'}


def mixup(*, alpha: float) -> Callable[[jax.Array, Batch], Batch]:
    """Makes `mix(key, batch) -> batch`, which blends each input with that of another example of the batch.

    x = λ x_i + (1 - λ) x_j with λ from Beta(α, α), drawn for every example; of λ and 1 - λ the larger one is taken, so `labels`
    stay those of the example that prevails. `objectives.mixed_labels` learns from both labels; distillation needs neither, as
    teacher and student see the same blend. `training.transform_batches` applies it within the training step.

    Args:
      alpha: of the distribution: 0 blends nothing, 1 blends evenly.

    Returns:
      A function that keeps `labels` and `index`, and adds `share` λ, float32 [batch], from 0.5 to 1, and, where there are
      labels, `other_labels`. Integer inputs are rounded. Examples that `mask` leaves out make those that they are blended with
      left out.

    Raises:
      ValueError: alpha is negative; or, from the function, the batch holds something else, such as recorded predictions, which
        would be those of unmixed inputs.

    >>> import jax, jax.numpy as jnp
    >>> batch = {'inputs': jnp.array([[0.0], [1.0]]), 'labels': jnp.array([3, 7])}
    >>> mixed = mixup(alpha=1.0)(jax.random.key(0), batch)
    >>> sorted(mixed)
    ['inputs', 'labels', 'other_labels', 'share']

    Reference:
      Zhang, Cisse, Dauphin, Lopez-Paz. mixup: Beyond Empirical Risk Minimization. 2018. https://arxiv.org/abs/1710.09412
    """
    if alpha < 0:
        raise ValueError(f'mixup: alpha must not be negative, got {alpha}')

    def mix(key: jax.Array, batch: Batch) -> Batch:
        check_batch(batch)
        unknown = sorted(batch.keys() - _KNOWN)
        if unknown:
            raise ValueError(f'mixup: a batch must hold no more than {sorted(_KNOWN)}, got {unknown}')
        inputs = batch['inputs']
        share_key, order_key = jax.random.split(key)
        examples = inputs.shape[0]
        share = jax.random.beta(share_key, alpha, alpha, (examples,)) if alpha else jnp.ones(examples)
        share = jnp.maximum(share, 1 - share)
        order = jax.random.permutation(order_key, examples)
        weight = share.reshape(-1, *[1] * (inputs.ndim - 1))
        exact = inputs.astype(jnp.float32)
        blend = weight * exact + (1 - weight) * exact[order]
        if not jnp.issubdtype(inputs.dtype, jnp.floating):
            blend = jnp.round(blend)
        mixed = {**batch, 'inputs': blend.astype(inputs.dtype), 'share': share}
        if 'labels' in batch:
            mixed['other_labels'] = batch['labels'][order]
        if 'mask' in batch:
            mixed['mask'] = batch['mask'] & batch['mask'][order]
        return mixed

    return mix
