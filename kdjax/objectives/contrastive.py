"""Contrastive objectives: trained embeddings of both networks, and memory banks as state."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kdjax import losses
from kdjax.batches import Batch
from kdjax.losses.contrastive import ClassIndex
from kdjax.metrics import Average
from kdjax.networks import Outputs
from kdjax.objectives.arguments import batch_mean, feature_pair, kept_examples, require_entry
from kdjax.objectives.connectors import Embedding, apply_connector, init_connector
from kdjax.objectives.objective import Objective, Term, Weight, with_parameters


def info_nce(student: str, teacher: str, *, temperature: Weight = 0.07, width: int = 128) -> Objective:
    """`losses.info_nce` of trained linear embeddings of two layers; the negatives are the rest of the batch.

    Args:
      student: path of the student's layer.
      teacher: path of the teacher's layer.
      temperature: a number or a schedule.
      width: of the embeddings.
    """
    embed = _Embeddings('info_nce', student, teacher, width)

    def loss(params: Any, student: Outputs, teacher: Outputs, batch: Batch, **hyperparameters: Any) -> jax.Array:
        return losses.info_nce(*embed.apply(params, student, teacher), where=kept_examples(batch), **hyperparameters)

    return with_parameters('info_nce', embed.init, loss, temperature=temperature)


def crd(
    student: str,
    teacher: str,
    labels: ArrayLike,
    *,
    negatives: int = 16384,
    width: int = 128,
    temperature: float = 0.07,
    momentum: float = 0.5,
) -> Objective:
    """Contrastive representation distillation, `losses.crd`, of trained linear embeddings of two layers.

    `batch['index']` says which training examples a batch holds. The state is two banks [examples, width], one row per training
    example and network, each moved towards the embedding when its example comes by; the two constants Z, fixed from the first
    batch; and a random key for the negatives, drawn from examples of other classes. Banks may be sharded over their rows.
    Published weight: 0.8.

    Args:
      student: path of the student's layer, the one before the logits in the paper.
      teacher: path of the teacher's.
      labels: classes of all training examples [examples], in the order of `batch['index']`; negative where unknown.
      negatives: how many there are for each example.
      width: of the embeddings.
      temperature: τ.
      momentum: the share of its old value that a row keeps.
    """
    embed = _Embeddings('crd', student, teacher, width)
    classes = losses.class_index(labels)
    examples = int(np.shape(labels)[0])

    def init(key: jax.Array, student: Outputs, teacher: Outputs, batch: Batch) -> tuple[Any, Any]:
        require_entry('crd', batch, 'index')
        keys = jax.random.split(key, 4)
        bound = np.sqrt(3 / width)

        def bank(key: jax.Array) -> jax.Array:
            return jax.random.uniform(key, (examples, width), jnp.float32, -bound, bound)

        state = {
            'student_bank': bank(keys[1]),
            'teacher_bank': bank(keys[2]),
            'normalizers': jnp.zeros(2),
            'classes': classes._asdict(),
            'key': keys[3],
        }
        return embed.init(keys[0], student, teacher, batch), state

    def apply(
        params: Any, state: Any, student: Outputs, teacher: Outputs, batch: Batch, *, step: jax.Array
    ) -> tuple[Average, dict[str, Average], Any]:
        indices, where = require_entry('crd', batch, 'index'), kept_examples(batch)
        embedding_s, embedding_t = embed.apply(params, student, jax.lax.stop_gradient(teacher))
        drawn = losses.crd_negatives(jax.random.fold_in(state['key'], step), indices, ClassIndex(**state['classes']), negatives)
        rows = jnp.concatenate([indices[:, None].astype(drawn.dtype), drawn], axis=1)
        # Rows that are not there, for an index that is not in the data set, are NaN.
        banks = state['student_bank'], state['teacher_bank']
        memory_s, memory_t = (jnp.take(bank, rows, axis=0, mode='fill', fill_value=jnp.nan) for bank in banks)
        shared = {'examples': examples, 'temperature': temperature, 'where': where}
        firsts = (losses.crd_normalizer(*pair, **shared) for pair in ((embedding_s, memory_t), (embedding_t, memory_s)))
        normalizers = jnp.where(state['normalizers'] > 0, state['normalizers'], jnp.stack(list(firsts)))
        values = losses.crd(
            embedding_s,
            embedding_t,
            memory_s,
            memory_t,
            student_normalizer=normalizers[0],
            teacher_normalizer=normalizers[1],
            **shared,
        )
        moved = {
            name: losses.crd_update_memory(state[name], indices, jax.lax.stop_gradient(x), momentum=momentum, where=where)
            for name, x in (('student_bank', embedding_s), ('teacher_bank', embedding_t))
        }
        # A batch of which nothing counts is not the first.
        fixed = normalizers if where is None else jnp.where(jnp.any(where), normalizers, state['normalizers'])
        return batch_mean(values, batch), {}, {**state, **moved, 'normalizers': fixed}

    return Objective((Term('crd', init, apply),))


class _Embeddings:
    """A trained linear map of each of two layers."""

    def __init__(self, term: str, student: str, teacher: str, width: int) -> None:
        self._features = feature_pair(term, student, teacher)
        self._module = Embedding(width)

    def init(self, key: jax.Array, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Any]:
        del batch
        layers = dict(zip(('student', 'teacher'), self._features(student, teacher), strict=True))
        return {
            side: init_connector(self._module, jax.random.fold_in(key, i), layer)
            for i, (side, layer) in enumerate(layers.items())
        }

    def apply(self, params: dict[str, Any], student: Outputs, teacher: Outputs) -> tuple[jax.Array, jax.Array]:
        layers = dict(zip(('student', 'teacher'), self._features(student, teacher), strict=True))
        embedded = (apply_connector(self._module, params[side], layer) for side, layer in layers.items())
        return tuple(embedded)
