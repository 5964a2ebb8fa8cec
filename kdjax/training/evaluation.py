"""What a network is worth on a data set, as sums and counts."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kdjax.batches import Batch
from kdjax.metrics import Average, mean
from kdjax.networks import Network, Variables
from kdjax.training.sharding import mesh_of, shard_batch

Evaluate = Callable[..., dict[str, Average]]
"""`evaluate(variables, data, teacher_variables=None) -> metrics`."""


def evaluator(network: Network, *, teacher: Network | None = None, batch_size: int = 256, bins: int = 15) -> Evaluate:
    """Makes a function that measures a network on labelled data.

    Where variables live on a mesh, of several hosts perhaps, each batch is split over its devices, and every host gets the
    same numbers.

    Args:
      network: the network.
      teacher: a network to compare with; its agreement with `network` is measured too.
      batch_size: examples at a time, rounded up to a multiple of the devices; the last batch is padded and the padding is not
        counted.
      bins: bins of the calibration error.

    Returns:
      A function of the network's variables, a data set {'inputs', 'labels'}, and the teacher's variables. Metrics, all
      `(sum, count)`:
      `accuracy`, the share of examples whose label has the largest logit;
      `nll`, the negative log likelihood of the label, in nats;
      `calibration_error`, Σ_bins |accuracy - confidence| · share, for equally wide bins of the confidence, its sum one
      entry per bin; `agreement`, the share of examples for which network and teacher prefer the same class.

    Raises:
      ValueError: from the function: the data set is empty or has no labels.

    Reference:
      Guo, Pleiss, Sun, Weinberger. On Calibration of Modern Neural Networks. 2017. https://arxiv.org/abs/1706.04599
    """

    @functools.partial(jax.jit, static_argnums=3)
    def evaluate_batch(
        variables: Variables, teacher_variables: Variables, batch: Batch, mesh: Mesh | None
    ) -> dict[str, Average]:
        outputs, _ = network.apply(variables, batch['inputs'], train=False)
        logits, labels, kept = outputs.logits.astype(jnp.float32), batch['labels'], batch['mask']
        correct = (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
        confidence = jnp.max(jax.nn.softmax(logits, axis=-1), axis=-1)
        bin_of = jnp.clip(jnp.ceil(confidence * bins).astype(jnp.int32) - 1, 0, bins - 1)
        gaps = jnp.zeros(bins).at[bin_of].add(jnp.where(kept, correct - confidence, 0.0))
        metrics = {
            'accuracy': mean(correct, kept),
            'nll': mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels), kept),
            'calibration_error': Average(gaps, jnp.sum(kept, dtype=jnp.float32)),
        }
        if teacher is not None:
            teacher_outputs, _ = teacher.apply(teacher_variables, batch['inputs'], train=False)
            agrees = jnp.argmax(teacher_outputs.logits, axis=-1) == jnp.argmax(logits, axis=-1)
            metrics['agreement'] = mean(agrees, kept)
        return metrics if mesh is None else jax.lax.with_sharding_constraint(metrics, NamedSharding(mesh, PartitionSpec()))

    def evaluate(variables: Variables, data: Batch, teacher_variables: Variables | None = None) -> dict[str, Average]:
        if 'labels' not in data:
            raise ValueError("evaluation needs data['labels']")
        examples = data['inputs'].shape[0]
        if not examples:
            raise ValueError('evaluation: the split is empty')
        mesh, total = mesh_of((variables, teacher_variables)), None
        size = batch_size if mesh is None else -(-batch_size // mesh.size) * mesh.size
        for start in range(0, examples, size):
            # One shape for all batches, so one compilation: the last one is filled up with the first example.
            indices = np.arange(start, start + size)
            kept = indices < examples
            batch = {name: data[name][np.where(kept, indices, 0)] for name in ('inputs', 'labels')} | {'mask': kept}
            batch = batch if mesh is None else shard_batch(mesh, batch)
            metrics = evaluate_batch(variables, teacher_variables, batch, mesh)
            total = metrics if total is None else jax.tree.map(jnp.add, total, metrics)
        return total

    return evaluate
